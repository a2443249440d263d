"""Whether the ranks have settled: twice the data would hardly move them."""

import dataclasses
from collections.abc import Sequence

from rankopt.errors import DataError, InfeasibleBudgetError
from rankopt.plan.planner import make_plan
from rankopt.profile.profile import Profile


@dataclasses.dataclass(frozen=True)
class Stability:
    """A stop for profile_model, which asks it after 4, 8, 16, ... batches.

    Measuring stops if the ranks that an exact plan would give have moved at most ``tolerance`` of
    the budget's parameters since half as many batches.

    Attributes:
        keep: budget of the plan.
        tolerance: share of the budget's parameters.
    """

    keep: float = 0.8
    tolerance: float = 0.01

    def __call__(
        self, profile: Profile, before: Sequence[float]
    ) -> tuple[Sequence[float], str | None]:
        """What each layer spends, and why to stop.

        Args:
            profile: of the data so far.
            before: what each layer spent when half as much had been seen; empty at first.

        Raises:
            DataError: no ranks fit the budget.
        """
        try:
            plan = make_plan(profile, keep=self.keep)
        except InfeasibleBudgetError as error:
            raise DataError(f"no ranks to settle: {error}") from error
        spent = [float(entry.parameters) for entry in plan.layers]
        if not before:
            return spent, None
        # What one layer gives another takes: half the sum of the changes has moved.
        changes = sum(abs(now - then) for now, then in zip(spent, before, strict=True))
        moved = changes / 2 / plan.budget.parameters
        if moved > self.tolerance:
            return spent, None
        batches = 0 if profile.batch_units is None else profile.batch_units.size
        return spent, (
            f"ranks have settled: {moved:.2%} of the parameters at keep {self.keep:g} moved "
            f"between {batches // 2} and {batches} batches"
        )
