"""Solvers by name, and ``solve``: the one entry point.

A solver is a callable ``solver(problem, **options) -> Solution`` that minimises the *sum*. The max
objective is reduced to it here: the best level is found exactly by bisection, options above it are
removed, and the solver spends the rest of the budget on the sum.
"""

import importlib
from collections.abc import Callable
from typing import Any

from rankopt_solvers.maxmin import restricted, smallest_level
from rankopt_solvers.problem import Problem
from rankopt_solvers.solution import Solution, certify, checked_choice

Solver = Callable[..., Solution]

#: Built-in solvers: name -> "module:function", imported when first named.
SOLVERS: dict[str, str] = {
    "greedy": "rankopt_solvers.greedy:solve_greedy",
    "knapsack": "rankopt_solvers.knapsack:solve_knapsack",
}


class UnknownSolverError(ValueError):
    """No solver has this name; the message lists those that exist."""


def find_solver(solver: str | Solver) -> tuple[str, Solver]:
    """A name (or a callable) as ``(name, callable)``.

    Raises:
        UnknownSolverError: no built-in has this name.
    """
    if callable(solver):
        return getattr(solver, "__name__", type(solver).__name__), solver
    if solver not in SOLVERS:
        raise UnknownSolverError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    module, function = SOLVERS[solver].split(":")
    found: Solver = getattr(importlib.import_module(module), function)
    return solver, found


def solve(problem: Problem, solver: str | Solver = "greedy", **options: Any) -> Solution:
    """Choose one option of each group within the budget.

    Args:
        problem: groups, budget and objective.
        solver: a name in SOLVERS, or any callable with a solver's signature.
        options: passed to the solver.

    Returns:
        A Solution whose cost and loss were recounted from its choice.

    Raises:
        InfeasibleError: even the cheapest choice is over the budget.
        UnknownSolverError: no such solver.
        SolutionError: the solver returned something that is not a choice within the budget.
    """
    name, call = find_solver(solver)
    problem.require_feasible()
    if problem.objective == "sum":
        found = call(problem, **options)
        choice = found.choice
    else:
        level = smallest_level(problem)
        second_stage, kept = restricted(problem, level)
        found = call(second_stage, **options)
        indices = checked_choice(second_stage, found.choice, name)
        choice = tuple(int(kept[g][j]) for g, j in enumerate(indices))
    timed_out = found.status == "time_limit"
    return certify(problem, choice, name, timed_out=timed_out, stats=found.stats)
