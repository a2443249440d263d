"""What a solution says, against what can be counted without the solver's code.

Costs are added in Python integers, losses with ``math.fsum``, optima come from enumeration, and
``verify`` must find the bound and the status proven.
"""

import math
from collections.abc import Callable
from typing import Any, get_args

from rankopt_solvers.problem import Problem
from rankopt_solvers.registry import Solver
from rankopt_solvers.solution import Solution, Status
from rankopt_solvers.testing.instances import RELATIVE, optimum, random_problem
from rankopt_solvers.verify import verify

#: Problems of a family that a check looks at.
SEEDS = range(12)


def require(holds: object, happened: str) -> None:
    """Raise an AssertionError that says what happened; unlike ``assert``, under ``-O`` too."""
    if not holds:
        raise AssertionError(happened)


def each(
    solver: Solver,
    family: str,
    check: Callable[[Solver, Problem], object],
    make: Callable[[str, int], Problem] = random_problem,
) -> None:
    """Check some problems of a family; an error gets a note that says how to make the problem."""
    for seed in SEEDS:
        problem = make(family, seed)
        try:
            check(solver, problem)
        except Exception as error:
            error.add_note(
                f"problem: rankopt_solvers.testing.{make.__name__}({family!r}, {seed}), "
                f"{len(problem.groups)} groups, budget {problem.budget:,}"
            )
            raise


def fields(problem: Problem, found: object) -> Solution:
    """Types, finite numbers, the words of the contract."""
    if not isinstance(found, Solution):
        raise AssertionError(f"returned a {type(found).__name__}, not a Solution")
    choice = found.choice
    require(isinstance(choice, tuple), f"choice is a {type(choice).__name__}, not a tuple")
    require(all(type(j) is int for j in choice), f"choice holds other things than ints: {choice}")
    wanted = len(problem.groups)
    require(len(choice) == wanted, f"{len(choice)} options chosen for {wanted} groups")
    require(type(found.cost) is int, f"cost is a {type(found.cost).__name__}, not an int")
    for name in ("loss", "bound", "multiplier", "gap"):
        number = getattr(found, name)
        require(isinstance(number, float) and math.isfinite(number), f"{name} is {number!r}")
    require(found.gap >= 0.0, f"the gap is {found.gap}")
    require(found.status in get_args(Status), f"the status is {found.status!r}")
    require(found.status != "optimal" or found.gap == 0.0, f"optimal with a gap of {found.gap}")
    require(found.solver and isinstance(found.solver, str), "the solver has no name")
    return found


def within(problem: Problem, found: Solution) -> None:
    """One existing option of every group, together within every budget."""
    for group, j in zip(problem.groups, found.choice, strict=True):
        require(0 <= j < group.cost.size, f"{group.name} has no option {j}")
    spent = sum(int(g.cost[j]) for g, j in zip(problem.groups, found.choice, strict=True))
    require(spent <= problem.budget, f"the choice costs {spent:,} of {problem.budget:,}")
    for side in problem.side_budgets:
        spent = sum(int(c[j]) for c, j in zip(side.costs, found.choice, strict=True))
        require(spent <= side.limit, f"{side.name}: the choice costs {spent:,} of {side.limit:,}")


def recounted(problem: Problem, found: Solution) -> None:
    """Cost and loss are those of the choice."""
    taken = list(zip(problem.groups, found.choice, strict=True))
    cost = sum(int(group.cost[j]) for group, j in taken)
    loss = math.fsum(float(group.loss[j]) for group, j in taken)
    require(cost == found.cost, f"says it costs {found.cost:,}; it costs {cost:,}")
    close = math.isclose(loss, found.loss, rel_tol=RELATIVE)
    require(close, f"says it loses {found.loss!r}; it loses {loss!r}")


def bounded(problem: Problem, found: Solution) -> None:
    """Bound <= optimum <= loss, the optimum by enumeration."""
    best = optimum(problem)
    require(found.loss >= best * (1 - RELATIVE), f"loses {found.loss!r}, less than {best!r}")
    require(found.bound <= best * (1 + RELATIVE), f"bound {found.bound!r}, optimum {best!r}")


def optimal_if_claimed(problem: Problem, found: Solution) -> None:
    """What is called optimal is."""
    if found.status == "optimal":
        best = optimum(problem)
        honest = math.isclose(found.loss, best, rel_tol=RELATIVE)
        require(honest, f"{found.loss!r} is called optimal; {best!r} can be had")


def solved(solver: Solver, problem: Problem, **options: Any) -> Solution:
    """Solve, and check all that can be checked without the optimum."""
    found = fields(problem, solver(problem, **options))
    within(problem, found)
    recounted(problem, found)
    verify(problem, found)
    return found


def sound(solver: Solver, problem: Problem) -> Solution:
    """Solve a small problem, and check everything."""
    found = solved(solver, problem)
    bounded(problem, found)
    optimal_if_claimed(problem, found)
    return found


def same(one: Solution, two: Solution) -> None:
    """Equal in all but ``stats``, which may hold seconds."""
    for name in ("choice", "cost", "loss", "bound", "multiplier", "status", "solver"):
        a, b = getattr(one, name), getattr(two, name)
        require(a == b, f"{name}: first {a!r}, then {b!r}")
