"""verify() believes nothing: every false claim is refused."""

import ast
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import rankopt_solvers
from rankopt_solvers import (
    Group,
    Problem,
    SideBudget,
    Solution,
    SolutionError,
    certify,
    solve,
    verify,
)

Problems = Callable[..., st.SearchStrategy[Problem]]
Choices = Callable[[Problem], list[tuple[int, ...]]]


def group(name: str, cost: list[int], loss: list[float]) -> Group:
    return Group(name, np.array(cost), np.array(loss))


def test_it_shares_no_code_with_the_solvers() -> None:
    # As an attribute of the package, `verify` is the function.
    tree = ast.parse(Path(rankopt_solvers.__file__).with_name("verify.py").read_text())
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in imported if name.startswith("rankopt")}
    allowed = {"problem.Problem", "solution.checked_choice"}
    allowed |= {
        f"solution.{name}" for name in ("Case", "Proof", "Solution", "SolutionError", "Status")
    }
    assert ours <= {f"rankopt_solvers.{name}" for name in allowed}
    assert {name.split(".")[0] for name in imported - ours} <= {
        *("collections", "dataclasses", "math", "numpy", "typing", "itertools", "fractions")
    }
    # What a problem prepares for solvers is theirs too.
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"table", "hulls", "cost_of", "loss_of", "smallest_cost"}


# Claims about the choice


@pytest.fixture(params=["sum", "max"])
def solved(request: pytest.FixtureRequest, generic: Callable[..., Problem]) -> tuple[Any, ...]:
    """A problem of either objective, and a choice of it that is clearly not optimal."""
    problem: Problem = dataclasses.replace(generic(8, 6, seed=1), objective=request.param)
    cheapest = [int(group.cost.argmin()) for group in problem.groups]
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
        ("loss is", lambda s: {"loss": float("inf")}),
        ("above the loss", lambda s: {"bound": s.loss * 1.001}),
        ("above the loss", lambda s: {"bound": float("nan")}),
        ("not proven", lambda s: {"bound": s.bound + 1e-9 * (s.loss - s.bound)}),
        ("optimal with a gap", lambda s: {"status": "optimal"}),
        ("not proven", lambda s: {"status": "optimal", "bound": s.loss}),
        ("status", lambda s: {"status": "proven"}),
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


def test_a_choice_over_the_budget_is_refused(solved: tuple[Problem, Solution]) -> None:
    problem, solution = solved
    smaller = dataclasses.replace(problem, budget=solution.cost - 1)
    with pytest.raises(SolutionError, match="cost is"):
        verify(smaller, solution)
    with pytest.raises(SolutionError, match="the budget is"):
        certify(smaller, solution.choice, "cheapest")


@pytest.mark.parametrize("multiplier", [-1.0, -1e-30, math.nan, math.inf, -math.inf])
def test_a_multiplier_that_proves_nothing_is_refused(
    generic: Callable[..., Problem], multiplier: float
) -> None:
    problem = generic(8, 6)
    with pytest.raises(SolutionError, match="multiplier"):
        verify(problem, dataclasses.replace(solve(problem, "greedy"), multiplier=multiplier))


def test_the_bound_at_zero_needs_no_multiplier(generic: Callable[..., Problem]) -> None:
    problem = generic(8, 6)
    floor = sum(float(group.loss.min()) for group in problem.groups)
    greedy = solve(problem, "greedy")
    verify(problem, dataclasses.replace(greedy, bound=floor * 0.999, multiplier=1e9))
    with pytest.raises(SolutionError, match="not proven"):
        verify(problem, dataclasses.replace(greedy, bound=floor * 1.001, multiplier=1e9))


@pytest.mark.parametrize("objective", ["sum", "max"])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_multiplier_makes_a_bound_above_the_optimum_acceptable(
    problems: Problems,
    feasible_choices: Choices,
    optimum: Callable[[Problem], float],
    objective: str,
    data: st.DataObject,
) -> None:
    problem = data.draw(problems(objective))
    best = optimum(problem)
    worse = [c for c in feasible_choices(problem) if problem.loss_of(c) > best + 1e-6]
    assume(worse)
    honest = certify(problem, data.draw(st.sampled_from(worse)), "any")
    verify(problem, honest)
    lam = data.draw(st.one_of(st.just(honest.multiplier), st.floats(0.0, 20.0)))
    false = dataclasses.replace(honest, bound=(best + honest.loss) / 2, multiplier=lam)
    with pytest.raises(SolutionError, match="not proven"):
        verify(problem, false)


# Side budgets


def test_side_budgets_are_counted() -> None:
    a, b = group("a", [0, 4], [3.0, 0.0]), group("b", [0, 4], [2.0, 0.0])
    side = SideBudget("latency", (np.array([1, 6]), np.array([1, 5])), 7)
    problem = Problem((a, b), 8, side_budgets=(side,))
    solution = certify(problem, (1, 0), "by hand")
    verify(problem, solution)
    with pytest.raises(SolutionError, match="'latency' is 11; the limit is 7"):
        verify(problem, dataclasses.replace(solution, choice=(1, 1), cost=8, loss=0.0))
    with pytest.raises(SolutionError, match="costs 11 of 'latency', the limit is 7"):
        certify(problem, (1, 1), "by hand")


@pytest.mark.parametrize("side_multipliers", [(-1.0,), (math.nan,), (1.0, 1.0)])
def test_multipliers_of_side_budgets_are_checked(side_multipliers: tuple[float, ...]) -> None:
    a = group("a", [0, 4], [3.0, 0.0])
    problem = Problem((a,), 4, side_budgets=(SideBudget("s", (np.array([0, 1]),), 1),))
    solution = certify(problem, (0,), "by hand")
    with pytest.raises(SolutionError, match="multipliers"):
        verify(problem, dataclasses.replace(solution, side_multipliers=side_multipliers))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_prices_of_side_budgets_prove_too_much(
    problems: Problems, feasible_choices: Choices, data: st.DataObject
) -> None:
    plain = data.draw(problems())
    costs = tuple(
        np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
        for n in (g.cost.size for g in plain.groups)
    )
    side = SideBudget("s", costs, data.draw(st.integers(0, 20)))
    problem = Problem(plain.groups, plain.budget, side_budgets=(side,))
    choices = [c for c in feasible_choices(plain) if side.cost_of(c) <= side.limit]
    assume(choices)
    best = min(map(plain.loss_of, choices))
    worse = [c for c in choices if plain.loss_of(c) > best + 1e-6]
    assume(worse)
    honest = certify(problem, data.draw(st.sampled_from(worse)), "any")
    prices = st.one_of(st.floats(0.0, 2.0), st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]))
    claim = dataclasses.replace(
        honest,
        bound=(best + honest.loss) / 2,
        multiplier=data.draw(prices),
        side_multipliers=(data.draw(prices),),
    )
    with pytest.raises(SolutionError, match="not proven"):
        verify(problem, claim)


def test_a_dominated_option_may_be_the_only_one_within_a_side_budget() -> None:
    # Only the option of cost 9 fits: what undominated options can cost does not bound it.
    a = group("a", [0, 10, 9, 9], [1.0, 0.5, 1.0, 2.0])
    side = SideBudget("s", (np.array([10, 10, 0, 0]),), 5)
    problem = Problem((a,), 9, side_budgets=(side,))
    worse = certify(problem, (3,), "worse")
    claim = dataclasses.replace(
        worse, bound=2.0, status="optimal", multiplier=1.0, side_multipliers=(1.0,)
    )
    with pytest.raises(SolutionError, match="not proven"):
        verify(problem, claim)
