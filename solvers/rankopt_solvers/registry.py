"""Solvers by name, and ``solve``: the one entry point.

A solver is a callable ``solver(problem, **options) -> Solution`` that minimises the *sum*. The max
objective is reduced to it here: the best level is found exactly by bisection, options above it are
removed, and the solver spends the rest of the budget on the sum.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

from rankopt_solvers.maxmin import restricted, smallest_level
from rankopt_solvers.problem import Problem, refuse_side_budgets
from rankopt_solvers.solution import Solution, certify, checked_choice

Solver = Callable[..., Solution]

#: Built-in solvers: name -> "module:function", imported when first named.
SOLVERS: dict[str, str] = {
    "exact": "rankopt_solvers.exact:solve_exact",
    "greedy": "rankopt_solvers.greedy:solve_greedy",
    "density": "rankopt_solvers.greedy:solve_density",
    "knapsack": "rankopt_solvers.knapsack:solve_knapsack",
}

#: Other distributions offer solvers under this entry-point group; loaded only when named.
ENTRY_POINTS = "rankopt.solvers"


class UnknownSolverError(ValueError):
    """No solver has this name; the message lists those that exist."""


def installed_solvers() -> dict[str, str]:
    """Solvers that other distributions offer: name -> "module:function". Nothing is imported."""
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {point.name: point.value for point in found if point.name not in SOLVERS}


def is_solver_name(name: str) -> bool:
    """Whether it is a built-in, an entry point, or of the form ``module:function``."""
    return ":" in name or name in SOLVERS or name in installed_solvers()


def find_solver(solver: str | Solver) -> tuple[str, Solver]:
    """A name (or a callable) as ``(name, callable)``.

    Args:
        solver: a built-in, an entry point of group ``rankopt.solvers``, ``module:function``, or a
            callable.

    Raises:
        UnknownSolverError: no solver has this name, or what it names cannot be imported.
    """
    if callable(solver):
        return getattr(solver, "__name__", type(solver).__name__), solver
    others = {} if solver in SOLVERS else installed_solvers()
    where = SOLVERS.get(solver) or others.get(solver, solver)
    module, colon, function = where.partition(":")
    if not colon:
        known = ", ".join([*SOLVERS, *others])
        raise UnknownSolverError(
            f"unknown solver {solver!r}; known: {known}, or module:function of your own"
        )
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # whatever others do when they are imported
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnknownSolverError(f"solver {solver!r}: cannot load {where}: {why}") from error
    if not callable(found):
        raise UnknownSolverError(f"solver {solver!r}: {where} is not callable")
    return solver, found


def solve(problem: Problem, solver: str | Solver = "exact", **options: Any) -> Solution:
    """Choose one option of each group within the budget.

    Args:
        problem: groups, budgets and objective.
        solver: what find_solver takes.
        options: passed to the solver.

    Returns:
        A Solution whose cost and loss were recounted from its choice. The bound of a solver that
        is not ours is computed here: its claims are not believed.

    Raises:
        InfeasibleError: even the cheapest choice is over a budget.
        UnknownSolverError: no such solver.
        SolutionError: the solver returned something that is not a choice within the budget.
        ProblemError: side budgets, which this solver does not take.
    """
    name, call = find_solver(solver)
    problem.require_feasible()
    if problem.objective == "sum":
        found = call(problem, **options)
        if name in SOLVERS and name == solver:
            return found
        choice = _choice_of(found, name)
    else:
        refuse_side_budgets(problem, "the max objective")
        second_stage, kept = restricted(problem, smallest_level(problem))
        found = call(second_stage, **options)
        indices = checked_choice(second_stage, _choice_of(found, name), name)
        choice = tuple(int(kept[g][j]) for g, j in enumerate(indices))
    timed_out = found.status == "time_limit"
    return certify(problem, choice, name, timed_out=timed_out, stats=found.stats)


def _choice_of(found: Any, solver: str) -> tuple[int, ...]:
    if not isinstance(found, Solution):
        raise TypeError(
            f"solver {solver} returned {type(found).__name__}, not a Solution: "
            "make one from its choice with rankopt_solvers.certify"
        )
    return found.choice
