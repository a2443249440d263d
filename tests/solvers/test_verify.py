"""verify() believes nothing: every false claim is refused."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rankopt_solvers import Problem, Solution, SolutionError, certify, solve, verify


@pytest.fixture(params=["sum", "max"])
def solved(request: pytest.FixtureRequest, generic: Callable[..., Problem]) -> tuple[Any, ...]:
    """A problem of either objective, and a choice of it that is clearly not optimal."""
    problem: Problem = dataclasses.replace(generic(8, 6, seed=1), objective=request.param)
    cheapest = [int(group.pareto[0]) for group in problem.groups]
    solution = certify(problem, cheapest, "cheapest")
    verify(problem, solution)
    assert solution.gap > 0.1
    return problem, solution


@pytest.mark.parametrize(
    ("complaint", "change"),
    [
        ("cost is", lambda s: {"cost": s.cost - 1}),
        ("cost is", lambda s: {"choice": (*s.choice[:-1], (s.choice[-1] + 1) % 6)}),
        ("loss is", lambda s: {"loss": s.loss * (1 - 1e-9)}),
        ("loss is", lambda s: {"loss": float("nan")}),
        ("above the loss", lambda s: {"bound": s.loss * 1.001}),
        ("above the loss", lambda s: {"bound": float("nan")}),
        ("not proven", lambda s: {"bound": s.bound + 0.01 * (s.loss - s.bound)}),
        ("optimal with a gap", lambda s: {"status": "optimal"}),
        ("not proven", lambda s: {"status": "optimal", "bound": s.loss}),
        ("7 choices for 8", lambda s: {"choice": s.choice[:-1]}),
        ("9 choices for 8", lambda s: {"choice": (*s.choice, 0)}),
        ("no option 6", lambda s: {"choice": (6, *s.choice[1:])}),
        # Python would read a negative index as an option counted from the end.
        ("no option -", lambda s: {"choice": (s.choice[0] - 6, *s.choice[1:])}),
    ],
)
def test_a_false_claim_is_refused(
    solved: tuple[Problem, Solution], complaint: str, change: Callable[[Solution], dict[str, Any]]
) -> None:
    problem, solution = solved
    with pytest.raises(SolutionError, match=complaint):
        verify(problem, dataclasses.replace(solution, **change(solution)))


@pytest.mark.parametrize("multiplier", [-1.0, float("nan"), float("inf")])
def test_a_multiplier_that_proves_nothing_is_refused(
    generic: Callable[..., Problem], multiplier: float
) -> None:
    problem = generic(8, 6)
    with pytest.raises(SolutionError, match="multiplier"):
        verify(problem, dataclasses.replace(solve(problem), multiplier=multiplier))


def test_a_choice_over_the_budget_is_refused(solved: tuple[Problem, Solution]) -> None:
    problem, solution = solved
    smaller = dataclasses.replace(problem, budget=solution.cost - 1)
    with pytest.raises(SolutionError, match="cost is"):
        verify(smaller, solution)
    with pytest.raises(SolutionError, match="the budget is"):
        certify(smaller, solution.choice, "cheapest")


@pytest.mark.parametrize("objective", ["sum", "max"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_multiplier_makes_a_bound_above_the_optimum_acceptable(
    problems: Callable[..., st.SearchStrategy[Problem]],
    feasible_choices: Callable[[Problem], list[tuple[int, ...]]],
    optimum: Callable[[Problem], float],
    objective: str,
    data: st.DataObject,
) -> None:
    problem = data.draw(problems(objective))
    choices = feasible_choices(problem)
    best = optimum(problem)
    worse = [choice for choice in choices if problem.loss_of(choice) > best + 1e-6]
    assume(worse)
    honest = certify(problem, data.draw(st.sampled_from(worse)), "any")
    verify(problem, honest)
    lam = data.draw(st.one_of(st.just(honest.multiplier), st.floats(0.0, 20.0)))
    false = dataclasses.replace(honest, bound=(best + honest.loss) / 2, multiplier=lam)
    with pytest.raises(SolutionError, match="not proven"):
        verify(problem, false)


def test_the_bound_at_zero_needs_no_multiplier(generic: Callable[..., Problem]) -> None:
    problem = generic(8, 6)
    floor = sum(float(group.loss.min()) for group in problem.groups)
    verify(problem, dataclasses.replace(solve(problem), bound=floor * 0.999, multiplier=1e9))
