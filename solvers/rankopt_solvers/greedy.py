"""Greedy: over the convex hull, then fill; and the plain one, for comparison.

``greedy`` takes the hull edges in order of loss saved per unit of cost up to the first that does
not fit: the optimum of the linear relaxation (Sinha & Zoltners 1979). Walking the hull instead of
the options is what makes the jump to "dense" visible: the long edge competes with its average
slope. The rest of the budget is then spent on single options, those off the hull included, best
saving per cost first.

``density`` is what one would write first: always the next option of the group that saves most per
cost. It sees the jump only from the option before it. It is here to be compared with.
"""

import heapq

import numpy as np

from rankopt_solvers.hull import Relaxation, lower_bound, relax_near
from rankopt_solvers.problem import Problem, refuse_side_budgets
from rankopt_solvers.solution import Solution, certify
from rankopt_solvers.table import IntArray, Table, ranges


def _best_steps(table: Table, position: IntArray, room: int) -> list[tuple[float, int, int]]:
    """The best affordable step of every row that has one: (-saved per cost, row, target)."""
    reach = table.last_affordable(table.cost[position] + room) + 1
    rows = np.flatnonzero(reach > position + 1)
    if not rows.size:
        return []
    now = position[rows]
    start, first, end = table.runs_between(now + 1, reach[rows])
    size = np.diff(start)
    here, spent = (
        np.repeat(table.loss[now], size),
        table.cost[first] - np.repeat(table.cost[now], size),
    )
    # No option of a run does better than its last loss at its first cost, and one does this well.
    least = np.maximum.reduceat((here - table.loss[first]) / spent, start[:-1])
    near = (here - table.loss[end - 1]) / spent >= np.repeat(least, size)
    options = table.at(ranges(first[near], end[near]))
    assert options.option is not None
    begin = np.searchsorted(options.option, now)
    size = np.diff(begin, append=options.option.size)
    saved = np.repeat(table.loss[now], size) - options.loss
    density = saved / (options.cost - np.repeat(table.cost[now], size))
    best = np.maximum.reduceat(density, begin)
    hits = np.flatnonzero(density == np.repeat(best, size))
    targets = options.option[hits[np.searchsorted(hits, begin)]]
    return list(zip((-best).tolist(), rows.tolist(), targets.tolist(), strict=True))


def _best_step(table: Table, row: int, now: int, room: int) -> tuple[float, int, int] | None:
    """As _best_steps, for one row at position ``now``."""
    end = int(table.start[row + 1])
    limit = table.cost[now] + room
    reach = now + 1 + int(np.searchsorted(table.cost[now + 1 : end], limit, "right"))
    if reach == now + 1:
        return None
    saved = table.loss[now] - table.loss[now + 1 : reach]
    density = saved / (table.cost[now + 1 : reach] - table.cost[now])
    best = int(np.argmax(density))
    return -float(density[best]), row, now + 1 + best


def fill(table: Table, position: IntArray, room: int) -> None:
    """Spend the room that the positions leave, in place, one best step at a time."""
    if room <= 0:
        return
    heap = _best_steps(table, position, room)
    heapq.heapify(heap)
    while heap:
        _, row, target = heapq.heappop(heap)
        extra = int(table.cost[target] - table.cost[position[row]])
        if extra <= room:
            position[row] = target
            room -= extra
        step = _best_step(table, row, int(position[row]), room)
        if step is not None:
            heapq.heappush(heap, step)


def filled(table: Table, relaxation: Relaxation) -> IntArray:
    """The positions of the relaxation, with what they leave spent."""
    position = relaxation.position.copy()
    fill(table, position, relaxation.room)
    return position


def solve_greedy(problem: Problem) -> Solution:
    """Solve a sum problem greedily; the gap in the solution says how far off it can be.

    Two walks are compared: one stops at the first edge that does not fit, one takes that edge
    before all others. With a long edge to dense at the break, either can be the better one.

    Raises:
        InfeasibleError: even the cheapest choice is over the budget.
        ProblemError: the problem has side budgets.
    """
    refuse_side_budgets(problem, "greedy")
    problem.require_feasible()
    table, relaxation = problem.table, problem.relaxation
    budget = table.tightened(problem.budget)
    choice = table.options_at(filled(table, relaxation))
    if relaxation.edge is not None:
        row, target = relaxation.edge
        low, high = table.start[:-1].copy(), table.start[1:].copy()
        low[row], high[row] = target, target + 1
        if int(table.cost[low].sum()) <= budget:
            part = table.between(low, high)
            forced = relax_near(part, budget)
            assert part.option is not None
            position = part.option[forced.position]
            fill(table, position, forced.room)
            choice = min(choice, table.options_at(position), key=problem.loss_of)
    bound = (lower_bound(table, relaxation), relaxation.multiplier)
    return certify(problem, choice, "greedy", bound=bound)


def solve_density(problem: Problem) -> Solution:
    """Plain density greedy: no hull, one option at a time. For comparison.

    Raises:
        InfeasibleError: even the cheapest choice is over the budget.
        ProblemError: the problem has side budgets.
    """
    refuse_side_budgets(problem, "density")
    problem.require_feasible()
    table = problem.table
    extra, saved = np.diff(table.cost), -np.diff(table.loss)
    position, end = table.start[:-1].tolist(), (table.start[1:] - 1).tolist()
    room = table.tightened(problem.budget) - int(table.cost[table.start[:-1]].sum())
    heap = [(-float(saved[p] / extra[p]), g) for g, p in enumerate(position) if p < end[g]]
    heapq.heapify(heap)
    while heap:
        _, g = heapq.heappop(heap)
        now = position[g]
        if extra[now] > room:
            continue
        room -= int(extra[now])
        position[g] = now = now + 1
        if now < end[g]:
            heapq.heappush(heap, (-float(saved[now] / extra[now]), g))
    return certify(problem, table.options_at(np.array(position)), "density")
