"""The smallest level against enumeration, and the two stages built on it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt_solvers import (
    Group,
    InfeasibleError,
    Problem,
    ProblemError,
    SideBudget,
    solve,
    solve_with_level,
    verify,
)
from rankopt_solvers.maxmin import choice_within, restricted, smallest_level

Problems = Callable[..., st.SearchStrategy[Problem]]
Optimum = Callable[[Problem], float]
Choices = Callable[[Problem], list[tuple[int, ...]]]


def group(name: str, cost: list[int], loss: list[float]) -> Group:
    return Group(name, np.array(cost), np.array(loss))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_smallest_level_is_that_of_enumeration(
    ugly: Problems, optimum: Optimum, data: st.DataObject
) -> None:
    problem = data.draw(ugly("max"))
    level = smallest_level(problem)
    assert level == optimum(problem)
    choice = choice_within(problem, level)
    assert choice is not None and problem.loss_of(choice) <= level
    assert problem.cost_of(choice) <= problem.budget
    if level > 0:
        assert choice_within(problem, math.nextafter(level, 0.0)) is None


@pytest.mark.parametrize("seed", range(5))
def test_many_levels_that_differ_in_their_last_digits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(20):
        loss = 1.0 + np.sort(rng.choice(2**20, 300, replace=False))[::-1] * 2.0**-52
        groups.append(Group(f"g{i}", np.cumsum(rng.integers(1, 50, 300)), loss))
    problem = Problem(tuple(groups), sum(int(g.cost[100]) for g in groups), "max")
    level = smallest_level(problem)
    assert choice_within(problem, level) is not None
    assert choice_within(problem, math.nextafter(level, 0.0)) is None
    assert any((g.loss == level).any() for g in groups)


def test_the_choice_within_a_level_is_the_cheapest() -> None:
    problem = Problem((group("a", [1, 4, 9], [5.0, 2.0, 0.0]), group("b", [2, 3], [3.0, 1.0])), 7)
    assert choice_within(problem, 5.0) == (0, 0)
    assert choice_within(problem, 2.0) == (1, 1)
    assert choice_within(problem, 1.9) is None
    assert smallest_level(problem) == 2.0


def test_below_the_cheapest_choice_there_is_no_level() -> None:
    with pytest.raises(InfeasibleError):
        smallest_level(Problem((group("a", [5], [0.0]),), 4, "max"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_restricted_keeps_the_options_within_the_level(ugly: Problems, data: st.DataObject) -> None:
    problem = data.draw(ugly("max"))
    level = smallest_level(problem)
    second, kept = restricted(problem, level)
    assert second.objective == "sum" and second.budget == problem.budget
    for before, after, indices in zip(problem.groups, second.groups, kept, strict=True):
        assert indices.tolist() == [j for j, loss in enumerate(before.loss) if loss <= level]
        assert after.cost.tolist() == before.cost[indices].tolist()
        assert after.loss.tolist() == before.loss[indices].tolist()


def second_stage(
    problem: Problem, choices: list[tuple[int, ...]], measure: list[Any], level: float
) -> float:
    """The least sum among the choices that keep the level."""
    return min(
        problem.loss_of(choice)
        for choice in choices
        if max(values[j] for values, j in zip(measure, choice, strict=True)) <= level
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_without_a_level_the_best_one_is_kept(
    problems: Problems, feasible_choices: Choices, data: st.DataObject
) -> None:
    problem = data.draw(problems())
    losses = [g.loss for g in problem.groups]
    level = smallest_level(Problem(problem.groups, problem.budget, "max"))
    solution = solve_with_level(problem)
    verify(problem, solution)
    best = second_stage(problem, feasible_choices(problem), losses, level)
    assert solution.stats["level"] == level and solution.stats["level_status"] == "optimal"
    assert math.isclose(solution.loss, best, rel_tol=1e-12)
    assert math.isclose(solution.stats["level_bound"], best, rel_tol=1e-12)
    assert max(g.loss[j] for g, j in zip(problem.groups, solution.choice, strict=True)) <= level
    # What it claims of the problem as given holds without the level.
    assert solution.bound <= solve(problem).loss <= solution.loss * (1 + 1e-12)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_level_of_another_measure(
    problems: Problems, feasible_choices: Choices, data: st.DataObject
) -> None:
    problem = data.draw(problems())
    share = st.floats(0.0, 1.0, allow_subnormal=False)
    measure = [
        np.array(data.draw(st.lists(share, min_size=g.cost.size, max_size=g.cost.size)))
        for g in problem.groups
    ]
    choices = feasible_choices(problem)
    best_level = min(
        max(values[j] for values, j in zip(measure, choice, strict=True)) for choice in choices
    )
    level = data.draw(st.sampled_from([None, best_level, 1.0]))
    solution = solve_with_level(problem, level, measure=measure)
    verify(problem, solution)
    kept = best_level if level is None else level
    assert solution.stats["level"] == kept
    best = second_stage(problem, choices, measure, kept)
    assert math.isclose(solution.loss, best, rel_tol=1e-12)


@pytest.mark.parametrize("solver", ["greedy", "density"])
def test_another_solver_for_the_second_stage(generic: Callable[..., Problem], solver: str) -> None:
    problem = generic(8, 8, 0.3)
    exact = solve_with_level(problem, 0.7)
    solution = solve_with_level(problem, 0.7, solver=solver)
    verify(problem, solution)
    assert solution.solver == solver and exact.solver == "exact"
    assert all(g.loss[j] <= 0.7 for g, j in zip(problem.groups, solution.choice, strict=True))
    assert solution.stats["level_bound"] <= exact.loss <= solution.loss


def test_options_are_passed_to_the_second_stage(generic: Callable[..., Problem]) -> None:
    with pytest.raises(ValueError, match="max_nodes"):
        solve_with_level(generic(4, 4), 0.9, max_nodes=0)


def test_a_level_that_no_budget_keeps_and_one_that_this_one_does_not() -> None:
    a, b = group("first", [1, 10], [5.0, 1.0]), group("second", [2, 20], [3.0, 2.0])
    problem = Problem((a, b), 21)
    with pytest.raises(ProblemError, match=r"'second' has no option within the level 1\.5"):
        solve_with_level(problem, 1.5)
    with pytest.raises(InfeasibleError) as caught:
        solve_with_level(problem, 2.0)
    assert (caught.value.budget, caught.value.smallest) == (21, 30)
    assert solve_with_level(problem, 3.0).choice == (1, 0)
    with pytest.raises(InfeasibleError, match="cheapest costs 3"):
        solve_with_level(problem.with_budget(2))


def test_a_level_that_is_not_a_number_is_no_level(generic: Callable[..., Problem]) -> None:
    with pytest.raises(ProblemError, match="level nan"):
        solve_with_level(generic(2, 2), math.nan)


@pytest.mark.parametrize("level", [None, 0.5])
@pytest.mark.parametrize("sizes", [(3, 3), (3, 3, 2), (3, 3, 4), (3, 3, 3, 3)])
def test_a_measure_that_does_not_fit_the_options_is_refused(
    generic: Callable[..., Problem], level: float | None, sizes: tuple[int, ...]
) -> None:
    problem = generic(3, 3, 0.9)
    measure = [np.linspace(0.0, 0.4, size) for size in sizes]
    with pytest.raises(ProblemError):
        solve_with_level(problem, level, measure=measure)


def test_it_takes_one_budget_of_a_sum(generic: Callable[..., Problem]) -> None:
    problem = generic(2, 3)
    with pytest.raises(ProblemError, match="'max'"):
        solve_with_level(Problem(problem.groups, problem.budget, "max"))
    side = SideBudget("latency", tuple(g.cost for g in problem.groups), 10**9)
    with pytest.raises(ProblemError, match="latency"):
        solve_with_level(Problem(problem.groups, problem.budget, side_budgets=(side,)))
