"""Max-min fairness: the smallest attainable maximum of the losses, by bisection; and two stages.

The cost of "every group loses at most t" only changes where t passes a loss that some option has.
The bisection snaps to such levels and ends with a proof: the level found fits the budget, the next
smaller attainable one does not. With loss = share of a layer that is *not* retained this is
max-min retained Fisher information; it gives the same choice as one retained share for all layers,
bisected to the budget.

Max-min alone wastes the sum, and the sum alone starves small layers. In two stages: first a level
that every group must keep (given, or the best attainable), then the best sum within it.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rankopt_solvers.problem import Group, Problem, ProblemError, refuse_side_budgets
from rankopt_solvers.table import FloatArray, IntArray, Table

if TYPE_CHECKING:
    from rankopt_solvers.solution import Solution


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


def within_level(
    problem: Problem,
    level: float | None = None,
    measure: Sequence[FloatArray] | None = None,
) -> tuple[Problem, list[IntArray], float]:
    """The options that keep a level, for a second stage.

    Args:
        problem: a sum problem.
        level: largest measure that any group may have; the smallest attainable if not given.
        measure: what the level limits, one array for each group, aligned with its options; the
            losses if not given. The losses may be nats and the measure shares, say.

    Returns:
        The problem with these options, their original indices, and the level.

    Raises:
        InfeasibleError: even the cheapest choice is over the budget.
        ProblemError: a group has no option within the level, or the problem is not a plain sum.
    """
    refuse_side_budgets(problem, "a level", sum_only=True)
    problem.require_feasible()
    measures = [group.loss for group in problem.groups] if measure is None else list(measure)
    given = [len(values) for values in measures]
    if given != (wanted := [group.loss.size for group in problem.groups]):
        raise ProblemError(
            f"the measure needs one number for each option of each group: got {given[:4]}, "
            f"wanted {wanted[:4]}"
        )
    if level is None:
        fair = tuple(
            Group(group.name, group.cost, values)
            for group, values in zip(problem.groups, measures, strict=True)
        )
        level = smallest_level(Problem(fair, problem.budget, "max"))
    kept = [np.flatnonzero(values <= level) for values in measures]
    for group, indices in zip(problem.groups, kept, strict=True):
        if not indices.size:
            raise ProblemError(f"group {group.name!r} has no option within the level {level}")
    return problem.restricted(kept), kept, level


def solve_with_level(
    problem: Problem,
    level: float | None = None,
    *,
    measure: Sequence[FloatArray] | None = None,
    solver: str = "exact",
    **options: Any,
) -> "Solution":
    """Two stages: no group above a level, then the best sum.

    Args:
        problem: a sum problem.
        level: as in within_level.
        measure: as in within_level.
        solver: of the second stage.
        options: passed to it.

    Returns:
        A solution of the problem as given: its bound is that of the sum without the level.
        ``stats["level"]`` is the level, ``stats["level_bound"]`` the bound within it,
        ``stats["level_status"]`` is ``optimal`` if no choice that keeps the level loses less.

    Raises:
        InfeasibleError: no choice within the budget keeps the level; ``smallest`` is what would.
        ProblemError: as within_level.
    """
    from rankopt_solvers.registry import solve
    from rankopt_solvers.solution import certify

    second, kept, level = within_level(problem, level, measure)
    found = solve(second, solver, **options)
    choice = [int(k[j]) for k, j in zip(kept, found.choice, strict=True)]
    stats = {
        **found.stats,
        "level": level,
        "level_bound": found.bound,
        "level_status": found.status,
    }
    timed_out = found.status == "time_limit"
    return certify(problem, choice, found.solver, timed_out=timed_out, stats=stats)
