"""Several budgets in a normal form, and the Lagrangian bound over all their options.

A budget ``sum_g c_g(j_g) <= limit`` allows the same choices as

    sum_g d_g(j_g) <= room,    d_g(j) = (c_g(j) - min c_g) / unit,
    room = (limit - sum_g min c_g) // unit,

with ``unit`` the common divisor of the differences: whole numbers >= 0, and a limit that is as
tight as they allow. Two budgets whose costs are proportional, up to a constant for each group, have
the same d: FLOPs beside parameters, say, as long as all layers see equally many tokens. Only the
one with less room counts. A budget that even the dearest options meet does not count either.

All options stay: one that is dearer and loses more than another may be the cheaper one in a side
budget. For prices ``p >= 0``, one for each budget,

    L(p) = sum_g min_j (loss_gj + sum_i p_i d_igj) - sum_i p_i room_i

is a lower bound on the loss of every choice within all budgets (Geoffrion 1974).
"""

import dataclasses
import math

import numpy as np

from rankopt_solvers.problem import LARGEST_TOTAL_COST, InfeasibleError, Problem
from rankopt_solvers.table import EPS, FloatArray, IntArray, Table

#: A lower bound, its multiplier for the budget, and those of the side budgets.
Claim = tuple[float, float, tuple[float, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Budgets:
    """All N options of G groups under the R budgets that count.

    Attributes:
        start: shape ``(G+1,)``; the options of group g are ``start[g]:start[g+1]``.
        loss: shape ``(N,)``.
        cost: d, shape ``(R, N)``.
        room: shape ``(R,)``.
        which: of each budget, its index in the problem: 0 is the budget, i the i-th side budget.
        unit: of each budget.
    """

    start: IntArray
    loss: FloatArray
    cost: IntArray
    room: IntArray
    which: tuple[int, ...]
    unit: tuple[int, ...]

    @property
    def group(self) -> IntArray:
        """The group of each option, shape ``(N,)``."""
        return np.repeat(np.arange(self.start.size - 1), np.diff(self.start))

    def left(self, position: IntArray) -> IntArray:
        """What a choice leaves of each budget; shape ``(R,)``, negative where it is over."""
        return np.asarray(self.room - self.cost[:, position].sum(axis=1))

    def keep(self, kept: IntArray) -> "Budgets":
        """With the options at some positions, sorted; at least one of each group."""
        start = np.searchsorted(kept, self.start).astype(np.int64)
        return dataclasses.replace(self, start=start, loss=self.loss[kept], cost=self.cost[:, kept])


def _tables(problem: Problem) -> list[tuple[str, tuple[IntArray, ...], int]]:
    """Name, costs and limit of every budget; the problem's own comes first."""
    own = ("budget", tuple(group.cost for group in problem.groups), problem.budget)
    return [own, *((side.name, side.costs, side.limit) for side in problem.side_budgets)]


def normal_form(problem: Problem) -> Budgets:
    """The budgets that count: proportional ones, and ones that cannot be exceeded, are left out.

    Raises:
        InfeasibleError: one of the budgets is below its own cheapest choice.
    """
    problem.require_feasible()
    sizes = [group.cost.size for group in problem.groups]
    start = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    found: list[tuple[IntArray, int, int, int]] = []
    for index, (_, costs, limit) in enumerate(_tables(problem)):
        cost = np.concatenate(costs)
        least = np.minimum.reduceat(cost, start[:-1])
        cost = cost - np.repeat(least, sizes)
        unit = int(np.gcd.reduce(cost))
        if unit == 0:
            continue
        cost //= unit
        room = (limit - int(least.sum())) // unit
        if room >= int(np.maximum.reduceat(cost, start[:-1]).sum()):
            continue
        twin = next((k for k, row in enumerate(found) if np.array_equal(row[0], cost)), None)
        if twin is None:
            found.append((cost, room, index, unit))
        elif room < found[twin][1]:
            found[twin] = (cost, room, index, unit)
    return Budgets(
        start,
        np.concatenate([group.loss for group in problem.groups]),
        np.array([cost for cost, *_ in found], dtype=np.int64).reshape(len(found), int(start[-1])),
        np.array([room for _, room, *_ in found], dtype=np.int64),
        tuple(index for *_, index, _ in found),
        tuple(unit for *_, unit in found),
    )


def of_table(table: Table, budget: int) -> Budgets:
    """One budget over undominated options."""
    least = table.cost[table.start[:-1]]
    unit = max(table.divisor, 1)
    room = min((budget - int(least.sum())) // unit, LARGEST_TOTAL_COST)
    cost = (table.cost - np.repeat(least, np.diff(table.start))) // unit
    return Budgets(table.start, table.loss, cost[None], np.array([room]), (0,), (unit,))


@dataclasses.dataclass(frozen=True, eq=False)
class Priced:
    """The Lagrangian function at some prices.

    Attributes:
        price: p, shape ``(R,)``.
        position: the best option of each group, shape ``(G,)``.
        reduced: how much worse each option is than its group's best, shape ``(N,)``.
        least: what the best options lose and cost at these prices, added up.
        bound: L(p), rounded down.
    """

    price: FloatArray
    position: IntArray
    reduced: FloatArray
    least: float
    bound: float


@np.errstate(over="ignore")  # what overflows is too dear for any choice
def priced(budgets: Budgets, price: FloatArray) -> Priced:
    """Evaluate the Lagrangian function on all options."""
    total = budgets.loss.copy()
    for p, cost in zip(price.tolist(), budgets.cost, strict=True):
        if p:
            total += p * cost
    starts, sizes = budgets.start[:-1], np.diff(budgets.start)
    least = np.minimum.reduceat(total, starts)
    total -= np.repeat(least, sizes)
    best = np.flatnonzero(total == 0.0)
    position = best[np.searchsorted(best, starts)]
    sum_least, spent = _sum(least), _sum(price * budgets.room)
    bound = sum_least - spent - (len(price) + 3) * EPS * (sum_least + spent)
    return Priced(price, position, total, sum_least, -math.inf if math.isnan(bound) else bound)


def _sum(values: FloatArray) -> float:
    try:
        return math.fsum(values.tolist())
    except OverflowError:
        return math.inf


def claim(problem: Problem, budgets: Budgets, at: Priced) -> Claim:
    """What the prices prove about the problem, in its own units: as ``verify`` counts it.

    Budgets are rounded down to what the costs can add up to.
    """
    tables, units = _tables(problem), np.array(budgets.unit, dtype=np.float64)
    lams, spent = [0.0] * len(tables), []
    if not np.allclose(at.price / units * units, at.price, rtol=EPS, atol=0.0):
        # A price of less than the smallest numbers cannot be said.
        at = priced(budgets, at.price / units * units)
    for p, which, unit, room in zip(
        at.price.tolist(), budgets.which, budgets.unit, budgets.room.tolist(), strict=True
    ):
        lams[which] = p / unit
        spent.append(p * room)
    rounding = (len(tables) + 3) * EPS * (at.least + math.fsum(spent))
    bound = math.fsum([at.least, *(-x for x in spent), -rounding])
    floor = math.fsum(float(group.loss.min()) for group in problem.groups)
    return max(bound, floor), lams[0], tuple(lams[1:])


def infeasible(problem: Problem, budgets: Budgets, row: int, needed: int) -> InfeasibleError:
    """The error that says how much of one budget is needed beside the others.

    Args:
        problem: that has no choice.
        budgets: of it.
        row: the budget to blame.
        needed: least total of its d within the others, more than its room.
    """
    tables = _tables(problem)
    name, costs, limit = tables[budgets.which[row]]
    least = [int(cost.min()) for cost in costs]
    others = [tables[which][0] for k, which in enumerate(budgets.which) if k != row]
    order = sorted(range(len(least)), key=lambda g: -least[g])
    return InfeasibleError(
        limit,
        sum(least) + needed * budgets.unit[row],
        tuple(problem.groups[g].name for g in order[:3]),
        f"{name} (beside {', '.join(others)})",
    )
