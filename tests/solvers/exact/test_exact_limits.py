"""The exact solver at its limits: a true bound, the best choice so far, and the right status."""

import math
import time
from collections.abc import Callable

import numpy as np
import pytest

from rankopt_solvers import Group, Problem, ProblemError, SideBudget, solve, verify

BestLosses = Callable[[Problem], Callable[[int], float]]


def group(name: str, cost: list[int], loss: list[float]) -> Group:
    return Group(name, np.array(cost), np.array(loss))


@pytest.fixture(scope="module")
def nearly_identical(layers: Callable[..., Problem]) -> Problem:
    """32 jumps to dense that differ by 1e-9: no symmetry to use, hardly any bound to go by."""
    rng = np.random.default_rng(0)
    one = layers([(48, 64)], 1.0, 3, 1.0).groups[0]
    groups = tuple(
        Group(f"near{i}", one.cost, one.loss * (1 + 1e-9 * rng.random(one.loss.size)))
        for i in range(32)
    )
    return Problem(groups, int(0.5 * 32 * one.cost.max()) + 20)


@pytest.mark.usefixtures("always_branching")
@pytest.mark.parametrize("max_nodes", [1, 2, 50])
def test_at_max_nodes_the_bound_is_true_and_proven(
    nearly_identical: Problem, best_losses: BestLosses, max_nodes: int
) -> None:
    solution = solve(nearly_identical, "exact", max_nodes=max_nodes)
    verify(nearly_identical, solution)
    assert solution.status == "feasible" and solution.stats["nodes"] <= max_nodes
    best = best_losses(nearly_identical)(nearly_identical.budget)
    assert solution.bound <= best * (1 + 1e-12) and best <= solution.loss * (1 + 1e-12)
    assert solution.loss <= solve(nearly_identical, "greedy").loss
    assert solution.bound >= solve(nearly_identical, "greedy").bound


def test_near_twins_end_in_time_with_a_true_bound(
    nearly_identical: Problem, best_losses: BestLosses
) -> None:
    start = time.monotonic()
    solution = solve(nearly_identical, "exact", time_limit=1.0)
    # One dynamic program may be under way when the time is up.
    assert time.monotonic() - start < 4.0
    verify(nearly_identical, solution)
    best = best_losses(nearly_identical)(nearly_identical.budget)
    assert solution.bound <= best * (1 + 1e-12) and best <= solution.loss * (1 + 1e-12)
    assert solution.gap < 1e-6


@pytest.mark.usefixtures("always_branching")
def test_out_of_time_or_stopped_it_says_so(
    nearly_identical: Problem, best_losses: BestLosses
) -> None:
    best = best_losses(nearly_identical)(nearly_identical.budget)
    asked = 0

    def third_time() -> bool:
        nonlocal asked
        asked += 1
        return asked >= 3

    for limits in (
        {"time_limit": 1e-9},
        {"should_stop": lambda: True},
        {"should_stop": third_time},
    ):
        solution = solve(nearly_identical, "exact", **limits)
        verify(nearly_identical, solution)
        assert solution.status == "time_limit"
        assert solution.bound <= best * (1 + 1e-12) and best <= solution.loss * (1 + 1e-12)
    assert asked == 3


@pytest.mark.usefixtures("always_branching")
def test_more_cases_never_weaken_bound_or_choice(nearly_identical: Problem) -> None:
    found = [solve(nearly_identical, "exact", max_nodes=n) for n in (1, 10, 100)]
    bounds, losses = [s.bound for s in found], [s.loss for s in found]
    assert bounds == sorted(bounds) and losses == sorted(losses, reverse=True)


def test_a_choice_that_the_first_bound_proves_is_optimal_even_without_time() -> None:
    problem = Problem((group("a", [0, 3], [1.0, 0.0]), group("b", [0, 4], [2.0, 0.0])), 7)
    solution = solve(problem, "exact", time_limit=1e-9, max_nodes=1, should_stop=lambda: True)
    assert solution.status == "optimal" and solution.loss == 0.0


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, -math.inf])
def test_a_time_limit_must_be_positive(generic: Callable[..., Problem], limit: float) -> None:
    with pytest.raises(ValueError, match=r"time_limit must be .*positive"):
        solve(generic(2, 2), "exact", time_limit=limit)


@pytest.mark.parametrize("limit", [0, -3])
def test_at_least_one_case_is_looked_at(generic: Callable[..., Problem], limit: int) -> None:
    with pytest.raises(ValueError, match="max_nodes must be at least 1"):
        solve(generic(2, 2), "exact", max_nodes=limit)


def test_side_budgets_are_refused_by_name() -> None:
    a = group("a", [0, 1], [1.0, 0.0])
    side = SideBudget("latency", (np.array([0, 1]),), 1)
    with pytest.raises(ProblemError, match="latency"):
        solve(Problem((a,), 1, side_budgets=(side,)), "exact")
