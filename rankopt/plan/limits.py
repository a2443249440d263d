"""Budgets of something else than parameters: bytes, FLOPs, and latency as it was measured.

Each is a cost of its own of every rank, in whole numbers:

``max_bytes``    bytes of the planned layers' weights, in the dtype that they were profiled in, or
                 rounded, with their scales.
``max_flops``    a product with each planned layer for one token, a multiplication and an addition
                 counting two: 2 out in if dense, 2 r (out + in) as a pair, 2 r (out + in - r) in
                 the pivoted form; of every module that shares a matrix, an embedding's look-up
                 included.
``max_latency``  microseconds of one call of each planned layer, from a table; counted in
                 nanoseconds.

Where all layers have one dtype, bytes are parameters times a number; and so are FLOPs where no
matrix is shared. The solver sees that: of such budgets the tightest counts, and is solved alone.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence

import numpy as np

from rankopt.errors import BudgetError, InfeasibleBudgetError, OptionError
from rankopt.layers import AS_IS, DENSE, Form, IntArray, Layer
from rankopt.plan.allocation import Allocation
from rankopt.plan.budget import Budget, Limit, LimitKind, whole_number
from rankopt.plan.latency import LatencyTable
from rankopt.plan.plan import PlannedLayer
from rankopt_solvers import (
    Group,
    InfeasibleError,
    NoChoiceFoundError,
    Problem,
    SideBudget,
    Solution,
    solve,
)

#: What is counted, in words.
_UNITS: dict[LimitKind, str] = {
    "max_bytes": "bytes",
    "max_flops": "FLOPs per token",
    "max_latency": "microseconds",
}
#: Plans can be read again with limits up to here.
_LARGEST = 10**18


@dataclasses.dataclass(frozen=True, eq=False)
class Cost:
    """What ranks cost of something, and the most that they may.

    Attributes:
        kind: of what.
        asked: the number given.
        allowed: the same as a whole number.
        of: what a layer takes of it at some ranks, in a form.
        table: of latencies, if it is a latency.
    """

    kind: LimitKind
    asked: float
    allowed: int
    of: Callable[[Layer, IntArray, Form, IntArray | int], IntArray]
    table: LatencyTable | None = None

    def __str__(self) -> str:
        return f"{self.kind}={self.asked:.15g}"

    def options(self, offered: Allocation) -> tuple[IntArray, ...]:
        """Of every option of every layer."""
        bits: Sequence[IntArray | int] = offered.bits or (AS_IS,) * len(offered.layers)
        options = zip(offered.layers, offered.ranks, bits, strict=True)
        return tuple(self.of(layer, ranks, offered.form, own) for layer, ranks, own in options)

    def stated(self, layers: Sequence[PlannedLayer], form: Form, price: float | None) -> Limit:
        """As a plan states it."""
        dense = np.array([DENSE], dtype=np.int64)
        return Limit(
            kind=self.kind,
            asked=self.asked,
            allowed=self.allowed,
            spent=sum(entry.spent(self.kind, form) for entry in layers),
            dense=sum(int(self.of(entry.layer, dense, form, AS_IS)[0]) for entry in layers),
            price=price,
            table=None if self.table is None else self.table.digest,
        )


def find_limits(
    max_bytes: int | None = None,
    max_flops: int | None = None,
    max_latency: float | None = None,
    latency_table: LatencyTable | str | os.PathLike[str] | None = None,
) -> tuple[Cost, ...]:
    """The limits that were asked for.

    Args:
        max_bytes: of the planned layers.
        max_flops: of the planned layers, for a token.
        max_latency: of the planned layers, in microseconds.
        latency_table: or its file.

    Raises:
        BudgetError: no number above 0, or a latency without a table, or the other way round.
        DataError: no table is there, or it is none.
    """
    found = []
    if max_bytes is not None:
        allowed = _counted("max_bytes", max_bytes)
        found.append(Cost("max_bytes", allowed, allowed, Layer.bytes_of))
    if max_flops is not None:
        allowed = _counted("max_flops", max_flops)
        found.append(Cost("max_flops", allowed, allowed, _whatever_bits(Layer.flops)))
    if (max_latency is None) != (latency_table is None):
        raise BudgetError("max_latency and latency_table belong together: give both, or neither")
    if max_latency is not None and latency_table is not None:
        number = isinstance(max_latency, int | float) and not isinstance(max_latency, bool)
        if not (number and 0.001 <= max_latency <= 1e15):
            raise BudgetError(f"max_latency is a number of microseconds, got {max_latency!r}")
        table = latency_table
        if not isinstance(table, LatencyTable):
            table = LatencyTable.load(table)
        allowed = math.floor(round(max_latency * 1000, 6))
        of = _whatever_bits(table.nanoseconds)
        found.append(Cost("max_latency", max_latency, allowed, of, table))
    return tuple(found)


def _counted(kind: LimitKind, value: object) -> int:
    number = whole_number(kind, value)
    if number > _LARGEST:
        raise BudgetError(f"{kind} is at most {_LARGEST:.0e}, got {value!r}")
    return number


def _whatever_bits(
    of: Callable[[Layer, IntArray, Form], IntArray],
) -> Callable[[Layer, IntArray, Form, IntArray | int], IntArray]:
    """A cost that rounding does not change."""
    return lambda layer, ranks, form, bits: of(layer, ranks, form)


def reached(offered: Allocation, limits: Sequence[Cost]) -> Allocation:
    """The options of which all costs are known.

    Raises:
        DataError: the table lacks a layer.
        OptionError: it does not reach the rank of a pinned layer.
    """
    for table in (limit.table for limit in limits if limit.table is not None):
        table.require(offered.layers, offered.form)
        kept = []
        for layer, ranks in zip(offered.layers, offered.ranks, strict=True):
            known = np.flatnonzero(table.known(layer, ranks, offered.form))
            if not known.size:
                raise OptionError(
                    f"layer {layer.name} is pinned to rank {ranks[0]}; {table.source} has no "
                    f"latency of a rank as large in the form {offered.form}"
                )
            kept.append(known)
        offered = offered.restricted(kept)
    return offered


def problem_under(offered: Allocation, budget: Budget, limits: Sequence[Cost]) -> Problem:
    """The problem under all budgets: its own is that of parameters, or else the first limit."""
    if budget.of_parameters:
        problem, others = offered.problem(budget.parameters), limits
    else:
        first, *others = limits
        priced = zip(offered.groups, first.options(offered), strict=True)
        groups = tuple(dataclasses.replace(group, cost=cost) for group, cost in priced)
        problem = Problem(groups, first.allowed, offered.problem(0).objective)
    if not others:
        return problem
    sides = [SideBudget(each.kind, each.options(offered), each.allowed) for each in others]
    return dataclasses.replace(problem, side_budgets=tuple(sides))


def prices_of(
    budget: Budget, limits: Sequence[Cost], solution: Solution
) -> tuple[float | None, list[float]]:
    """Of a parameter, None if no budget is of them, and of each limit."""
    found = [solution.multiplier, *solution.side_multipliers]
    return (found[0], found[1:]) if budget.of_parameters else (None, found)


def infeasible(
    problem: Problem,
    budget: Budget,
    limits: Sequence[Cost],
    error: InfeasibleError,
    offered: str,
) -> InfeasibleBudgetError:
    """The error that names the budget which cannot be met, and the least of it that can.

    Args:
        problem: that has no choice.
        budget: of it.
        limits: of it.
        error: what the solver says.
        offered: what was on offer, in words.
    """
    named = {limit.kind: limit for limit in limits}
    if budget.of_parameters:
        asked = ", ".join(map(str, (budget, *limits)))
    else:
        asked = ", ".join(map(str, limits))
    blamed, _, _ = error.what.partition(" (beside ")
    kind = budget.kind if blamed == "budget" else blamed
    least, beside, known = _least(problem, blamed, error.smallest)
    limit = named.get(kind)  # type: ignore[call-overload]
    unit = "parameters" if limit is None else _UNITS[limit.kind]
    shown = [f"{count:,}" for count in (error.budget, least)]
    if kind == "max_latency":
        shown = [f"{count / 1000:,.3f}" for count in (error.budget, least)]
    others = [budget.kind if name == "budget" else name for name in beside]
    also = f" beside {' and '.join(others)}" if others else ""
    return InfeasibleBudgetError(
        f"no ranks fit {asked}: {kind} allows the planned layers {shown[0]} {unit}; {known} with "
        f"{offered}{also} is {shown[1]}; it binds first in {', '.join(error.largest_groups)}"
    )


def _least(problem: Problem, blamed: str, smallest: int) -> tuple[int, list[str], str]:
    """The least of one budget within the others, their names, and what is known of that number."""
    rows = [("budget", tuple(group.cost for group in problem.groups), problem.budget)]
    rows += [(side.name, side.costs, side.limit) for side in problem.side_budgets]
    ((_, own, _),) = [row for row in rows if row[0] == blamed]
    others = [row for row in rows if row[0] != blamed]
    floor = [int(cost.min()) for cost in own]
    if sum(floor) >= smallest or not others:
        return smallest, [], "the smallest reachable"  # alone it cannot be met
    names = [name for name, *_ in others]
    (_, costs, allowed), *sides = others
    groups = tuple(
        Group(group.name, cost, (mine - least).astype(np.float64))
        for group, cost, mine, least in zip(problem.groups, costs, own, floor, strict=True)
    )
    within = Problem(groups, allowed, side_budgets=tuple(SideBudget(*side) for side in sides))
    try:
        found = solve(within, "knapsack" if sides else "exact")
    except (InfeasibleError, NoChoiceFoundError):
        return smallest, names, "what it takes at the least"
    least = sum(int(mine[j]) for mine, j in zip(own, found.choice, strict=True))
    proven = found.bound > found.loss - 1.0
    return least, names, "the smallest reachable" if proven else "the smallest found"
