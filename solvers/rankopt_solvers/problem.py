"""The problem: groups of options, one of each to be chosen, under one budget.

Normal form. Group g offers K_g options; option j costs ``cost[j]`` (an integer: parameters, bytes,
FLOPs) and loses ``loss[j] >= 0`` (what is *not* retained). A choice is one option index for each
group. ``objective="sum"`` minimises the sum of the losses, ``"max"`` the largest loss.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from rankopt_solvers.hull import Hull, lower_hull, pareto

Objective = Literal["sum", "max"]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

#: Sums of costs must fit an int64 with room to spare.
LARGEST_TOTAL_COST = 2**62


class ProblemError(ValueError):
    """The problem is malformed: a shape, a sign, a NaN. The message names the group."""


class InfeasibleError(ValueError):
    """No choice fits the budget.

    Attributes:
        budget: the budget asked for.
        smallest: the cost of the cheapest choice, the smallest budget that can be met.
        largest_groups: names of the groups whose cheapest options cost the most, largest first.
    """

    def __init__(self, budget: int, smallest: int, largest_groups: tuple[str, ...]) -> None:
        self.budget, self.smallest, self.largest_groups = budget, smallest, largest_groups
        super().__init__(
            f"no choice fits a budget of {budget:,}: the cheapest costs {smallest:,} "
            f"(largest shares: {', '.join(largest_groups)})"
        )


def _integers(name: str, cost: npt.ArrayLike) -> IntArray:
    array = np.asarray(cost)
    if array.dtype.kind not in "iu":
        exact = np.asarray(array, dtype=np.float64)
        if not (np.isfinite(exact).all() and (exact == np.floor(exact)).all()):
            raise ProblemError(f"group {name!r}: costs must be whole numbers, got {array[:4]}")
        if (np.abs(exact) > 2**53).any():
            raise ProblemError(f"group {name!r}: costs beyond 2**53 must be given as integers")
    return np.array(array, dtype=np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """One decision: the options of one layer (or of layers that share their choice).

    Args:
        name: said in every error.
        cost: shape ``(K,)``, whole numbers >= 0, in any order.
        loss: shape ``(K,)``, finite, >= 0; loss[j] belongs to cost[j].

    Raises:
        ProblemError: wrong shapes, NaN or infinite losses, negative numbers.
    """

    name: str
    cost: IntArray
    loss: FloatArray

    def __post_init__(self) -> None:
        cost = _integers(self.name, self.cost)
        loss = np.array(self.loss, dtype=np.float64)
        if cost.ndim != 1 or cost.shape != loss.shape or not cost.size:
            raise ProblemError(
                f"group {self.name!r}: cost and loss must be two equally long lists of at least "
                f"one option, got shapes {cost.shape} and {loss.shape}"
            )
        if not np.isfinite(loss).all():
            worst = int(np.flatnonzero(~np.isfinite(loss))[0])
            raise ProblemError(f"group {self.name!r}: the loss of option {worst} is {loss[worst]}")
        if (loss < 0).any() or (cost < 0).any():
            raise ProblemError(f"group {self.name!r}: costs and losses must not be negative")
        for field, array in (("cost", cost), ("loss", loss)):
            array.flags.writeable = False
            object.__setattr__(self, field, array)

    @cached_property
    def pareto(self) -> IntArray:
        """Indices of the undominated options: cost strictly up, loss strictly down."""
        return pareto(self.cost, self.loss)

    @cached_property
    def hull(self) -> Hull:
        """The lower convex hull of the options: all that a linear relaxation can see."""
        return lower_hull(self.cost, self.loss, self.pareto)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Groups, a budget for the sum of the chosen costs, and what is minimised.

    Args:
        groups: at least one; names are unique.
        budget: largest total cost, an integer >= 0.
        objective: ``"sum"`` of the losses or their ``"max"``.

    Raises:
        ProblemError: no groups, a repeated name, a budget that is not an integer.
    """

    groups: tuple[Group, ...]
    budget: int
    objective: Objective = "sum"

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not self.groups:
            raise ProblemError("a problem needs at least one group")
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ProblemError(f"group names must be unique, repeated: {', '.join(twice[:3])}")
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | np.integer):
            raise ProblemError(f"the budget must be an integer, got {self.budget!r}")
        object.__setattr__(self, "budget", int(self.budget))
        if self.objective not in get_args(Objective):
            raise ProblemError(f"objective must be 'sum' or 'max', got {self.objective!r}")
        if sum(int(group.cost.max()) for group in self.groups) > LARGEST_TOTAL_COST:
            raise ProblemError("the costs add up to more than 2**62: use a larger unit of cost")

    @property
    def smallest_cost(self) -> int:
        """Cost of the cheapest choice: budgets below it are infeasible."""
        return sum(int(group.cost.min()) for group in self.groups)

    def require_feasible(self) -> None:
        """Raise InfeasibleError when even the cheapest choice is over the budget."""
        smallest = self.smallest_cost
        if smallest > self.budget:
            by_cost = sorted(self.groups, key=lambda group: -int(group.cost.min()))
            raise InfeasibleError(self.budget, smallest, tuple(g.name for g in by_cost[:3]))

    def cost_of(self, choice: Iterable[int]) -> int:
        """Total cost of a choice, in Python integers."""
        return sum(int(g.cost[j]) for g, j in zip(self.groups, choice, strict=True))

    def loss_of(self, choice: Iterable[int]) -> float:
        """Sum (correctly rounded, so independent of the order) or maximum of the losses."""
        losses = [float(g.loss[j]) for g, j in zip(self.groups, choice, strict=True)]
        return math.fsum(losses) if self.objective == "sum" else max(losses)

    def digest(self) -> str:
        """sha256 over names, options, budget and objective."""
        digest = hashlib.sha256(f"{self.budget} {self.objective}".encode())
        for group in self.groups:
            digest.update(group.name.encode() + b"\0")
            digest.update(group.cost.tobytes() + group.loss.tobytes())
        return digest.hexdigest()
