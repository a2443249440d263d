"""The hull against its definition, the bound against enumeration."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt_solvers import Group, Problem
from rankopt_solvers.hull import hull_edges, lagrangian_bound, multiplier, tightened_budget

Problems = Callable[..., st.SearchStrategy[Problem]]
Point = tuple[int, Fraction]


def points(group: Group) -> list[Point]:
    """The options as exact numbers: geometry without rounding."""
    pairs = zip(group.cost.tolist(), group.loss.tolist(), strict=True)
    return [(cost, Fraction(loss)) for cost, loss in pairs]


def undominated(options: list[Point]) -> list[Point]:
    return sorted(
        {p for p in options if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in options)}
    )


def is_vertex(point: Point, options: list[Point]) -> bool:
    """No chord between a cheaper and a dearer option passes through or below the point."""
    c, v = point
    return all(
        (v - v1) * (c2 - c1) < (v2 - v1) * (c - c1)
        for c1, v1 in options
        for c2, v2 in options
        if c1 < c < c2
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_hull_and_pareto_match_their_definitions(problems: Problems, data: st.DataObject) -> None:
    # Small whole losses keep the float slopes exact enough to separate any two of them.
    for group in data.draw(problems(whole=True)).groups:
        options, hull = points(group), group.hull
        front = undominated(options)
        assert [options[j] for j in group.pareto] == front
        assert [options[j] for j in hull.vertices] == [p for p in front if is_vertex(p, front)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_option_lies_on_or_above_the_hull(problems: Problems, data: st.DataObject) -> None:
    for group in data.draw(problems()).groups:
        hull = group.hull
        assert hull.slopes.size == hull.vertices.size - 1
        assert (hull.slopes > 0).all() and (hull.slopes[1:] <= hull.slopes[:-1]).all()
        edges = zip(hull.vertices, hull.vertices[1:], hull.slopes, strict=False)
        for start, _, slope in edges:
            line = group.loss[start] - slope * (group.cost - group.cost[start])
            assert (group.loss >= line - 1e-12).all()
        assert group.loss[hull.vertices[-1]] == group.loss.min()
        assert group.cost[hull.vertices[0]] == group.cost.min()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_multiplier_proves_too_much(
    problems: Problems, optimum: Callable[[Problem], float], data: st.DataObject
) -> None:
    problem = data.draw(problems())
    anything = st.floats(0.0, 1e12)
    slopes = [0.0, *hull_edges(problem).slope.tolist()]
    lam = data.draw(st.one_of(anything, st.sampled_from(slopes)))
    assert lagrangian_bound(problem, lam) <= optimum(problem)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_multiplier_proves_more_than_the_one_chosen(
    problems: Problems, data: st.DataObject
) -> None:
    problem = data.draw(problems())
    edges = hull_edges(problem)
    best = lagrangian_bound(problem, multiplier(problem, edges))
    for lam in [0.0, data.draw(st.floats(0.0, 20.0)), *edges.slope.tolist()]:
        assert lagrangian_bound(problem, lam) <= best + 1e-9


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_tightened_budget_loses_no_useful_choice(
    problems: Problems,
    feasible_choices: Callable[[Problem], list[tuple[int, ...]]],
    data: st.DataObject,
) -> None:
    problem = data.draw(problems())
    useful = [
        problem.cost_of(choice)
        for choice in feasible_choices(problem)
        if all(j in group.pareto for group, j in zip(problem.groups, choice, strict=True))
    ]
    assert max(useful) <= tightened_budget(problem) <= problem.budget


def test_the_budget_is_tightened_to_the_common_step() -> None:
    # Only 7, 17, 27, 37 and so on can be spent; the dominated option of cost 8 does not count.
    steps = Group("a", np.array([7, 8, 17, 37]), np.array([9.0, 9.0, 5.0, 0.0]))
    assert tightened_budget(Problem((steps,), 36)) == 27
    assert tightened_budget(Problem((steps,), 37)) == 37


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_edges_come_best_first_and_in_order_inside_a_group(
    problems: Problems, data: st.DataObject
) -> None:
    problem = data.draw(problems())
    edges = hull_edges(problem)
    assert (edges.slope[1:] <= edges.slope[:-1]).all()
    for index, group in enumerate(problem.groups):
        mine = edges.group == index
        assert edges.target[mine].tolist() == group.hull.vertices[1:].tolist()
        spent = group.cost.min() + edges.cost[mine].sum()
        assert spent == group.cost[group.hull.vertices[-1]]
