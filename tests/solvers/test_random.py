"""Random small problems against enumeration: feasible, bound <= optimum <= loss, honest status.

`make test` looks at a few hundred for every solver, `make test-all` at more than 20,000.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankopt_solvers import Problem, solve, verify
from rankopt_solvers.problem import Objective

Problems = Callable[..., st.SearchStrategy[Problem]]
Optimum = Callable[[Problem], float]

#: Relative rounding of a sum of a few losses.
ROUNDING = 1e-12

needs_highs = pytest.mark.skipif(
    not (find_spec("cvxpy") and find_spec("highspy")), reason="needs the extra milp"
)


def check(problem: Problem, best: float, solver: str) -> None:
    solution = solve(problem, solver)
    verify(problem, solution)
    assert problem.cost_of(solution.choice) == solution.cost <= problem.budget
    assert problem.loss_of(solution.choice) == solution.loss
    assert solution.bound <= best * (1 + ROUNDING) and best <= solution.loss
    assert solution.solver == solver
    if solution.status == "optimal":
        assert solution.gap == 0.0
        assert math.isclose(solution.loss, best, rel_tol=ROUNDING)
    if solver == "exact" or problem.objective == "max":
        assert solution.status == "optimal"


def run(strategy: st.SearchStrategy[Problem], optimum: Optimum, solvers: list[str], n: int) -> None:
    """Check n random problems with each of the solvers."""
    seen = 0

    @settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(problem=strategy)
    def every(problem: Problem) -> None:
        nonlocal seen
        best = optimum(problem)
        for solver in solvers:
            check(problem, best, solver)
        seen += 1

    every()
    assert seen >= n


OURS = ["exact", "greedy", "density"]


@pytest.mark.parametrize("objective", ["sum", "max"])
def test_a_few_hundred(ugly: Problems, optimum: Optimum, objective: Objective) -> None:
    run(ugly(objective), optimum, OURS, 200)


@needs_highs
@pytest.mark.parametrize("objective", ["sum", "max"])
def test_a_few_with_the_integer_program(
    ugly: Problems, optimum: Optimum, objective: Objective
) -> None:
    run(ugly(objective), optimum, ["knapsack"], 30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "examples"),
    [
        ("sum", 4_000),
        ("max", 2_000),
        pytest.param("sum", 14_000, marks=pytest.mark.sweep),
        pytest.param("max", 6_000, marks=pytest.mark.sweep),
    ],
)
def test_thousands(ugly: Problems, optimum: Optimum, objective: Objective, examples: int) -> None:
    run(ugly(objective), optimum, OURS, examples)


@pytest.mark.slow
@needs_highs
@pytest.mark.parametrize("objective", ["sum", "max"])
def test_hundreds_with_the_integer_program(
    ugly: Problems, optimum: Optimum, objective: Objective
) -> None:
    run(ugly(objective), optimum, ["knapsack"], 600)
