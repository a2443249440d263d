"""Several budgets: the relaxation is the relaxation, bounds are bounds, choices fit."""

import dataclasses
import functools
import itertools
import math
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt_solvers import (
    Group,
    InfeasibleError,
    NoChoiceFoundError,
    Problem,
    SideBudget,
    solve,
    verify,
)
from rankopt_solvers.knapsack import several as several_module
from rankopt_solvers.knapsack.budgets import claim, normal_form, priced
from rankopt_solvers.knapsack.columns import Excess, Linear, relax_columns
from rankopt_solvers.knapsack.rounding import least_beside, repair, round_mixture

HAS_HIGHS = find_spec("cvxpy") is not None and find_spec("highspy") is not None
needs_highs = pytest.mark.skipif(not HAS_HIGHS, reason="needs the extra milp")


def never() -> bool:
    return False


def several(
    seed: int, groups: int = 5, options: int = 4, sides: int = 2, share: float = 0.45
) -> Problem:
    """Random costs in every budget, unrelated to each other; sometimes nothing meets them all."""
    rng = np.random.default_rng(seed)
    made, tables = [], [[] for _ in range(sides)]  # type: ignore[var-annotated]
    for g in range(groups):
        made.append(Group(f"g{g}", np.sort(rng.integers(0, 40, options)), rng.random(options)))
        for table in tables:
            table.append(rng.integers(0, 30, options) * 3)

    def limit(costs: list[np.ndarray]) -> int:
        least = sum(int(cost.min()) for cost in costs)
        return least + int(share * (sum(int(cost.max()) for cost in costs) - least))

    return Problem(
        tuple(made),
        limit([group.cost for group in made]),
        side_budgets=tuple(
            SideBudget(f"side {i}", tuple(table), limit(table)) for i, table in enumerate(tables)
        ),
    )


def optimum(problem: Problem) -> float:
    """By enumeration; inf if no choice meets all budgets."""
    every = itertools.product(*[range(group.cost.size) for group in problem.groups])
    fits = (
        problem.loss_of(choice)
        for choice in every
        if problem.cost_of(choice) <= problem.budget
        and all(side.cost_of(choice) <= side.limit for side in problem.side_budgets)
    )
    return min(fits, default=math.inf)


