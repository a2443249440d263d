"""Whether the ranks have settled."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stability:
    """When ranks have settled: twice the data would hardly move them.

    Measuring stops after 4, 8, 16, ... batches if the ranks that an exact plan would give have
    moved at most ``tolerance`` of the budget's parameters since half as many batches.

    Attributes:
        keep: budget of the plan.
        tolerance: share of the budget's parameters.
    """

    keep: float = 0.8
    tolerance: float = 0.01
