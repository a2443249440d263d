"""The integer program: exact at every scale, never worse than greedy, honest when it cannot run."""

import math
import sys
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt_solvers import Group, Problem, solve, verify

Problems = Callable[..., st.SearchStrategy[Problem]]
Optimum = Callable[[Problem], float]

needs_highs = pytest.mark.skipif(
    not (find_spec("cvxpy") and find_spec("highspy")), reason="needs the extra milp"
)


@needs_highs
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_sum_attains_the_optimum(
    problems: Problems, optimum: Optimum, scale: float, data: st.DataObject
) -> None:
    problem = data.draw(problems(scale=scale))
    solution = solve(problem, "knapsack")
    verify(problem, solution)
    best = optimum(problem)
    assert solution.bound <= best <= solution.loss <= solve(problem).loss
    assert math.isclose(solution.loss, best, rel_tol=1e-9)
    assert solution.status == "feasible" or solution.loss == best


@needs_highs
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_max_attains_the_best_level_and_the_best_sum_at_that_level(
    problems: Problems,
    optimum: Optimum,
    feasible_choices: Callable[[Problem], list[tuple[int, ...]]],
    data: st.DataObject,
) -> None:
    problem = data.draw(problems("max"))
    solution = solve(problem, "knapsack")
    verify(problem, solution)
    level = optimum(problem)
    assert solution.loss == level and solution.status == "optimal"
    total = Problem(problem.groups, problem.budget)
    within = [c for c in feasible_choices(problem) if problem.loss_of(c) <= level]
    best = min(map(total.loss_of, within))
    assert math.isclose(total.loss_of(solution.choice), best, rel_tol=1e-9)


@needs_highs
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
def test_where_greedy_is_not_optimal_it_is_at_every_scale(
    generic: Callable[..., Problem], optimum: Optimum, scale: float
) -> None:
    beaten = 0
    for seed in range(40):
        made = generic(6, 4, 0.2, seed)
        groups = tuple(Group(g.name, g.cost, g.loss * scale) for g in made.groups)
        problem = Problem(groups, made.budget)
        best = optimum(problem)
        assert math.isclose(solve(problem, "knapsack").loss, best, rel_tol=1e-12)
        beaten += solve(problem).loss > best * 1.001
    assert beaten >= 3


@needs_highs
@pytest.mark.parametrize("unit", [1, 10**6])
def test_it_finds_what_greedy_misses(unit: int) -> None:
    # "c" saves most per cost, but taking it leaves no room for the other two together.
    tables = {"a": ([0, 5], [5.0, 0.0]), "b": ([0, 5], [5.0, 0.0]), "c": ([0, 3], [3.1, 0.0])}
    groups = tuple(Group(n, np.array(c) * unit, np.array(v)) for n, (c, v) in tables.items())
    problem = Problem(groups, 10 * unit)
    solution = solve(problem, "knapsack")
    verify(problem, solution)
    assert solve(problem).loss == 5.0
    assert solution.loss == 3.1 and not solution.stats["kept_greedy"]


@needs_highs
def test_costs_that_highs_refuses_leave_the_greedy_choice() -> None:
    # Nothing divides these costs, and HiGHS takes no coefficient above 1e15.
    unit = 10**16
    costs = [5 * unit + 1, 5 * unit + 2, 3 * unit + 7]
    groups = tuple(
        Group(f"g{i}", np.array([0, cost]), np.array([cost / unit + 0.1 * (i == 2), 0.0]))
        for i, cost in enumerate(costs)
    )
    problem = Problem(groups, 10 * unit + 3)
    solution = solve(problem, "knapsack")
    verify(problem, solution)
    assert solution.stats["kept_greedy"] and "failed" in solution.stats["highs_status"]
    assert solution.loss == solve(problem).loss and solution.status == "feasible"


@needs_highs
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
def test_out_of_time_it_still_answers_at_least_as_well_as_greedy(
    generic: Callable[..., Problem],
) -> None:
    problem = generic(150, 40)
    solution = solve(problem, "knapsack", time_limit=1e-4)
    verify(problem, solution)
    assert solution.status == "time_limit"
    assert solution.loss <= solve(problem).loss


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, math.inf])
def test_the_time_limit_must_be_positive(generic: Callable[..., Problem], limit: float) -> None:
    with pytest.raises(ValueError, match="time_limit"):
        solve(generic(2, 2), "knapsack", time_limit=limit)


@pytest.mark.parametrize("missing", ["cvxpy", "highspy"])
def test_a_missing_package_names_the_extra(
    generic: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"rankopt\[milp\]"):
        solve(generic(60, 20), "knapsack")
