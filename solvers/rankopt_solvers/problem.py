"""The problem: groups of options, one of each to be chosen, under a budget.

Normal form. Group g offers K_g options; option j costs ``cost[j]`` (an integer: parameters, bytes,
FLOPs) and loses ``loss[j] >= 0`` (what is *not* retained). A choice is one option index for each
group. ``objective="sum"`` minimises the sum of the losses, ``"max"`` the largest loss. Side budgets
limit the sums of other costs of the same options.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from rankopt_solvers.hull import Hulls, Relaxation, lower_hulls, relax, relax_near
from rankopt_solvers.table import FloatArray, IntArray, Table, tabulate

Objective = Literal["sum", "max"]

#: Sums of costs must fit an int64 with room to spare.
LARGEST_TOTAL_COST = 2**62


class ProblemError(ValueError):
    """The problem is malformed, or not one the solver takes. The message names the group."""


class InfeasibleError(ValueError):
    """No choice fits the budget.

    Attributes:
        budget: the budget asked for.
        smallest: the cost of the cheapest choice, the smallest budget that can be met.
        largest_groups: names of the groups whose cheapest options cost the most, largest first.
    """

    def __init__(
        self, budget: int, smallest: int, largest_groups: tuple[str, ...], what: str = "budget"
    ) -> None:
        self.budget, self.smallest, self.largest_groups = budget, smallest, largest_groups
        self.what = what
        super().__init__(
            f"no choice fits a {what} of {budget:,}: the cheapest costs {smallest:,} "
            f"(largest shares: {', '.join(largest_groups)})"
        )

    def __reduce__(self) -> tuple[type, tuple[int, int, tuple[str, ...], str]]:
        return type(self), (self.budget, self.smallest, self.largest_groups, self.what)


def _frozen(array: npt.NDArray[np.generic], given: object) -> npt.NDArray[np.generic]:
    """A read-only array that the caller cannot write to: a copy, unless it already is one."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if array is given and not array.flags.writeable and not owner.flags.writeable:
        return array
    kept = array.copy() if array is given or array.base is not None else array
    kept.flags.writeable = False
    return kept


def _integers(name: str, cost: npt.ArrayLike) -> IntArray:
    try:
        array = np.asarray(cost)
        if array.dtype.kind not in "iu":
            exact = np.asarray(array, dtype=np.float64)
            if not (np.isfinite(exact).all() and (exact == np.floor(exact)).all()):
                raise ProblemError(f"group {name!r}: costs must be whole numbers, got {array[:4]}")
            if (np.abs(exact) > 2**53).any():
                raise ProblemError(f"group {name!r}: costs beyond 2**53 must be given as integers")
    except (TypeError, ValueError) as error:
        if isinstance(error, ProblemError):
            raise
        raise ProblemError(f"group {name!r}: costs must be whole numbers: {error}") from error
    if array.dtype == np.uint64 and array.size and int(array.max()) > LARGEST_TOTAL_COST:
        raise ProblemError(f"group {name!r}: costs add up to more than 2**62: use a larger unit")
    whole: IntArray = np.ascontiguousarray(array, dtype=np.int64)
    if (whole < 0).any():
        raise ProblemError(f"group {name!r}: costs must not be negative")
    return _frozen(whole, cost)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """One decision: the options of one layer (or of layers that share their choice).

    Args:
        name: said in every error.
        cost: shape ``(K,)``, whole numbers >= 0, in any order.
        loss: shape ``(K,)``, finite, >= 0; loss[j] belongs to cost[j].

    Both are copied, unless they are read-only arrays of int64 and float64 that nobody can write.

    Raises:
        ProblemError: wrong shapes, NaN or infinite losses, negative numbers.
    """

    name: str
    cost: IntArray
    loss: FloatArray

    def __post_init__(self) -> None:
        cost = _integers(self.name, self.cost)
        try:
            loss = np.ascontiguousarray(self.loss, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ProblemError(f"group {self.name!r}: losses must be numbers: {error}") from error
        if np.ndim(self.cost) != 1 or cost.shape != loss.shape or not cost.size:
            raise ProblemError(
                f"group {self.name!r}: cost and loss must be two equally long lists of at least "
                f"one option, got shapes {cost.shape} and {loss.shape}"
            )
        if not np.isfinite(loss).all():
            worst = int(np.flatnonzero(~np.isfinite(loss))[0])
            raise ProblemError(f"group {self.name!r}: the loss of option {worst} is {loss[worst]}")
        if (loss < 0).any():
            raise ProblemError(f"group {self.name!r}: losses must not be negative")
        object.__setattr__(self, "cost", cost)
        object.__setattr__(self, "loss", _frozen(loss, self.loss))


def shared_choice(name: str, groups: Sequence[Group]) -> Group:
    """Groups that must take the same option, as one group: costs and losses add up.

    Args:
        name: of the new group.
        groups: with equally many options; option j of one goes with option j of the others.

    Raises:
        ProblemError: no groups, or different numbers of options.
    """
    sizes = [(group.name, group.cost.size) for group in groups]
    if len({size for _, size in sizes}) != 1:
        raise ProblemError(
            f"group {name!r}: a shared choice needs equally many options, got {sizes}"
        )
    _require_small(f"group {name!r}", (group.cost for group in groups))
    return Group(name, sum(group.cost for group in groups), sum(group.loss for group in groups))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, eq=False)
