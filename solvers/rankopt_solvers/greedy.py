"""Greedy: over the convex hull, then fill; and the plain one, for comparison.

``greedy`` takes the hull edges in order of loss saved per unit of cost up to the first that does
not fit: the optimum of the linear relaxation (Sinha & Zoltners 1979). Walking the hull instead of
the options is what makes the jump to "dense" visible: the long edge competes with its average
slope. The rest of the budget is then spent on single options, those off the hull included, best
saving per cost first.

``density`` is what one would write first: always the next option of the group that saves most per
cost. It sees the jump only from the option before it. It is here to be compared with.
"""

import dataclasses
import heapq

import numpy as np

from rankopt_solvers.hull import Relaxation, lower_bound, relax
from rankopt_solvers.problem import Problem, refuse_side_budgets
from rankopt_solvers.solution import Solution, certify
from rankopt_solvers.table import IntArray, Table


def _best_steps(table: Table, position: IntArray, room: int) -> list[tuple[float, int, int]]:
    """The best affordable step of every row that has one: (-saved per cost, row, target)."""
    reach = table.last_affordable(table.cost[position] + room) + 1
    steps: list[tuple[float, int, int]] = []
    for first, block in table.blocks():
        a, b = first, first + block.rows
        open_rows = np.flatnonzero(reach[a:b] > position[a:b] + 1) + first
        if not open_rows.size:
            continue
        now = position[open_rows]
        options = table.between(now + 1, reach[open_rows])
        saved = options.spread(table.loss[now]) - options.loss
        density = saved / (options.cost - options.spread(table.cost[now]))
        best = np.maximum.reduceat(density, options.start[:-1])
        hits = np.flatnonzero(density == options.spread(best))
        hits = hits[np.searchsorted(hits, options.start[:-1])]
        assert options.option is not None
        targets = options.option[hits].tolist()
        steps.extend(zip((-best).tolist(), open_rows.tolist(), targets, strict=True))
    return steps


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
    table, hulls = problem.table, problem.hulls
    budget = table.tightened(problem.budget)
    relaxation = relax(table, hulls, budget)
    choice = table.options_at(filled(table, relaxation))
    if relaxation.edge is not None:
        row, target = relaxation.edge
        first = int(hulls.start[row])
        left = budget - int(table.cost[target] - table.cost[hulls.vertex[first]])
        if left >= int(table.cost[table.start[:-1]].sum()):
            slope = hulls.slope.copy()
            slope[first : int(hulls.start[row + 1])] = -1.0
            forced = relax(table, dataclasses.replace(hulls, slope=slope), left)
            forced.position[row] = target
            other = table.options_at(filled(table, forced))
            choice = min(choice, other, key=problem.loss_of)
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
