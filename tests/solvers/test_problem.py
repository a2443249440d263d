"""What a problem accepts, what it refuses and how it says so."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from rankopt_solvers import Group, InfeasibleError, Problem, ProblemError, solve
from rankopt_solvers.problem import Objective


def group(name: str, cost: list[int], loss: list[float]) -> Group:
    return Group(name, np.array(cost), np.array(loss))


@pytest.mark.parametrize(
    ("cost", "loss"),
    [
        ([1, 2], [1.0, np.nan]),
        ([1, 2], [np.inf, 0.0]),
        ([1, 2], [1.0, -1.0]),
        ([1, -2], [1.0, 0.0]),
        ([1.5, 2], [1.0, 0.0]),
        ([np.nan, 2], [1.0, 0.0]),
        ([np.inf, 2], [1.0, 0.0]),
        ([2.0**60, 2], [1.0, 0.0]),
        ([1, 2], [1.0]),
        ([[1, 2]], [[1.0, 0.0]]),
        (3, 1.0),
        ([], []),
    ],
)
def test_a_malformed_group_is_refused_by_name(cost: object, loss: object) -> None:
    with pytest.raises(ProblemError, match=r"block\.7\.mlp"):
        Group("block.7.mlp", np.array(cost), np.array(loss))


def test_whole_numbers_given_as_floats_are_costs() -> None:
    assert Group("a", np.array([3.0, 5.0]), np.array([1, 0])).cost.tolist() == [3, 5]


@pytest.mark.parametrize("budget", [True, np.True_, 1.0, "10", None])
def test_a_budget_that_is_not_an_integer_is_refused(budget: object) -> None:
    with pytest.raises(ProblemError, match="budget"):
        Problem((group("a", [1], [0.0]),), budget)  # type: ignore[arg-type]


def test_a_numpy_integer_is_a_budget() -> None:
    assert type(Problem((group("a", [1], [0.0]),), np.int64(3)).budget) is int  # type: ignore[arg-type]


def test_a_repeated_name_is_refused_and_named() -> None:
    groups = tuple(group(name, [1], [0.0]) for name in ("once", "twice", "twice"))
    with pytest.raises(ProblemError, match="twice") as caught:
        Problem(groups, 5)
    assert "once" not in str(caught.value)


def test_no_groups_and_unknown_objectives_are_refused() -> None:
    with pytest.raises(ProblemError, match="at least one group"):
        Problem((), 5)
    with pytest.raises(ProblemError, match="'mean'"):
        Problem((group("a", [1], [0.0]),), 5, "mean")  # type: ignore[arg-type]


def test_totals_that_could_overflow_are_refused() -> None:
    with pytest.raises(ProblemError, match="unit of cost"):
        Problem((group("a", [2**61], [0.0]), group("b", [2**61 + 1], [0.0])), 2**62)


def test_arrays_are_read_only_copies() -> None:
    cost, loss = np.array([1, 2]), np.array([1.0, 0.0])
    made = Group("a", cost, loss)
    cost[0], loss[0] = 99, 99.0
    assert made.cost.tolist() == [1, 2] and made.loss.tolist() == [1.0, 0.0]
    for array in (made.cost, made.loss):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7


@pytest.mark.parametrize("objective", ["sum", "max"])
@pytest.mark.parametrize("solver", ["greedy", "knapsack"])
def test_infeasible_says_what_would_fit_and_who_costs_most(
    objective: Objective, solver: str
) -> None:
    sizes = {"small": 1, "huge": 100, "tiny": 0, "big": 10}
    groups = tuple(group(name, [size + 5, size], [0.0, 1.0]) for name, size in sizes.items())
    problem = Problem(groups, 110, objective)
    with pytest.raises(InfeasibleError, match="budget of 110: the cheapest costs 111") as caught:
        solve(problem, solver)
    error = caught.value
    assert (error.budget, error.smallest) == (110, 111)
    assert error.largest_groups == ("huge", "big", "small")
    assert all(name in str(error) for name in error.largest_groups)
    assert solve(dataclasses.replace(problem, budget=error.smallest)).cost == 111


def test_the_digest_tells_problems_apart(generic: Callable[..., Problem]) -> None:
    problem = generic(3, 4)
    first, *rest = problem.groups
    others = [
        dataclasses.replace(problem, budget=problem.budget + 1),
        dataclasses.replace(problem, objective="max"),
        dataclasses.replace(problem, groups=(Group("other", first.cost, first.loss), *rest)),
        dataclasses.replace(problem, groups=(Group("g0", first.cost + 1, first.loss), *rest)),
        dataclasses.replace(problem, groups=(Group("g0", first.cost, first.loss / 2), *rest)),
    ]
    assert generic(3, 4).digest() == problem.digest()
    assert len({problem.digest(), *(other.digest() for other in others)}) == 6