class SideBudget:
    """Another budget on the same choice: latency beside parameters, say.

    Args:
        name: said in every error.
        costs: one array for each group, aligned with its options; whole numbers >= 0.
        limit: largest total, an integer.

    Raises:
        ProblemError: a cost that is not a whole number >= 0, a limit that is no integer.
    """

    name: str
    costs: tuple[IntArray, ...]
    limit: int

    def __post_init__(self) -> None:
        costs = tuple(_integers(f"{k} of {self.name}", cost) for k, cost in enumerate(self.costs))
        if any(np.ndim(cost) != 1 or not np.size(cost) for cost in self.costs):
            raise ProblemError(
                f"side budget {self.name!r}: each group needs a list of at least one cost"
            )
        object.__setattr__(self, "costs", costs)
        object.__setattr__(self, "limit", _whole(f"the limit of {self.name!r}", self.limit))
        _require_small(self.name, costs)

    def cost_of(self, choice: Iterable[int]) -> int:
        """Total of a choice, in Python integers."""
        return sum(int(cost[j]) for cost, j in zip(self.costs, choice, strict=True))


def _whole(what: str, number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int | np.integer):
        raise ProblemError(f"{what} must be an integer, got {number!r}")
    return int(number)


def _require_small(what: str, costs: Iterable[IntArray]) -> None:
    if sum(int(cost.max()) for cost in costs) > LARGEST_TOTAL_COST:
        raise ProblemError(f"{what}: the costs add up to more than 2**62: use a larger unit")


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Groups, a budget for the sum of the chosen costs, and what is minimised.

    Args:
        groups: at least one; names are unique.
        budget: largest total cost, an integer.
        objective: ``"sum"`` of the losses or their ``"max"``.
        side_budgets: further budgets that the same choice must meet; not every solver takes them.

    Raises:
        ProblemError: no groups, a repeated name, a budget that is not an integer, side costs that
            do not fit the groups.
    """

    groups: tuple[Group, ...]
    budget: int
    objective: Objective = "sum"
    side_budgets: tuple[SideBudget, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        object.__setattr__(self, "side_budgets", tuple(self.side_budgets))
        if not self.groups:
            raise ProblemError("a problem needs at least one group")
        for what, names in (
            ("group", [group.name for group in self.groups]),
            ("side budget", [side.name for side in self.side_budgets]),
        ):
            if len(set(names)) != len(names):
                twice = sorted({name for name in names if names.count(name) > 1})
                raise ProblemError(f"{what} names must be unique, repeated: {', '.join(twice[:3])}")
        object.__setattr__(self, "budget", _whole("the budget", self.budget))
        if self.objective not in get_args(Objective):
            raise ProblemError(f"objective must be 'sum' or 'max', got {self.objective!r}")
        _require_small("the budget", (group.cost for group in self.groups))
        largest = [float(group.loss.max()) for group in self.groups]
        if max(largest) > np.finfo(np.float64).max / (2 * len(largest)):
            worst = self.groups[largest.index(max(largest))].name
            raise ProblemError(f"group {worst!r}: losses of {max(largest)!r} cannot be added up")
        sizes = [group.cost.size for group in self.groups]
        for side in self.side_budgets:
            given = [cost.size for cost in side.costs]
            if given != sizes:
                raise ProblemError(
                    f"side budget {side.name!r}: one cost for each option of each group is needed, "
                    f"got {given[:4]} costs for {sizes[:4]} options"
                )

    @cached_property
    def table(self) -> Table:
        """The undominated options of all groups in flat arrays; the budget plays no part."""
        return tabulate([(group.cost, group.loss) for group in self.groups])

    @cached_property
    def hulls(self) -> Hulls:
        """The lower convex hull of every group: all that the linear relaxation can see."""
        return lower_hulls(self.table)

    @cached_property
    def relaxation(self) -> Relaxation:
        """The linear relaxation of a sum, from the hulls if there are any already."""
        budget = self.table.tightened(self.budget)
        if "hulls" in self.__dict__:
            return relax(self.table, self.hulls, budget)
        return relax_near(self.table, budget)

    @cached_property
    def smallest_cost(self) -> int:
        """Cost of the cheapest choice: budgets below it are infeasible."""
        return sum(int(group.cost.min()) for group in self.groups)

    def with_budget(self, budget: int) -> "Problem":
        """The same problem under another budget; what was prepared for this one is kept."""
        other = dataclasses.replace(self, budget=budget)
        for name in ("table", "hulls", "smallest_cost"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def restricted(self, kept: Sequence[IntArray]) -> "Problem":
        """The problem with fewer options.

        Args:
            kept: for each group the indices of the options that stay, at least one.

        Raises:
            ProblemError: a group without options.
        """
        groups = tuple(
            Group(group.name, group.cost[k], group.loss[k])
            for group, k in zip(self.groups, kept, strict=True)
        )
        sides = tuple(
            dataclasses.replace(
                side, costs=tuple(c[k] for c, k in zip(side.costs, kept, strict=True))
            )
            for side in self.side_budgets
        )
        return dataclasses.replace(self, groups=groups, side_budgets=sides)

    def require_feasible(self) -> None:
        """Raise InfeasibleError when even the cheapest choice is over a budget."""
        if self.smallest_cost > self.budget:
            raise self._infeasible(self.budget, [group.cost for group in self.groups], "budget")
        for side in self.side_budgets:
            if sum(int(cost.min()) for cost in side.costs) > side.limit:
                raise self._infeasible(side.limit, side.costs, side.name)

    def _infeasible(self, limit: int, costs: Sequence[IntArray], what: str) -> InfeasibleError:
        least = [int(cost.min()) for cost in costs]
        order = sorted(range(len(least)), key=lambda g: -least[g])
        largest = tuple(self.groups[g].name for g in order[:3])
        return InfeasibleError(limit, sum(least), largest, what)

    def cost_of(self, choice: Iterable[int]) -> int:
        """Total cost of a choice, in Python integers."""
        return sum(int(g.cost[j]) for g, j in zip(self.groups, choice, strict=True))

    def keeps(self, choice: Sequence[int]) -> bool:
        """Whether a choice is within all budgets."""
        return self.cost_of(choice) <= self.budget and all(
            side.cost_of(choice) <= side.limit for side in self.side_budgets
        )

    def loss_of(self, choice: Iterable[int]) -> float:
        """Sum (correctly rounded, so independent of the order) or maximum of the losses."""
        losses = [float(g.loss[j]) for g, j in zip(self.groups, choice, strict=True)]
        return math.fsum(losses) if self.objective == "sum" else max(losses)

    def digest(self) -> str:
        """sha256 over names, options, budgets and objective."""
        digest = hashlib.sha256(f"{self.budget} {self.objective}".encode())
        for group in self.groups:
            digest.update(group.name.encode() + b"\0")
            digest.update(group.cost.tobytes() + group.loss.tobytes())
        for side in self.side_budgets:
            digest.update(f"{side.name}\0{side.limit}".encode())
            for cost in side.costs:
                digest.update(cost.tobytes())
        return digest.hexdigest()


def alone(problem: Problem, row: int) -> Problem:
    """The problem under one of its budgets: 0 is its own, i the i-th of its side budgets."""
    if row == 0:
        return dataclasses.replace(problem, side_budgets=())
    side = problem.side_budgets[row - 1]
    pairs = zip(problem.groups, side.costs, strict=True)
    groups = tuple(dataclasses.replace(group, cost=cost) for group, cost in pairs)
    return Problem(groups, side.limit, problem.objective)


def refuse_side_budgets(problem: Problem, solver: str, *, sum_only: bool = False) -> None:
    """Raise ProblemError for a solver that looks at one budget only (or at one of a sum only)."""
    if problem.side_budgets:
        names = ", ".join(side.name for side in problem.side_budgets)
        raise ProblemError(f"{solver} takes one budget, the problem has also {names}: use knapsack")
    if sum_only and problem.objective != "sum":
        raise ProblemError(f"{solver} takes the sum objective, got {problem.objective!r}")
