"""Numbers at the ends of their ranges, budgets that bind or not, constraints, in any combination.

Every answer is held against enumeration in exact fractions.
"""

import itertools
import warnings
from collections.abc import Iterator
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankopt_solvers import (
    Group,
    InfeasibleError,
    NoChoiceFoundError,
    Problem,
    ProblemError,
    SideBudget,
    Solution,
    frontier,
    margins,
    solve,
    verify,
)

needs_highs = pytest.mark.skipif(
    not (find_spec("cvxpy") and find_spec("highspy")), reason="needs the extra milp"
)

#: What one problem's losses are drawn from: all alike, or a mixture.
LOSSES = (
    st.integers(0, 4).map(float),
    st.integers(0, 3).map(lambda n: n * 5e-324),
    st.just(0.0),
    st.floats(0.0, 1e307, allow_subnormal=False),
    st.sampled_from([0.0, 5e-324, 2e-308, 1e-200, 1.0, 1e200, 3e306]),
    st.integers(0, 4).map(lambda n: 1.0 + n * 2.0**-52),
)
COSTS = (
    st.integers(0, 6),
    st.integers(0, 1000),
    st.integers(0, 2**59),
    st.just(5),
    st.sampled_from([0, 1, 2**59 - 1, 2**59]),
)


@st.composite
def groups(draw: st.DrawFn) -> tuple[Group, ...]:
    loss, cost = draw(st.sampled_from(LOSSES)), draw(st.sampled_from(COSTS))
    found = []
    for g in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 4))
        costs = draw(st.lists(cost, min_size=size, max_size=size))
        losses = draw(st.lists(loss, min_size=size, max_size=size))
        found.append(Group(f"g{g}", np.array(costs, dtype=np.int64), np.array(losses)))
    return tuple(found)


@st.composite
def limits(draw: st.DrawFn, costs: list[list[int]]) -> int:
    low, high = sum(map(min, costs)), sum(map(max, costs))
    return draw(st.sampled_from([low, high, high + 5, 2**62, low - 1]) | st.integers(low, high))


@st.composite
def problems(draw: st.DrawFn, most_sides: int) -> Problem:
    made = draw(groups())
    sides = []
    for n in range(draw(st.integers(0, most_sides))):
        cost = draw(st.sampled_from(COSTS[:2]))
        sizes = [group.cost.size for group in made]
        costs = [draw(st.lists(cost, min_size=size, max_size=size)) for size in sizes]
        sides.append(SideBudget(f"s{n}", tuple(map(np.array, costs)), draw(limits(costs))))
    budget = draw(limits([group.cost.tolist() for group in made]))
    return Problem(made, budget, "sum", tuple(sides))


@st.composite
def constraints(draw: st.DrawFn, problem: Problem) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sizes = {group.name: group.cost.size for group in problem.groups}
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(sizes)))
        found["forced"] = {name: draw(st.integers(0, sizes[name] - 1))}
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(sizes)))
        found["forbidden"] = {name: draw(st.sets(st.integers(0, sizes[name] - 1)))}
    if draw(st.booleans()):
        base = [draw(st.integers(0, size - 1)) for size in sizes.values()]
        found["at_most_changed"] = (base, draw(st.integers(0, len(sizes))))
    return found


