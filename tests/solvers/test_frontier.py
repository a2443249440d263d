"""The whole curve: it brackets the optimum at every budget, its choices are nested."""

import itertools
from collections.abc import Callable

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
    frontier,
    solve,
    verify,
)

Problems = Callable[..., st.SearchStrategy[Problem]]
Optimum = Callable[[Problem], float]
BestLosses = Callable[[Problem], Callable[[int], float]]

SHAPES = [(48, 48), (48, 96), (96, 48), (64, 128), (80, 80), (128, 32)]


def budgets_of(problem: Problem, number: int) -> list[int]:
    """From the cheapest choice to beyond the dearest."""
    most = sum(int(group.cost.max()) for group in problem.groups)
    return [int(b) for b in np.linspace(problem.smallest_cost, most * 1.01 + 1, number)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_value_and_bound_bracket_the_optimum(
    ugly: Problems, optimum: Optimum, data: st.DataObject
) -> None:
    # The slopes of subnormal losses round to 0: the curve does not see them.
    problem = data.draw(ugly(subnormal=False))
    curve = frontier(problem)
    for budget in {problem.budget, *curve.cost.tolist(), *(curve.cost - 1).tolist()}:
        if budget < problem.smallest_cost:
            continue
        here = problem.with_budget(budget)
        best = optimum(here)
        assert curve.bound(budget) <= best
        assert best <= curve.value(budget) * (1 + 1e-14)
        nested = curve.nested(budget)
        verify(here, nested)
        assert np.isclose(nested.loss, curve.value(budget), rtol=1e-13, atol=0)
        assert nested.choice == curve.choice(budget) and nested.cost <= budget


@pytest.mark.parametrize("flat", [0.3, 1.0])
def test_on_layers_it_brackets_the_optimum_at_many_budgets(
    layers: Callable[..., Problem], best_losses: BestLosses, flat: float
) -> None:
    problem = layers(SHAPES * 5, 1.0, 0, flat)
    curve, best = frontier(problem), best_losses(problem)
    for budget in budgets_of(problem, 200)[:-2]:
        assert curve.bound(budget) <= best(budget) * (1 + 1e-13)
        assert best(budget) <= curve.value(budget) * (1 + 1e-13)


def test_at_its_points_the_curve_is_the_optimum(
    layers: Callable[..., Problem], best_losses: BestLosses
) -> None:
    problem = layers(SHAPES, 1.0, 1)
    curve, best = frontier(problem), best_losses(problem)
    assert (np.diff(curve.cost) > 0).all() and (np.diff(curve.loss) < 0).all()
    assert (np.diff(curve.slope) <= 0).all() and (curve.slope > 0).all()
    assert curve.slope.size == curve.group.size == curve.cost.size - 1
    for cost, loss in zip(curve.cost.tolist(), curve.loss.tolist(), strict=True):
        assert np.isclose(loss, best(cost), rtol=1e-12, atol=0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_larger_budget_never_takes_an_option_away(ugly: Problems, data: st.DataObject) -> None:
    problem = data.draw(ugly())
    curve = frontier(problem)
    choices = [curve.choice(budget) for budget in budgets_of(problem, 12)]
    for smaller, larger in itertools.pairwise(choices):
        for group, j, k in zip(problem.groups, smaller, larger, strict=True):
            assert group.cost[j] <= group.cost[k]
            assert group.loss[j] >= group.loss[k]


def test_value_and_bound_fall_with_the_budget(layers: Callable[..., Problem]) -> None:
    problem = layers(SHAPES, 1.0, 2, 1.0)
    curve = frontier(problem)
    for along in (curve.value, curve.bound):
        losses = [along(budget) for budget in budgets_of(problem, 300)]
        assert losses == sorted(losses, reverse=True)
    assert curve.value(10**30) == 0.0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_slope_is_the_multiplier(problems: Problems, data: st.DataObject) -> None:
    problem = data.draw(problems())
    curve = frontier(problem)
    point = int(np.searchsorted(curve.cost, problem.table.tightened(problem.budget), "right")) - 1
    slope = curve.slope[point] if point < curve.slope.size else 0.0
    assert solve(problem, "greedy").multiplier == slope == curve.nested(problem.budget).multiplier


@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_solve_is_solve_for_that_budget(layers: Callable[..., Problem], solver: str) -> None:
    problem = layers(SHAPES, 0.5)
    curve = frontier(problem)
    for budget in budgets_of(problem, 7):
        assert curve.solve(budget, solver) == solve(problem.with_budget(budget), solver)
    assert curve.solve(budget, "exact", max_nodes=1).solver == "exact"


@pytest.mark.parametrize("method", ["value", "bound", "choice", "nested", "solve"])
@pytest.mark.parametrize("below", [1, 10**30])
def test_a_budget_below_the_cheapest_choice_is_infeasible(
    generic: Callable[..., Problem], method: str, below: int
) -> None:
    problem = generic(3, 4)
    curve = frontier(problem)
    with pytest.raises(InfeasibleError) as caught:
        getattr(curve, method)(problem.smallest_cost - below)
    assert caught.value.smallest == problem.smallest_cost
    assert curve.nested(problem.smallest_cost).cost == problem.smallest_cost


@pytest.mark.parametrize("budget", [10**12, 2**63, 10**30])
def test_a_huge_budget_takes_every_smallest_loss(
    generic: Callable[..., Problem], budget: int
) -> None:
    problem = generic(5, 9)
    curve, floor = frontier(problem), sum(float(g.loss.min()) for g in problem.groups)
    assert curve.value(budget) == pytest.approx(floor, rel=1e-14)
    assert floor * (1 - 1e-12) <= curve.bound(budget) <= floor
    assert curve.nested(budget).status == "optimal"


def test_single_options_make_a_point() -> None:
    problem = Problem((Group("a", np.array([3]), np.array([2.0])),), 3)
    curve = frontier(problem)
    assert curve.cost.tolist() == [3] and curve.loss.tolist() == [2.0]
    assert curve.slope.size == 0 and curve.choice(100) == (0,)


def test_small_losses_are_not_differences_of_large_ones() -> None:
    tail = [1e15, 1.0, 3e-12, 1e-13]
    curve = frontier(Problem((Group("a", np.array([0, 1, 2, 3]), np.array(tail)),), 0))
    assert np.allclose(curve.loss, tail, rtol=1e-14, atol=0)


def test_it_takes_one_budget_of_a_sum(generic: Callable[..., Problem]) -> None:
    problem = generic(2, 3)
    with pytest.raises(ProblemError, match="'max'"):
        frontier(Problem(problem.groups, problem.budget, "max"))
    side = SideBudget("latency", tuple(g.cost for g in problem.groups), 10**9)
    with pytest.raises(ProblemError, match="latency"):
        frontier(Problem(problem.groups, problem.budget, side_budgets=(side,)))
