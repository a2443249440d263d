"""A check of a solution that shares no code with the solvers.

Costs are added in Python integers and losses from the groups' own tables. The bound of a sum must
be proven by the Lagrangian function at the solution's own multipliers or at zero, or by its proof
by cases; the bound of a max must be a level below which no choice fits the budget.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import get_args

import numpy as np

from rankopt_solvers.problem import Problem
from rankopt_solvers.solution import Proof, Solution, SolutionError, Status, checked_choice

#: Relative rounding allowed to claims about sums of losses.
TOLERANCE = 1e-12

#: Partial choices the checker enumerates for one case before it gives up.
MOST_PARTIAL_CHOICES = 20_000_000


@np.errstate(over="ignore")  # what overflows is too dear for any choice
def verify(problem: Problem, solution: Solution) -> None:
    """Check a solution's claims without any of the solvers' code.

    Raises:
        SolutionError: naming the first claim that does not hold.
    """
    indices = checked_choice(problem, solution.choice, solution.solver)
    options = list(zip(problem.groups, indices, strict=True))
    cost = sum(int(group.cost[j]) for group, j in options)
    losses = [float(group.loss[j]) for group, j in options]
    loss = math.fsum(losses) if problem.objective == "sum" else max(losses)
    if cost != solution.cost or cost > problem.budget:
        raise SolutionError(f"cost is {cost:,}; claimed {solution.cost:,} of {problem.budget:,}")
    for side in problem.side_budgets:
        spent = sum(int(costs[j]) for costs, j in zip(side.costs, indices, strict=True))
        if spent > side.limit:
            raise SolutionError(f"{side.name!r} is {spent:,}; the limit is {side.limit:,}")
    if not math.isclose(loss, solution.loss, rel_tol=TOLERANCE):
        raise SolutionError(f"loss is {loss!r}; claimed {solution.loss!r}")
    if not solution.bound <= solution.loss:
        raise SolutionError(f"bound {solution.bound!r} lies above the loss {solution.loss!r}")
    if solution.status not in get_args(Status):
        known = ", ".join(get_args(Status))
        raise SolutionError(f"the status is {solution.status!r}, not one of {known}")
    if solution.status == "optimal" and solution.gap != 0.0:
        raise SolutionError(f"claimed optimal with a gap of {solution.gap:.3g}")
    if problem.objective == "max":
        proven = _proven_max(problem, solution.bound)
    else:
        proven = _proven_sum(problem, solution.multiplier, solution.side_multipliers)
    # A product with a price is rounded to a multiple of the smallest number, at the least.
    smallest = math.ulp(0.0) * 4 * len(problem.groups) * (1 + len(problem.side_budgets))
    slack = TOLERANCE * max(proven, solution.loss) + smallest
    if solution.bound <= proven + slack:
        return
    if problem.objective == "max" or solution.proof is None:
        raise SolutionError(f"bound {solution.bound!r} is not proven: only {proven!r} is")
    if solution.proof.budget is None:
        _enumerate(problem, solution, proven, solution.bound - slack)
        return
    # What no choice can do within one budget alone, none can do within the others too.
    one, paid = _kept_one(problem, solution)
    _check_proof(one, solution.proof, solution.bound - slack + paid)


def _kept_one(problem: Problem, solution: Solution) -> tuple[Problem, float]:
    """The problem under the proof's budget, the others priced; and what their limits are worth."""
    row, tables = None if solution.proof is None else solution.proof.budget, _tables(problem)
    if row is None or not 0 <= row < len(tables):
        raise SolutionError(f"the proof is of budget {row}: there are {len(tables)}")
    losses, paid = [group.loss for group in problem.groups], [0.0]
    lams = (solution.multiplier, *solution.side_multipliers)
    for which, (costs, limit) in enumerate(tables):
        if which == row or not which < len(lams) or not lams[which]:
            continue
        lam, least = lams[which], [int(cost.min()) for cost in costs]
        losses = [
            loss + lam * (cost - low) for loss, cost, low in zip(losses, costs, least, strict=True)
        ]
        paid.append(lam * (_usable(costs, limit) - sum(least)))
    kept, limit = tables[row]
    groups = tuple(
        dataclasses.replace(group, cost=cost, loss=loss)
        for group, cost, loss in zip(problem.groups, kept, losses, strict=True)
    )
    return Problem(groups, limit), math.fsum(paid)