def choices(problem: Problem, asked: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    names = [group.name for group in problem.groups]
    base, most = asked.get("at_most_changed", ((0,) * len(names), len(names)))
    for choice in itertools.product(*(range(group.cost.size) for group in problem.groups)):
        by_name = dict(zip(names, choice, strict=True))
        if (
            problem.cost_of(choice) <= problem.budget
            and all(side.cost_of(choice) <= side.limit for side in problem.side_budgets)
            and all(by_name[name] == j for name, j in asked.get("forced", {}).items())
            and all(by_name[name] not in out for name, out in asked.get("forbidden", {}).items())
            and sum(a != b for a, b in zip(choice, base, strict=True)) <= most
        ):
            yield choice


def exact_loss(problem: Problem, choice: tuple[int, ...]) -> Fraction:
    taken = zip(problem.groups, choice, strict=True)
    return sum((Fraction(float(group.loss[j])) for group, j in taken), Fraction(0))


def check(problem: Problem, found: Solution, asked: dict[str, Any]) -> None:
    """Within all limits, bound <= optimum <= loss, and optimal only where that is so."""
    free = min(exact_loss(problem, choice) for choice in choices(problem, {}))
    best = min(exact_loss(problem, choice) for choice in choices(problem, asked))
    rounding = 1 + Fraction(len(problem.groups), 2**52)
    assert found.choice in set(choices(problem, asked))
    assert Fraction(found.bound) <= free * rounding and found.bound <= found.loss
    assert Fraction(found.loss) * rounding >= best
    if found.status == "optimal":
        assert exact_loss(problem, found.choice) <= free * rounding
    if "constrained_bound" in found.stats:
        assert Fraction(found.stats["constrained_bound"]) <= best * rounding
    if found.stats.get("constrained_status") == "optimal":
        assert exact_loss(problem, found.choice) <= best * rounding
    verify(problem, found)
    assert not np.isnan(margins(problem, found)).any()


def quickly(n: int) -> Any:
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@quickly(150)
@given(problem=problems(most_sides=0))
def test_one_budget_and_any_numbers(problem: Problem) -> None:
    if not any(True for _ in choices(problem, {})):
        for solver in ("exact", "greedy", "density"):
            with pytest.raises(InfeasibleError):
                solve(problem, solver)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in ("exact", "greedy", "density"):
            check(problem, solve(problem, solver), {})
        assert solve(problem).status == "optimal"
        curve, best = (
            frontier(problem),
            min(exact_loss(problem, choice) for choice in choices(problem, {})),
        )
        check(problem, curve.nested(problem.budget), {})
        assert Fraction(curve.bound(problem.budget)) <= best * (1 + Fraction(1, 2**50))


@needs_highs
@quickly(60)
@given(data=st.data())
def test_any_budgets_and_any_constraints(data: st.DataObject) -> None:
    problem = data.draw(problems(most_sides=2))
    asked = data.draw(constraints(problem))
    there = any(True for _ in choices(problem, asked))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if there:
            check(problem, solve(problem, "knapsack", time_limit=2.0, **asked), asked)
            return
        with pytest.raises((InfeasibleError, NoChoiceFoundError, ProblemError)):
            solve(problem, "knapsack", time_limit=2.0, **asked)


@needs_highs
@pytest.mark.parametrize("sides", [(), (8,), (7,), (8, 9)])
@pytest.mark.parametrize(
    ("asked", "choice"),
    [
        ({"forbidden": {"a": [1]}}, (0, 1)),
        ({"forced": {"a": 0}}, (0, 1)),
        ({"at_most_changed": ([0, 0], 0)}, (0, 0)),
        ({"forced": {}, "forbidden": {"b": []}, "at_most_changed": ([1, 0], 1)}, (1, 1)),
    ],
)
def test_constraints_hold_where_no_budget_can_be_exceeded(
    sides: tuple[int, ...], asked: dict[str, Any], choice: tuple[int, ...]
) -> None:
    made = tuple(Group(name, np.array([1, 2]), np.array([2.0, n])) for n, name in enumerate("ab"))
    extra = tuple(
        SideBudget(f"s{n}", (np.array([3, 4]), np.array([3, 4])), limit)
        for n, limit in enumerate(sides)
    )
    found = solve(Problem(made, 4, "sum", extra), "knapsack", **asked)
    if 7 in sides and choice == (1, 1):
        assert found.choice in ((1, 0), (0, 1))
    else:
        assert found.choice == choice
    assert found.stats["constrained_bound"] <= found.loss


@needs_highs
def test_constraints_that_contradict_each_other_say_what_is_needed() -> None:
    made = tuple(Group(name, np.array([1, 2]), np.array([1.0, 0.0])) for name in "ab")
    with pytest.raises(
        InfeasibleError, match=r"number of changed groups of 0: the cheapest cos.*1"
    ):
        solve(Problem(made, 4), "knapsack", forced={"a": 1}, at_most_changed=([0, 0], 0))


@pytest.mark.parametrize("costs", [[2**62, 1], [2**63 - 1], np.array([2**63], dtype=np.uint64)])
def test_costs_that_could_overflow_are_refused(costs: Any) -> None:
    with pytest.raises(ProblemError, match=r"2\*\*62"):
        Problem((Group("a", costs, [1.0] * len(costs)), Group("b", [2**61], [0.0])), 5)  # type: ignore[arg-type]


def test_losses_that_could_overflow_are_refused() -> None:
    with pytest.raises(ProblemError, match="cannot be added up"):
        Problem(tuple(Group(name, [1], [1e308]) for name in "ab"), 5)  # type: ignore[arg-type]


def test_bound_of_the_smallest_losses_is_not_above_the_optimum() -> None:
    """A loss saved of 5e-324 for a cost of 400 has a slope that is rounded to nothing."""
    made = Group("a", np.array([55, 97, 451]), np.array([5e-324, 5e-324, 0.0]))
    problem = Problem((made,), 451)
    curve = frontier(problem)
    assert curve.bound(451) == solve(problem).loss == 0.0
    assert curve.bound(450) <= solve(problem.with_budget(450)).loss == 5e-324
