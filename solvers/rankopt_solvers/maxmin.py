"""Max-min fairness: the smallest attainable maximum of the losses, by bisection.

The cost of "every group loses at most t" only changes where t passes a loss that some option has.
The bisection snaps to such levels and ends with a proof: the level found fits the budget, the next
smaller attainable one does not. With loss = share of a layer that is *not* retained this is
max-min retained Fisher information; it gives the same choice as one retained share for all layers,
bisected to the budget.
"""

import dataclasses

import numpy as np

from rankopt_solvers.problem import Problem
from rankopt_solvers.table import IntArray, Table


def _within(table: Table, level: float, budget: int) -> IntArray | None:
    """The cheapest positions that all lose at most level; None if there are none in the budget."""
    position = table.first_within(level)
    if (position == table.start[1:]).any() or int(table.cost[position].sum()) > budget:
        return None
    return position


def choice_within(problem: Problem, level: float) -> tuple[int, ...] | None:
    """The cheapest choice in which every group loses at most level; None if over the budget."""
    position = _within(problem.table, level, problem.budget)
    return None if position is None else problem.table.options_at(position)


def smallest_level(problem: Problem) -> float:
    """The optimum of the max objective, exactly.

    Raises:
        InfeasibleError: even the cheapest choice is over the budget.
    """
    problem.require_feasible()
    table, budget = problem.table, problem.budget
    low = float(table.loss[table.start[1:] - 1].max())
    if _within(table, low, budget) is not None:
        return low
    # `low` never fits; `high` always does, and some option attains it.
    high = float(table.loss[table.start[:-1]].max())
    while True:
        position = table.first_within(high)
        below = np.where(table.loss[position] == high, position + 1, position)
        if (below == table.start[1:]).any() or int(table.cost[below].sum()) > budget:
            return high
        high = float(table.loss[below].max())
        middle = low + (high - low) / 2
        found = _within(table, middle, budget)
        if found is None:
            low = middle
        else:
            high = float(table.loss[found].max())


def restricted(problem: Problem, level: float) -> tuple[Problem, list[IntArray]]:
    """The sum problem whose options all lose at most level, and its options' original indices.

    This is the second stage: among all choices with the best maximum, the one with the best sum.
    """
    kept = [np.flatnonzero(group.loss <= level) for group in problem.groups]
    return dataclasses.replace(problem.restricted(kept), objective="sum"), kept
