"""One budget and constraints: exact at every scale, never worse than greedy, honest otherwise."""

import itertools
import math
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec

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
    Solution,
    solve,
    verify,
)
from rankopt_solvers.knapsack import solve_knapsack

Problems = Callable[..., st.SearchStrategy[Problem]]
Optimum = Callable[[Problem], float]
Choices = Callable[[Problem], list[tuple[int, ...]]]

HAS_HIGHS = find_spec("cvxpy") is not None and find_spec("highspy") is not None
needs_highs = pytest.mark.skipif(not HAS_HIGHS, reason="needs the extra milp")


def layers(seed: int, *, step: int = 4, scale: float = 1.0, number: int = 24) -> Problem:
    """Layers at every step-th rank and dense, as a plan sees them."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(number):
        m, n = (int(side) * 64 for side in rng.integers(1, 6, 2))
        ranks = np.arange(step, (m * n - 1) // (m + n) + 1, step)
        spectrum = np.arange(1.0, min(m, n) + 1) ** -rng.uniform(0.5, 2.0) * rng.lognormal(0, 1)
        tail = np.append(np.cumsum(spectrum[::-1])[::-1], 0.0)
        cost, loss = np.append(ranks * (m + n), m * n), np.append(tail[ranks], 0.0)
        groups.append(Group(f"layer {g}", cost, loss * scale))
    return Problem(tuple(groups), sum(int(group.cost.max()) for group in groups) * 2 // 5)


@needs_highs
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_sum_attains_the_optimum(
    problems: Problems, optimum: Optimum, scale: float, data: st.DataObject
) -> None:
    problem = data.draw(problems(scale=scale))
    solution = solve(problem, "knapsack")
    verify(problem, solution)
    best = optimum(problem)
    assert solution.bound <= best * (1 + 1e-12)
    assert math.isclose(solution.loss, best, rel_tol=1e-9)
    assert {"columns", "highs_status", "kept_greedy"} <= solution.stats.keys()


@needs_highs
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_max_attains_the_best_level_and_the_best_sum_at_that_level(
    problems: Problems, optimum: Optimum, feasible_choices: Choices, data: st.DataObject
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
def test_on_layers_it_is_as_good_as_exact_at_every_scale(scale: float) -> None:
    greedy_beaten = 0
    for seed in range(3):
        problem = layers(seed, step=16, scale=scale)
        found, exact = solve(problem, "knapsack"), solve(problem, "exact")
        verify(problem, found)
        assert exact.status == "optimal" and "limit" not in found.stats["highs_status"]
        assert math.isclose(found.loss, exact.loss, rel_tol=1e-9)
        greedy_beaten += not found.stats["kept_greedy"]
    assert greedy_beaten >= 1


@needs_highs
@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
def test_with_every_rank_it_is_as_good_as_exact_where_highs_ends(scale: float) -> None:
    for seed in range(3):
        problem = layers(seed, step=1, scale=scale, number=60)
        found, exact = solve(problem, "knapsack"), solve(problem, "exact")
        verify(problem, found)
        assert found.loss >= exact.bound
        if "limit" not in found.stats["highs_status"]:
            assert math.isclose(found.loss, exact.loss, rel_tol=1e-9)


@needs_highs
@pytest.mark.parametrize("unit", [1, 10**6])
def test_it_finds_what_greedy_misses(unit: int) -> None:
    # "c" saves most per cost, but taking it leaves no room for the other two together.
    tables = {"a": ([0, 5], [5.0, 0.0]), "b": ([0, 5], [5.0, 0.0]), "c": ([0, 3], [3.1, 0.0])}
    groups = tuple(Group(n, np.array(c) * unit, np.array(v)) for n, (c, v) in tables.items())
    problem = Problem(groups, 10 * unit)
    solution = solve(problem, "knapsack")
    verify(problem, solution)
    assert solve(problem, "greedy").loss == 5.0
    assert solution.loss == 3.1 and not solution.stats["kept_greedy"]
    assert solution.stats["highs_gap"] == pytest.approx(0.0, abs=1e-6)


@needs_highs
def test_costs_that_highs_refuses_are_counted_in_a_larger_unit() -> None:
    # Nothing divides these costs, and HiGHS takes no coefficient above 1e15.
    unit = 10**16
    costs = [5 * unit + 1, 5 * unit + 2, 3 * unit + 7]
    groups = tuple(
        Group(f"g{i}", np.array([0, cost]), np.array([cost / unit + 0.1 * (i == 2), 0.0]))
        for i, cost in enumerate(costs)
    )
    roomy = Problem(groups, 10 * unit + 10**9)
    found = solve(roomy, "knapsack")
    verify(roomy, found)
    assert found.loss == pytest.approx(3.1) and found.stats["cost_unit"] > 1
    assert solve(roomy, "greedy").loss > 4.9
    for room in (3, 2):  # Exactly enough for the best choice, and one too little.
        tight = Problem(groups, 10 * unit + room)
        found = solve(tight, "knapsack")
        verify(tight, found)
        assert found.loss <= solve(tight, "greedy").loss
        assert found.status != "optimal"


@needs_highs
def test_out_of_time_it_answers_no_worse_than_greedy_and_without_a_warning(
    generic: Callable[..., Problem],
) -> None:
    problem = generic(150, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(problem, "knapsack", time_limit=1e-4)
    verify(problem, solution)
    assert solution.status == "time_limit"
    assert solution.loss <= solve(problem, "greedy").loss


@needs_highs
def test_told_to_stop_it_returns_the_greedy_choice(generic: Callable[..., Problem]) -> None:
    problem = generic(60, 20)
    solution = solve(problem, "knapsack", should_stop=lambda: True)
    assert solution.status == "time_limit" and solution.stats["kept_greedy"]
    assert solution.choice == solve(problem, "greedy").choice


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, math.inf])
def test_the_time_limit_must_be_positive(generic: Callable[..., Problem], limit: float) -> None:
    with pytest.raises(ValueError, match="time_limit"):
        solve(generic(2, 2), "knapsack", time_limit=limit)


@pytest.mark.parametrize("missing", ["cvxpy", "highspy", "scipy"])
@pytest.mark.parametrize("size", [1, 60])
def test_a_missing_package_names_the_extra(
    generic: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch, missing: str, size: int
) -> None:
    # Also where HiGHS would not be needed: an answer must not depend on luck.
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"rankopt\[milp\]"):
        solve(generic(size, 20), "knapsack")


def _small(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    groups = tuple(
        Group(f"g{i}", np.sort(rng.integers(0, 30, 4)), np.sort(rng.random(4))[::-1])
        for i in range(4)
    )
    return Problem(groups, sum(int(group.cost[1]) for group in groups) + 6)


def _constrained_optimum(problem: Problem, allowed: Callable[[tuple[int, ...]], bool]) -> float:
    every = itertools.product(*[range(group.cost.size) for group in problem.groups])
    fits = [c for c in every if problem.cost_of(c) <= problem.budget and allowed(c)]
    return min(map(problem.loss_of, fits), default=math.inf)


def _check_constrained(problem: Problem, found: Solution, best: float, free: float) -> None:
    """Optimal under the constraints; ``bound`` holds without them."""
    verify(problem, found)
    assert math.isclose(found.loss, best, rel_tol=1e-9)
    assert found.bound <= free * (1 + 1e-12)
    assert found.stats["constrained_bound"] <= best * (1 + 1e-12)
    assert found.stats["constrained_bound"] >= found.bound * (1 - 1e-12)
    if found.stats["constrained_status"] == "optimal":
        assert found.stats["constrained_bound"] == found.loss


@needs_highs
@pytest.mark.parametrize("seed", range(8))
def test_forced_and_forbidden_options(seed: int) -> None:
    problem = _small(seed)
    free = _constrained_optimum(problem, lambda choice: True)
    found = solve(problem, "knapsack", forced={"g0": 1}, forbidden={"g1": [0, 2], "g2": {3}})
    best = _constrained_optimum(problem, lambda c: c[0] == 1 and c[1] not in (0, 2) and c[2] != 3)
    _check_constrained(problem, found, best, free)
    assert found.stats["constrained_status"] == "optimal"


@needs_highs
@pytest.mark.parametrize("most", [0, 1, 2, 4])
def test_at_most_k_groups_change(most: int) -> None:
    base = (1, 1, 1, 1)
    for seed in range(6):
        problem = _small(seed)
        free = _constrained_optimum(problem, lambda choice: True)
        found = solve(problem, "knapsack", at_most_changed=(base, most))
        changed = sum(a != b for a, b in zip(found.choice, base, strict=True))
        assert changed <= most
        best = _constrained_optimum(
            problem, lambda c: sum(a != b for a, b in zip(c, base, strict=True)) <= most
        )
        _check_constrained(problem, found, best, free)


@needs_highs
def test_a_base_over_budget_forces_changes() -> None:
    problem = _small(0)
    base = tuple(group.cost.size - 1 for group in problem.groups)
    assert problem.cost_of(base) > problem.budget
    changes = lambda c: sum(a != b for a, b in zip(c, base, strict=True))  # noqa: E731
    for most in range(5):
        best = _constrained_optimum(problem, lambda c, most=most: changes(c) <= most)  # type: ignore[misc]
        if best == math.inf:
            with pytest.raises(InfeasibleError, match="changed groups"):
                solve(problem, "knapsack", at_most_changed=(base, most))
        else:
            found = solve(problem, "knapsack", at_most_changed=(base, most))
            assert math.isclose(found.loss, best, rel_tol=1e-9)


@needs_highs
def test_constraints_beside_side_budgets() -> None:
    for seed in range(6):
        problem = _small(seed)
        rng = np.random.default_rng(seed)
        costs = tuple(rng.integers(0, 9, group.cost.size) for group in problem.groups)
        side = SideBudget("latency", costs, 18)
        both = Problem(problem.groups, problem.budget, side_budgets=(side,))
        fits = lambda c, side=side: side.cost_of(c) <= side.limit  # noqa: E731
        free = _constrained_optimum(problem, fits)
        best = _constrained_optimum(
            problem,
            lambda c, fits=fits: fits(c) and c[3] == 2 and sum(j != 1 for j in c) <= 3,  # type: ignore[misc]
        )
        if best == math.inf:
            continue
        found = solve(both, "knapsack", forced={"g3": 2}, at_most_changed=((1, 1, 1, 1), 3))
        _check_constrained(both, found, best, free)


@needs_highs
@pytest.mark.parametrize(
    ("constraints", "says"),
    [
        ({"forced": {"g9": 0}}, "'g9'"),
        ({"forbidden": {"g9": [0]}}, "'g9'"),
        ({"forced": {"g1": 4}}, "option 4 of group 'g1'"),
        ({"forced": {"g1": -1}}, "option -1"),
        ({"forbidden": {"g1": [0.5]}}, r"option 0\.5"),
        ({"forbidden": {"g2": range(4)}}, "'g2'.*none of its 4"),
        ({"forced": {"g2": 1}, "forbidden": {"g2": [1]}}, "none"),
        ({"at_most_changed": ([0, 0], 1)}, "2 options for 4 groups"),
        ({"at_most_changed": ([0, 0, 0, 4], 1)}, "option 4"),
        ({"at_most_changed": ([0, 0, 0, 0], -1)}, ">= 0"),
    ],
)
def test_constraints_that_make_no_sense_are_refused(
    constraints: dict[str, object], says: str
) -> None:
    with pytest.raises(ProblemError, match=says):
        solve(_small(0), "knapsack", **constraints)


@needs_highs
def test_constraints_over_the_budget_name_the_least_budget_that_allows_them() -> None:
    problem = _small(1)
    forced = {group.name: 3 for group in problem.groups}
    with pytest.raises(InfeasibleError) as caught:
        solve(problem, "knapsack", forced=forced)
    assert caught.value.smallest == sum(int(group.cost[3]) for group in problem.groups)


@needs_highs
def test_called_directly_it_takes_sums_only(generic: Callable[..., Problem]) -> None:
    made = generic(3, 3)
    with pytest.raises(ProblemError, match="sum"):
        solve_knapsack(Problem(made.groups, made.budget, "max"))
