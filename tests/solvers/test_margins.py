"""How sure each choice is: against the definition, and against solving without the option."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt_solvers import Group, Problem, SideBudget, certify, margins, solve

Problems = Callable[..., st.SearchStrategy[Problem]]
Choices = Callable[[Problem], list[tuple[int, ...]]]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_other_option_loses_at_least_the_margin_more(
    problems: Problems, feasible_choices: Choices, data: st.DataObject
) -> None:
    problem = data.draw(problems())
    solution = solve(problem, "greedy")
    choices = feasible_choices(problem)
    # Any choice is bounded by the Lagrangian function; with another option, by a margin more.
    least = [float((g.loss + solution.multiplier * g.cost).min()) for g in problem.groups]
    floor = math.fsum(least) - solution.multiplier * problem.budget
    for g, margin in enumerate(margins(problem, solution)):
        group, own = problem.groups[g], solution.choice[g]
        here = float(group.loss[own] + solution.multiplier * group.cost[own]) - least[g]
        others = [problem.loss_of(c) for c in choices if c[g] != own]
        if others:
            assert min(others) >= floor + here + margin - 1e-9
        if group.cost.size == 1:
            assert margin == math.inf


def test_the_next_best_option_at_the_price_of_the_budget() -> None:
    a = Group("a", np.array([0, 2, 5]), np.array([10.0, 4.0, 0.0]))
    b = Group("b", np.array([0, 4]), np.array([8.0, 0.0]))
    alone = Group("alone", np.array([3]), np.array([1.0]))
    problem = Problem((a, b, alone), 9)
    solution = solve(problem)
    assert solution.choice == (1, 1, 0) and solution.multiplier == pytest.approx(4 / 3)
    assert margins(problem, solution) == pytest.approx((0.0, 8.0 - 4 * 4 / 3, math.inf))


def test_for_the_max_it_is_the_difference_of_losses() -> None:
    a = Group("a", np.array([0, 2, 5]), np.array([10.0, 4.0, 0.0]))
    solution = solve(Problem((a,), 3, "max"))
    assert solution.choice == (1,) and solution.multiplier == 0.0
    assert margins(Problem((a,), 3, "max"), solution) == (-4.0,)


def test_side_budgets_are_priced_too() -> None:
    a = Group("a", np.array([0, 2, 5]), np.array([10.0, 4.0, 0.0]))
    side = SideBudget("latency", (np.array([1, 2, 7]),), 5)
    problem = Problem((a,), 5, side_budgets=(side,))
    solution = certify(problem, (1,), "by hand", bound=(0.0, 0.5), side_multipliers=(2.0,))
    to_first, to_last = 6.0 - 0.5 * 2 - 2.0 * 1, -4.0 + 0.5 * 3 + 2.0 * 5
    assert margins(problem, solution) == pytest.approx((min(to_first, to_last),))


def test_identical_options_leave_no_margin() -> None:
    a = Group("a", np.array([1, 1]), np.array([2.0, 2.0]))
    problem = Problem((a,), 1)
    assert margins(problem, solve(problem)) == (0.0,)
