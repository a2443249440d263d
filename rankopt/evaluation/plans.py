"""The measured loss of plans: apply one, evaluate, restore the dense model, take the next."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from rankopt.apply.apply import FactorCache, applied
from rankopt.evaluation.evaluation import Evaluation, evaluate
from rankopt.model.tasks import Batch
from rankopt.plan.compare import ComparedPlan
from rankopt.profile.profile import Profile
from rankopt.progress import bar


def measure_rows(
    model: nn.Module, profile: Profile, rows: Sequence[ComparedPlan], batches: Sequence[Batch]
) -> Iterator[tuple[ComparedPlan, Evaluation]]:
    """Measure the plans of a comparison; those with one backend and the same ranks once.

    Args:
        model: the dense model that was profiled.
        profile: that the rows were planned from.
        rows: plans to measure.
        batches: held-out data.

    Yields:
        Each row, and what was measured.
    """
    cache: FactorCache = {}
    seen: dict[tuple[str, tuple[tuple[str, int | None], ...]], Evaluation] = {}
    for row in bar(rows, "Compare", "plan"):
        model_of = row.plan.backend, tuple(row.plan.ranks.items())
        if model_of not in seen:
            with applied(model, row.plan, profile, cache) as compressed:
                seen[model_of] = evaluate(compressed, batches, layers=profile.info.layers)
        yield row, seen[model_of]


def measured_dict(row: ComparedPlan, measured: Evaluation) -> dict[str, Any]:
    """A row with its measured loss and metrics, as plain values for JSON."""
    return {**row.to_dict(), "loss": measured.loss, **measured.metrics}
