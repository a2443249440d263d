"""The measured loss of many plans of one model."""

import dataclasses
from collections.abc import Iterator, Sequence

from torch import nn

from rankopt.apply.apply import FactorCache, applied
from rankopt.evaluation.evaluation import Evaluation, evaluate
from rankopt.model.tasks import Batch
from rankopt.plan.compare import Row
from rankopt.profile.profile import Profile
from rankopt.progress import bar


def measure_rows(
    model: nn.Module, profile: Profile, rows: Sequence[Row], batches: Sequence[Batch]
) -> Iterator[Row]:
    """Apply each row's plan in turn, evaluate, and restore the dense model.

    Layers are decomposed once for all plans; plans with one backend and the same ranks are
    evaluated once.

    Args:
        model: the dense model that was profiled.
        profile: that the rows were planned from.
        rows: plans to measure.
        batches: held-out data.
    """
    cache: FactorCache = {}
    seen: dict[tuple[str, tuple[tuple[str, int | None], ...]], Evaluation] = {}
    for row in bar(rows, "Compare", "plan"):
        model_of = row.plan.backend, tuple(row.plan.ranks.items())
        if model_of not in seen:
            with applied(model, row.plan, profile, cache) as compressed:
                seen[model_of] = evaluate(compressed, batches, layers=profile.info.layers)
        yield dataclasses.replace(row, measured=seen[model_of])
