"""What must not change the exact solver's answer: order, units, and how much there is to spend."""

from collections.abc import Callable

import numpy as np
import pytest

from rankopt_solvers import Group, Problem, Solution, solve, verify

SHAPES = [(48, 48), (48, 96), (96, 48), (64, 128), (80, 80), (128, 32)]


def proven(problem: Problem) -> Solution:
    """The solution, after checking that it is proven."""
    solution = solve(problem, "exact")
    verify(problem, solution)
    assert solution.status == "optimal" and solution.bound == solution.loss
    return solution


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_groups_and_options_does_not_change_the_loss_by_a_bit(
    layers: Callable[..., Problem], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    problem = layers(SHAPES * 2, 0.6, seed, 0.9)
    solution = proven(problem)
    for _ in range(3):
        groups = []
        for i in rng.permutation(len(problem.groups)).tolist():
            g = problem.groups[i]
            order = rng.permutation(g.cost.size)
            groups.append(Group(g.name, g.cost[order], g.loss[order]))
        assert proven(Problem(tuple(groups), problem.budget)).loss == solution.loss


@pytest.mark.parametrize("power", [-900, -40, -1, 1, 52, 900])
def test_a_power_of_two_scales_the_losses_and_nothing_else(
    layers: Callable[..., Problem], power: int
) -> None:
    problem = layers(SHAPES, 0.5, 1, 0.9)
    scale = 2.0**power
    scaled = tuple(Group(g.name, g.cost, g.loss * scale) for g in problem.groups)
    one, two = proven(problem), proven(Problem(scaled, problem.budget))
    assert two.choice == one.choice and two.cost == one.cost
    assert two.loss == one.loss * scale and two.multiplier == one.multiplier * scale


@pytest.mark.parametrize("unit", [3, 10**9])
def test_the_unit_of_cost_does_not_matter(layers: Callable[..., Problem], unit: int) -> None:
    problem = layers(SHAPES, 0.5, 1, 0.9)
    dear = tuple(Group(g.name, g.cost * unit, g.loss) for g in problem.groups)
    one, two = proven(problem), proven(Problem(dear, problem.budget * unit + unit - 1))
    assert (two.loss, two.cost) == (one.loss, one.cost * unit)


def test_a_larger_budget_never_loses_more(layers: Callable[..., Problem]) -> None:
    problem = layers(SHAPES, 1.0, 2, 0.9)
    budgets = np.linspace(problem.smallest_cost, problem.budget, 40).astype(int).tolist()
    losses = [proven(problem.with_budget(budget)).loss for budget in budgets]
    assert losses == sorted(losses, reverse=True)
