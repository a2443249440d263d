"""The measured loss of plans: apply one, evaluate, restore the dense model, take the next."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from rankopt.apply.apply import FactorCache, applied
from rankopt.errors import NotFiniteError
from rankopt.evaluation.evaluation import Evaluation, measured
from rankopt.measure.loss import Loss, find_loss
from rankopt.model.inputs import listed
from rankopt.model.tasks import Batch
from rankopt.model.weights import unwrapped
from rankopt.plan.compare import ComparedPlan
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from rankopt.progress import bar
from rankopt.refinement.divergence import DenseLogits, kept_logits


@dataclasses.dataclass(frozen=True, eq=False)
class PlanEvaluator:
    """Measures one plan after the other on one model, which is dense again after each.

    Layers are decomposed once for all plans.

    Attributes:
        model: the dense model that was profiled.
        profile: that the plans were made from.
        batches: held-out data.
        progress: bars on stderr for each plan's factors and evaluation; by default if it is a
            terminal. False inside a loop that has a bar of its own.
        per_example: measure the loss of each example, too.
        also: name -> held-out data of other domains, measured beside.
    """

    model: nn.Module
    profile: Profile
    batches: Sequence[Batch]
    progress: bool | None = None
    per_example: bool = False
    also: Mapping[str, Sequence[Batch]] = dataclasses.field(default_factory=dict)
    _cache: FactorCache = dataclasses.field(default_factory=dict, init=False, repr=False)

    def dense(self) -> Evaluation:
        """The model without a plan.

        Raises:
            NotFiniteError: its loss is NaN or infinite; says in which batch.
        """
        found = self._evaluated(self.model, [None] * len(self._losses))
        if not math.isfinite(found.loss):
            raise NotFiniteError(
                f"the dense model's {found.notes[0]}: no plan can be compared with that; look at "
                "that example, or at the model's weights"
            )
        return found

    def __call__(self, plan: Plan) -> Evaluation:
        """The model under a plan.

        Raises:
            PlanError, ModelError: see apply_plan.
        """
        logits = self._dense_logits
        with applied(
            self.model, plan, self.profile, self._cache, progress=self.progress
        ) as compressed:
            return self._evaluated(compressed, logits)

    @functools.cached_property
    def _losses(self) -> list[Loss]:
        """What the first batch of each data tells of the loss, told once for all plans."""
        model = unwrapped(self.model)
        losses = []
        for batches in (self.batches, *self.also.values()):
            loss = find_loss(model, None)
            for first in itertools.islice(listed(batches), 1):
                loss = loss.settled(model, first)
            losses.append(loss)
        return losses

    @functools.cached_property
    def _dense_logits(self) -> list[DenseLogits | None]:
        """Of each data; the model is dense."""
        model, data = unwrapped(self.model), (self.batches, *self.also.values())
        return [
            kept_logits(model, listed(batches), loss)
            for batches, loss in zip(data, self._losses, strict=True)
        ]

    def _evaluated(self, model: nn.Module, logits: Sequence[DenseLogits | None]) -> Evaluation:
        layers, data = self.profile.info.layers, (self.batches, *self.also.values())
        found, *others = (
            measured(
                model,
                batches,
                loss,
                layers=layers,
                per_example=self.per_example and number == 0,
                dense=dense,
                progress=self.progress,
            )
            for number, (batches, loss, dense) in enumerate(
                zip(data, self._losses, logits, strict=True)
            )
        )
        return dataclasses.replace(found, also=dict(zip(self.also, others, strict=True)))


def measure_rows(
    model: nn.Module,
    profile: Profile,
    rows: Sequence[ComparedPlan],
    batches: Sequence[Batch],
    *,
    per_example: bool = False,
    also: Mapping[str, Sequence[Batch]] | None = None,
    progress: bool | None = None,
) -> Iterator[tuple[ComparedPlan, Evaluation]]:
    """Measure the plans of a comparison; those with one backend and the same ranks once.

    Args:
        model: the dense model that was profiled.
        profile: that the rows were planned from.
        rows: plans to measure.
        batches: held-out data.
        per_example: also the loss of each example; see evaluate.
        also: name -> held-out data of other domains: ``Evaluation.also``.
        progress: a bar on stderr, one for all plans; by default if it is a terminal.

    Yields:
        Each row, and what was measured.
    """
    measure = PlanEvaluator(model, profile, batches, False, per_example, also or {})
    seen: dict[Any, Evaluation] = {}
    for row in bar(rows, "Compare", "plan", progress):
        kept = tuple(row.plan.ranks.items()), tuple(row.plan.bits.items())
        model_of = row.plan.backend, row.plan.form, kept
        if model_of not in seen:
            seen[model_of] = measure(row.plan)
        yield row, seen[model_of]