@st.composite
def ugly(draw: st.DrawFn) -> Problem:
    """Few distinct values: ties, zero costs, equal options; two or three budgets, often tight."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    few = st.sampled_from([0, 1, 2, 3, 5, 8])
    column = lambda size: st.lists(few, min_size=size, max_size=size)  # noqa: E731
    groups = tuple(
        Group(f"g{i}", np.array(draw(column(n))), np.array(draw(column(n)), dtype=float))
        for i, n in enumerate(sizes)
    )
    sides = []
    for i in range(draw(st.sampled_from([1, 2]))):
        costs = tuple(np.array(draw(column(n))) for n in sizes)
        least = sum(int(cost.min()) for cost in costs)
        sides.append(SideBudget(f"side {i}", costs, least + draw(st.integers(0, 8))))
    least = sum(int(group.cost.min()) for group in groups)
    return Problem(groups, least + draw(st.integers(0, 8)), side_budgets=tuple(sides))


@needs_highs
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=ugly())
def test_the_optimum_of_small_problems_or_the_proof_that_there_is_none(problem: Problem) -> None:
    best = optimum(problem)
    if best == math.inf:
        with pytest.raises(InfeasibleError):
            solve(problem, "knapsack")
        return
    found = solve(problem, "knapsack")
    verify(problem, found)
    assert found.loss == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert found.bound <= best * (1 + 1e-12)


@needs_highs
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("sides", [1, 2])
def test_the_optimum_at_every_scale(sides: int, scale: float) -> None:
    highs_used = 0
    for seed in range(6):
        plain = several(seed, sides=sides)
        groups = tuple(Group(g.name, g.cost, g.loss * scale) for g in plain.groups)
        problem = dataclasses.replace(plain, groups=groups)
        best = optimum(problem)
        if best == math.inf:
            with pytest.raises(InfeasibleError):
                solve(problem, "knapsack")
            continue
        found = solve(problem, "knapsack")
        verify(problem, found)
        assert math.isclose(found.loss, best, rel_tol=1e-9)
        assert found.bound <= best * (1 + 1e-12)
        highs_used += found.stats["columns"] > 0
    assert highs_used >= 3


@needs_highs
@pytest.mark.parametrize("seed", range(4))
def test_the_relaxation_has_the_value_that_highs_finds_over_all_options(seed: int) -> None:
    from scipy.optimize import linprog

    problem = several(seed, groups=40, options=30, sides=2, share=0.3)
    budgets = normal_form(problem)
    linear = relax_columns(budgets, never)
    assert isinstance(linear, Linear)
    one_each = np.equal.outer(np.arange(40), budgets.group).astype(float)
    direct = linprog(
        budgets.loss, A_ub=budgets.cost, b_ub=budgets.room, A_eq=one_each, b_eq=np.ones(40)
    )
    assert linear.value == pytest.approx(direct.fun, rel=1e-9)
    # The numpy bound at HiGHS's prices reaches the value: the prices are the right ones.
    assert linear.at.bound == pytest.approx(direct.fun, rel=1e-9)
    assert linear.columns < budgets.loss.size
    mixed = np.bincount(np.searchsorted(budgets.start, linear.column, side="right") - 1) > 1
    assert mixed.sum() <= budgets.room.size


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=ugly(), data=st.data())
def test_any_prices_give_a_bound(problem: Problem, data: st.DataObject) -> None:
    budgets = normal_form(problem)
    rows = budgets.room.size
    price = st.lists(st.floats(0.0, 20.0, allow_subnormal=False), min_size=rows, max_size=rows)
    at = priced(budgets, np.array(data.draw(price)))
    best = optimum(problem)
    assert at.bound <= best
    bound, lam, side_lams = claim(problem, budgets, at)
    assert bound <= best
    assert lam >= 0 and len(side_lams) == len(problem.side_budgets)


def _with_side(problem: Problem, factor: int, limit: int) -> Problem:
    """A second budget whose costs are in proportion, up to a constant for each group."""
    costs = tuple(factor * group.cost + 7 * g for g, group in enumerate(problem.groups))
    constant = sum(7 * g for g in range(len(problem.groups)))
    side = SideBudget("flops", costs, factor * limit + constant + factor - 1)
    return dataclasses.replace(problem, side_budgets=(*problem.side_budgets, side))


@needs_highs
@pytest.mark.parametrize("looser", [True, False])
def test_a_proportional_budget_is_the_tighter_of_the_two(looser: bool) -> None:
    plain = several(3, groups=12, options=8, sides=0, share=0.15)
    limit = plain.budget + (5 if looser else -5)
    problem = _with_side(plain, 6, limit)
    budgets = normal_form(problem)
    assert budgets.which == ((0,) if looser else (1,))
    found = solve(problem, "knapsack")
    verify(problem, found)
    exact = solve(plain.with_budget(min(plain.budget, limit)), "exact")
    assert exact.status == "optimal" and found.loss == exact.loss
    assert found.stats["exact_status"] == "optimal" and found.stats["exact_bound"] == exact.loss
    assert found.status == "optimal" or not looser
    # The multiplier stands at the budget that counts.
    lams = (found.multiplier, *found.side_multipliers)
    assert lams[0 if looser else 1] > 0 and lams[1 if looser else 0] == 0.0


def test_of_proportional_side_budgets_one_stays_and_slack_ones_go() -> None:
    problem = several(0, groups=6, sides=1)
    side = problem.side_budgets[0]
    twice = SideBudget("twice", tuple(2 * c for c in side.costs), 2 * side.limit - 6)
    most = sum(int(cost.max()) for cost in side.costs)
    slack = SideBudget("slack", tuple(c[::-1].copy() for c in side.costs), most)
    fixed = SideBudget("fixed", tuple(np.full(c.size, 3) for c in side.costs), 18)
    every = dataclasses.replace(problem, side_budgets=(side, twice, slack, fixed))
    budgets = normal_form(every)
    assert budgets.which == (0, 2)
    # Costs of 3 and 6 units: a limit is worth whole units only.
    assert budgets.unit[1] == 2 * int(functools.reduce(np.gcd, np.concatenate(side.costs)))


def test_almost_proportional_costs_stay() -> None:
    plain = several(1, groups=6, sides=0)
    problem = _with_side(plain, 3, plain.budget)
    costs = [cost.copy() for cost in problem.side_budgets[0].costs]
    costs[2][1] += 1
    side = SideBudget("flops", tuple(costs), problem.side_budgets[0].limit)
    assert normal_form(dataclasses.replace(problem, side_budgets=(side,))).which == (0, 1)


@needs_highs
def test_an_option_that_is_dearer_and_worse_can_be_the_only_one_that_fits() -> None:
    cheap = Group("a", np.array([1, 2]), np.array([0.5, 0.9]))
    other = Group("b", np.array([1, 2]), np.array([0.3, 0.1]))
    side = SideBudget("latency", (np.array([9, 1]), np.array([2, 5])), 6)
    problem = Problem((cheap, other), 4, side_budgets=(side,))
    found = solve(problem, "knapsack")
    verify(problem, found)
    assert found.choice == (1, 1)


def _torn(groups: int) -> Problem:
    """Each group is cheap in one budget or the other; half of each is not enough."""
    made = tuple(Group(f"g{i}", np.array([0, 4]), np.array([0.2, 0.1])) for i in range(groups))
    costs = tuple(np.array([4, 0]) for _ in range(groups))
    side = SideBudget("latency", costs, 2 * groups - 1)
    return Problem(made, 2 * groups - 1, side_budgets=(side,))


@needs_highs
@pytest.mark.parametrize("groups", [6, 400])
def test_budgets_that_contradict_each_other_are_proven_to(groups: int) -> None:
    problem = _torn(groups)
    assert isinstance(relax_columns(normal_form(problem), never), Excess)
    with pytest.raises(InfeasibleError, match="beside") as caught:
        solve(problem, "knapsack")
    enough = caught.value.smallest
    assert caught.value.budget < enough
    name = caught.value.what.split(" (")[0]
    side = problem.side_budgets[0]
    # One unit less than what is named does not help: it is a lower bound on what is needed.
    for more, fits in ((enough - 1, False), (enough + 8, True)):
        if name == "budget":
            other = dataclasses.replace(problem, budget=more)
        else:
            other = dataclasses.replace(
                problem, side_budgets=(dataclasses.replace(side, limit=more),)
            )
        if fits:
            verify(other, solve(other, "knapsack"))
        else:
            with pytest.raises(InfeasibleError):
                solve(other, "knapsack")


@needs_highs
def test_mixtures_meet_these_budgets_but_choices_do_not() -> None:
    groups = tuple(Group(f"g{i}", np.array([0, 2]), np.array([1.0, 0.5])) for i in range(3))
    side = SideBudget("latency", tuple(np.array([2, 0]) for _ in range(3)), 3)
    problem = Problem(groups, 3, side_budgets=(side,))
    assert normal_form(problem).room.tolist() == [1, 1]
    # One that costs 1 on either side: limits are no longer worth whole units of 3 only.
    odd = tuple(Group(g.name, g.cost + np.array([0, 1]), g.loss) for g in groups)
    mixed = Problem(
        (Group("unit", np.array([0, 1]), np.array([1.0, 0.5])), *odd),
        5,
        side_budgets=(SideBudget("latency", (np.array([1, 0]), *[np.array([3, 0])] * 3), 5),),
    )
    assert optimum(mixed) == math.inf
    assert isinstance(relax_columns(normal_form(mixed), never), Linear)
    proof = least_beside(normal_form(mixed))
    assert proof is not None and proof[1] > normal_form(mixed).room[proof[0]]
    with pytest.raises(InfeasibleError):
        solve(mixed, "knapsack")


@needs_highs
def test_where_nothing_is_found_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = several(0)
    monkeypatch.setattr(several_module, "round_mixture", lambda *_: None)
    with pytest.raises(NoChoiceFoundError, match="more time"):
        solve(problem, "knapsack", should_stop=lambda: True)


@needs_highs
def test_highs_finds_a_choice_where_rounding_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = several(0)
    monkeypatch.setattr(several_module, "round_mixture", lambda *_: None)
    found = solve(problem, "knapsack")
    verify(problem, found)
    assert math.isclose(found.loss, optimum(problem), rel_tol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=ugly())
def test_enumeration_proves_only_what_is_true(problem: Problem) -> None:
    budgets = normal_form(problem)
    proof = least_beside(budgets) if budgets.room.size > 1 else None
    assert (proof is not None) == (optimum(problem) == math.inf)


@needs_highs
@pytest.mark.parametrize("seed", range(5))
def test_rounding_meets_all_budgets_and_leaves_nothing_that_fits(seed: int) -> None:
    budgets = normal_form(several(seed, groups=30, options=12))
    linear = relax_columns(budgets, never)
    assert isinstance(linear, Linear)
    found = round_mixture(budgets, linear.column, linear.weight, linear.at.price)
    assert found is not None and (budgets.left(found) >= 0).all()
    here = found[budgets.group]
    fits = (budgets.cost - budgets.cost[:, here] <= budgets.left(found)[:, None]).all(axis=0)
    assert not (fits & (budgets.loss < budgets.loss[here])).any()
    # From the worst place to start from, too.
    dearest = np.array(
        [a + int(budgets.cost[0, a:b].argmax()) for a, b in itertools.pairwise(budgets.start)]
    )
    if repair(budgets, dearest, linear.at.price):
        assert (budgets.left(dearest) >= 0).all()


@needs_highs
def test_told_to_stop_it_returns_what_rounding_found() -> None:
    problem = several(2, groups=40, options=20)
    found = solve(problem, "knapsack", should_stop=lambda: True)
    verify(problem, found)
    assert found.status == "time_limit" and found.stats["columns"] == 0
    assert found.stats["kept_greedy"] and 0.0 <= found.gap < 1.0


@needs_highs
def test_a_sample_of_the_options_leaves_the_bound_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = several(4, groups=40, options=40, share=0.3)
    whole = solve(problem, "knapsack", time_limit=3.0)
    monkeypatch.setattr(several_module, "FEW_COLUMNS", 60)
    monkeypatch.setattr(several_module, "MOST_COLUMNS", 80)
    monkeypatch.setattr(several_module, "NEAR", 100)
    part = solve(problem, "knapsack", time_limit=3.0)
    for found in (whole, part):
        verify(problem, found)
    assert part.bound == whole.bound and part.loss >= whole.bound
    assert part.stats["columns"] < whole.stats["columns"] or part.stats["all_columns"]


@needs_highs
@pytest.mark.slow
def test_many_options_and_three_budgets() -> None:
    problem = several(0, groups=400, options=500, share=0.2)
    found = solve(problem, "knapsack", time_limit=10.0)
    verify(problem, found)
    assert found.gap < 1e-2
