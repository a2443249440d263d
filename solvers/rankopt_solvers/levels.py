"""Two stages: a level that every group keeps, then the best sum within it.

Max-min alone wastes the sum, and the sum alone starves small groups. First a level that every group
must keep (given, or the best attainable, see maxmin), then the best sum within it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rankopt_solvers.maxmin import smallest_level
from rankopt_solvers.problem import Group, Problem, ProblemError, refuse_side_budgets
from rankopt_solvers.registry import solve
from rankopt_solvers.solution import Solution, certify
from rankopt_solvers.table import FloatArray, IntArray


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
) -> Solution:
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