def _tables(problem: Problem) -> list[tuple[list[np.ndarray], int]]:
    """Costs and limit of every budget, the problem's own first."""
    own = ([group.cost for group in problem.groups], problem.budget)
    return [own, *((list(side.costs), side.limit) for side in problem.side_budgets)]


def _enumerate(problem: Problem, solution: Solution, floor: float, bound: float) -> None:
    """Raise SolutionError if a choice within all budgets loses less than ``bound``.

    Args:
        problem: of a sum.
        solution: its multipliers exclude most choices.
        floor: what these prove.
        bound: to be proven.
    """
    tables = _tables(problem)
    room = bound - floor + TOLERANCE * (abs(bound) + abs(floor))
    kept, excess = [], []
    for g, group in enumerate(problem.groups):
        priced = group.loss.copy()
        lams = (solution.multiplier, *solution.side_multipliers)
        for (costs, _), lam in zip(tables, lams, strict=False):
            priced += lam * (costs[g] - costs[g].min())
        above = priced - priced.min()
        kept.append(np.flatnonzero(above <= room + TOLERANCE * float(priced.max())))
        excess.append(above)
    order = sorted(range(len(kept)), key=lambda g: kept[g].size)
    totals = [0] * len(tables)
    for g in order:
        for row, (costs, _) in enumerate(tables):
            totals[row] += int(costs[g][kept[g]].min())
    # Of partial choices: what each spends above the least, loses, and exceeds.
    over = [np.zeros(1, dtype=np.int64) for _ in tables]
    loss, above, looked_at = np.zeros(1), np.zeros(1), 0
    rounding = TOLERANCE * sum(float(group.loss.max()) for group in problem.groups)
    for g in order:
        looked_at += loss.size * kept[g].size
        if looked_at > MOST_PARTIAL_CHOICES:
            raise SolutionError("the proof needs too much enumeration to be checked")
        higher = (above[:, None] + excess[g][kept[g]]).ravel()
        fits = higher <= room + rounding
        for row, (costs, limit) in enumerate(tables):
            extra = costs[g][kept[g]] - costs[g][kept[g]].min()
            over[row] = (over[row][:, None] + extra).ravel()
            fits &= over[row] <= limit - totals[row]
        above, over = higher[fits], [spent[fits] for spent in over]
        loss = (loss[:, None] + problem.groups[g].loss[kept[g]]).ravel()[fits]
    if loss.size and float(loss.min()) < bound:
        raise SolutionError(f"a choice within all budgets loses {float(loss.min())!r}")


def _undominated(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Mask of the options that no option of the same group beats; of equal ones, the first."""
    order = sorted(range(cost.size), key=lambda j: (cost[j], loss[j], j))
    best, mask = math.inf, np.zeros(cost.size, dtype=bool)
    for j in order:
        if loss[j] < best:
            best, mask[j] = loss[j], True
    return mask


def _usable_budget(problem: Problem) -> int:
    """The largest total that a choice of undominated options can cost within the budget."""
    costs = [group.cost[_undominated(group.cost, group.loss)] for group in problem.groups]
    return _usable(costs, problem.budget)


def _usable(costs: Sequence[np.ndarray], limit: int) -> int:
    """The largest total within the limit that a choice of options with these costs can have."""
    step, start = 0, 0
    for cost in costs:
        least = int(cost.min())
        start += least
        step = math.gcd(step, *{int(extra) for extra in np.unique(cost - least)})
    return start + (limit - start) // step * step if step else start


def _proven_sum(problem: Problem, lam: float, side_lams: tuple[float, ...]) -> float:
    lams = (lam, *side_lams)
    if not all(math.isfinite(x) and x >= 0 for x in lams):
        raise SolutionError(f"multipliers must be finite numbers >= 0, got {lams!r}")
    if side_lams and len(side_lams) != len(problem.side_budgets):
        raise SolutionError(f"{len(side_lams)} multipliers for {len(problem.side_budgets)} sides")
    # A dominated option may be the cheaper one in a side budget: then all options count.
    costs = [group.cost for group in problem.groups]
    usable = _usable(costs, problem.budget) if any(side_lams) else _usable_budget(problem)
    least, unpriced = [], []
    for g, group in enumerate(problem.groups):
        # Relative to the cheapest option, the prices cancel less.
        priced = group.loss + lam * (group.cost - group.cost.min())
        for side, price in zip(problem.side_budgets, side_lams, strict=False):
            priced = priced + price * (side.costs[g] - side.costs[g].min())
        least.append(float(priced.min()))
        unpriced.append(float(group.loss.min()))
    cheapest = sum(int(group.cost.min()) for group in problem.groups)
    rest = [-lam * (usable - cheapest)]
    for side, price in zip(problem.side_budgets, side_lams, strict=False):
        rest.append(
            -price * (_usable(side.costs, side.limit) - sum(int(c.min()) for c in side.costs))
        )
    return max(math.fsum(unpriced), math.fsum([*least, *rest]))


def _proven_max(problem: Problem, bound: float) -> float:
    spent = 0
    for group in problem.groups:
        below = group.cost[group.loss < bound]
        if not below.size:
            return bound
        spent += int(below.min())
    return bound if spent > problem.budget else 0.0


@dataclasses.dataclass
class _Row:
    """The options of a group that a case leaves: sorted by cost."""

    cost: np.ndarray
    loss: np.ndarray


def _check_proof(problem: Problem, proof: Proof, bound: float) -> None:
    """Raise SolutionError unless no choice within the budget loses less than ``bound``."""
    lams = [proof.multiplier, *(case.multiplier for case in proof.cases)]
    if not all(math.isfinite(lam) and lam >= 0 for lam in lams):
        raise SolutionError("the multipliers of the proof must be finite numbers >= 0")
    budget = _usable_budget(problem)
    rows, names = [], []
    for group in problem.groups:
        mask = _undominated(group.cost, group.loss)
        order = np.argsort(group.cost[mask], kind="stable")
        row = _Row(group.cost[mask][order], group.loss[mask][order])
        rows.append(row)
        names.append((row.cost.tobytes(), row.loss.tobytes()))
    twins: dict[tuple[bytes, bytes], list[int]] = {}
    for g, name in enumerate(names):
        twins.setdefault(name, []).append(g)
    rows = _reduced(rows, budget, proof.multiplier, bound)
    low = [0 if not row.cost.size else int(row.cost.min()) for row in rows]
    high = [0 if not row.cost.size else int(row.cost.max()) + 1 for row in rows]
    stack = [(0, low, high)]
    while stack:
        index, low, high = stack.pop()
        if not 0 <= index < len(proof.cases):
            raise SolutionError(f"the proof has no case {index}")
        case = proof.cases[index]
        if case.group < 0:
            inside = [
                _Row(row.cost[keep], row.loss[keep])
                for row, a, b in zip(rows, low, high, strict=True)
                for keep in [(row.cost >= a) & (row.cost < b)]
            ]
            _check_leaf(inside, budget, case.multiplier, bound, index)
            continue
        if case.group >= len(rows):
            raise SolutionError(f"case {index} of the proof splits group {case.group}: no such")
        if min(case.below, case.above) <= index:
            raise SolutionError(f"case {index} of the proof comes after its own cases")
        below, above = list(high), list(low)
        for twin in twins[names[case.group]]:
            # Twins are sorted by cost: those before cost no more, those after no less.
            if twin <= case.group:
                below[twin] = min(below[twin], case.cost)
            if twin >= case.group:
                above[twin] = max(above[twin], case.cost)
        stack += [(case.below, low, below), (case.above, above, high)]


def _reduced(rows: list[_Row], budget: int, lam: float, bound: float) -> list[_Row]:
    """The options that a choice which loses less than the bound can have."""
    excess, floor = _excess(rows, budget, lam)
    return [
        _Row(row.cost[keep], row.loss[keep])
        for row, extra in zip(rows, excess, strict=True)
        for keep in [extra <= bound - floor + TOLERANCE * max(bound, bound - floor)]
    ]


def _excess(rows: list[_Row], budget: int, lam: float) -> tuple[list[np.ndarray], float]:
    """How far each option's price is above its row's least, and the Lagrangian function."""
    base = sum(int(row.cost.min()) for row in rows)
    excess, least = [], []
    for row in rows:
        # Around the best option, where precision matters, prices are differences to it.
        rough = row.loss + lam * (row.cost - row.cost.min())
        best = int(np.argmin(rough))
        extra = (row.loss - row.loss[best]) + lam * (row.cost - row.cost[best])
        excess.append(extra - min(float(extra.min()), 0.0))
        least.append(float(row.loss[best]) + min(float(extra.min()), 0.0))
        base += int(row.cost[best] - row.cost.min())
    unspent = lam * (budget - base)
    if not math.isfinite(unspent):
        raise SolutionError(f"the multiplier {lam!r} of the proof is too large to be evaluated")
    return excess, math.fsum([*least, -unspent])


def _check_leaf(rows: list[_Row], budget: int, lam: float, bound: float, index: int) -> None:
    if any(not row.cost.size for row in rows):
        return
    if sum(int(row.cost.min()) for row in rows) > budget:
        return
    excess, floor = _excess(rows, budget, lam)
    if floor >= bound:
        return
    cheaper = _cheapest_below(rows, excess, budget, lam, bound - floor)
    if cheaper is None:
        raise SolutionError(f"case {index} of the proof needs too much enumeration to be checked")
    if cheaper < bound:
        raise SolutionError(f"case {index} of the proof holds a choice that loses {cheaper!r}")


def _cheapest_below(
    rows: list[_Row], excess: list[np.ndarray], budget: int, lam: float, room: float
) -> float | None:
    """The least loss of a choice whose excess is at most room; inf if there is none."""
    slack = room + TOLERANCE * abs(room)
    while True:
        kept = [np.flatnonzero(extra <= slack) for extra in excess]
        if any(not k.size for k in kept):
            return math.inf
        cheapest = sum(int(row.cost[k[0]]) for row, k in zip(rows, kept, strict=True))
        step = 0
        for row, k in zip(rows, kept, strict=True):
            step = math.gcd(step, *(int(c) for c in row.cost[k] - row.cost[k[0]]))
        # What the common step of the costs leaves unspent has to be paid for.
        left_over = (budget - cheapest) % step if step else budget - cheapest
        if left_over < 0:
            return math.inf
        tighter = room + TOLERANCE * abs(room) - lam * left_over
        if tighter < 0:
            return math.inf
        if all((extra[k] <= tighter).all() for extra, k in zip(excess, kept, strict=True)):
            break
        slack = tighter
    order = sorted(range(len(rows)), key=lambda g: sorted(excess[g][kept[g]].tolist())[1:2])
    least = [int(row.cost[k].min()) for row, k in zip(rows, kept, strict=True)]
    most = [int(row.cost[k].max()) for row, k in zip(rows, kept, strict=True)]
    limit = min(budget, sum(most))
    # Partial choices of the first rows and of the last ones; each side's other rows, summed up.
    sides = [_Partial(np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)) for _ in range(2)]
    other_least, other_most = [sum(least)] * 2, [sum(most)] * 2
    looked_at = 0
    while order:
        side = 0 if sides[0].cost.size <= sides[1].cost.size else 1
        g = order.pop(-side)
        other_least[side] -= least[g]
        other_most[side] -= most[g]
        looked_at += sides[side].cost.size * kept[g].size
        if looked_at > MOST_PARTIAL_CHOICES:
            return None
        longer = []
        for j in kept[g].tolist():
            cost = sides[side].cost + int(rows[g].cost[j])
            above = sides[side].excess + float(excess[g][j])
            unspent = np.maximum(limit - cost - other_most[side], 0)
            fits = (cost + other_least[side] <= limit) & (
                above + lam * unspent <= slack + lam * left_over
            )
            loss = sides[side].loss[fits] + float(rows[g].loss[j])
            longer.append(_Partial(cost[fits], loss, above[fits]))
        sides[side] = _front(longer)
    # Of the one side the dearest that fits with a partial choice of the other loses least.
    partner = np.searchsorted(sides[1].cost, limit - sides[0].cost, side="right") - 1
    fits = partner >= 0
    return float((sides[0].loss[fits] + sides[1].loss[partner[fits]]).min(initial=math.inf))


@dataclasses.dataclass
class _Partial:
    """Partial choices: what they cost, lose, and are above their rows' least prices."""

    cost: np.ndarray
    loss: np.ndarray
    excess: np.ndarray


def _front(parts: list[_Partial]) -> _Partial:
    """Sorted by cost, without those that cost more and lose no less than another."""
    cost = np.concatenate([part.cost for part in parts])
    loss = np.concatenate([part.loss for part in parts])
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    kept = order[np.append(True, loss[order][1:] < best[:-1])[: order.size]]
    return _Partial(cost[kept], loss[kept], np.concatenate([part.excess for part in parts])[kept])
