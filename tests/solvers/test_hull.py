"""The hull against its definition, the relaxation against sorting, bounds against enumeration."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rankopt_solvers.table as table_module
from rankopt_solvers import Group, Problem
from rankopt_solvers.hull import Hulls, Relaxation, lower_bound, lower_hulls, relax
from rankopt_solvers.table import Table, tabulate

Problems = Callable[..., st.SearchStrategy[Problem]]
Optimum = Callable[[Problem], float]


def is_vertex(k: int, row: list[tuple[int, Fraction]]) -> bool:
    """No chord between a cheaper and a dearer option passes through or below the point."""
    c, v = row[k]
    return all(
        (v - v1) * (c2 - c1) < (v2 - v1) * (c - c1) for c1, v1 in row[:k] for c2, v2 in row[k + 1 :]
    )


def brute_hull(table: Table, row: int) -> list[int]:
    """Positions of the vertices, from exact numbers and the definition."""
    start, end = int(table.start[row]), int(table.start[row + 1])
    points = [(int(table.cost[p]), Fraction(float(table.loss[p]))) for p in range(start, end)]
    return [start + k for k in range(len(points)) if is_vertex(k, points)]


def vertices(hulls: Hulls, row: int) -> list[int]:
    return list(hulls.vertex[hulls.start[row] : hulls.start[row + 1]].tolist())


def exact_bound(problem: Problem, lam: float) -> Fraction:
    """The Lagrangian function at the tightened budget, in exact numbers."""
    price = Fraction(lam)
    least = sum(
        min(Fraction(v) + price * c for c, v in zip(g.cost.tolist(), g.loss.tolist(), strict=True))
        for g in problem.groups
    )
    return least - price * problem.table.tightened(problem.budget)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_vertices_are_those_of_the_definition(problems: Problems, data: st.DataObject) -> None:
    # Small whole losses keep the float slopes exact enough to separate any two of them.
    problem = data.draw(problems(whole=True))
    for row in range(len(problem.groups)):
        assert vertices(problem.hulls, row) == brute_hull(problem.table, row)


@pytest.mark.parametrize("block", [16, 2**15])
@pytest.mark.parametrize("curve", ["random", "convex", "concave", "dense", "steps", "noisy"])
@pytest.mark.parametrize("seed", range(3))
def test_long_rows_have_the_vertices_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, curve: str, seed: int, block: int
) -> None:
    monkeypatch.setattr(table_module, "BLOCK", block)
    rng = np.random.default_rng(seed)
    options = []
    for k in rng.integers(1, 45, 8).tolist():
        cost = np.cumsum(rng.integers(1, 20, k))
        falling = np.arange(k, 0, -1)
        loss = {
            "random": np.sort(rng.integers(0, 2**30, k))[::-1],
            "convex": falling**2,
            "concave": 2**12 - np.arange(k) ** 2,
            "dense": np.append(falling[:-1] ** 2 + 9000, 0),
            "steps": falling // 5 * 100 + falling,
            "noisy": falling**3 + rng.integers(0, 50, k),
        }[curve]
        options.append((cost, loss.astype(np.float64)))
    table = tabulate(options)
    hulls = lower_hulls(table)
    for row in range(table.rows):
        assert vertices(hulls, row) == brute_hull(table, row)


def test_points_on_a_line_are_no_vertices() -> None:
    table = tabulate([(np.arange(0, 5000), np.arange(5000, 0, -1).astype(np.float64))])
    assert lower_hulls(table).vertex.tolist() == [0, 4999]


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_option_lies_on_or_above_the_hull(ugly: Problems, data: st.DataObject) -> None:
    problem = data.draw(ugly())
    table, hulls = problem.table, problem.hulls
    for row in range(table.rows):
        own = slice(int(hulls.start[row]), int(hulls.start[row + 1]))
        vertex, slope = hulls.vertex[own], hulls.slope[own]
        assert vertex[0] == table.start[row] and vertex[-1] == table.start[row + 1] - 1
        assert slope[-1] == -1.0 and (slope[:-1] >= 0).all() and (np.diff(slope[:-1]) < 0).all()
        for (a, b), s in zip(itertools.pairwise(vertex.tolist()), slope.tolist(), strict=False):
            between = slice(a, b + 1)
            spent = (table.cost[between] - table.cost[a]).astype(np.float64)
            line = table.loss[a] - s * spent
            slack = 1e-14 * table.loss[a] + 5e-324 * (1 + spent)
            assert (table.loss[between] >= line - slack).all()


def by_sorting(table: Table, hulls: Hulls, budget: int) -> float:
    """The break slope from all edges in order."""
    edges = np.flatnonzero(hulls.slope > 0)
    order = edges[np.argsort(-hulls.slope[edges], kind="stable")]
    weight = table.cost[hulls.vertex[order + 1]] - table.cost[hulls.vertex[order]]
    spent = int(table.cost[hulls.vertex[hulls.start[:-1]]].sum()) + np.cumsum(weight)
    over = np.flatnonzero(spent > budget)
    return float(hulls.slope[order[over[0]]]) if over.size else 0.0


def convex_rows(rng: np.random.Generator, groups: int, options: int, slopes: str) -> Table:
    """Rows of which every option is a vertex."""
    rows = []
    for _ in range(groups):
        extra = rng.integers(1, 6, options)
        if slopes == "few":
            # The same fifty slopes in all rows: long runs of ties.
            density = np.sort(rng.choice(np.arange(1, 51), options, replace=False))[::-1]
        elif slopes == "weights":
            extra[rng.integers(0, options)] = 10**9
            density = np.sort(rng.random(options))[::-1]
        else:
            density = np.sort(rng.lognormal(0.0, 3.0, options))[::-1]
        saved = np.append(np.cumsum((density * extra)[::-1])[::-1], 0.0)
        rows.append((np.concatenate(([0], np.cumsum(extra))), saved))
    return tabulate(rows)


@pytest.mark.parametrize("slopes", ["few", "weights", "many"])
@pytest.mark.parametrize(("groups", "options"), [(3, 20), (60, 40), (300, 40), (1000, 8)])
def test_the_break_slope_is_that_of_sorting_all_edges(
    slopes: str, groups: int, options: int
) -> None:
    rng = np.random.default_rng(groups)
    table = convex_rows(rng, groups, options, slopes)
    hulls = lower_hulls(table)
    base = int(table.cost[table.start[:-1]].sum())
    most = int(table.cost[table.start[1:] - 1].sum())
    shares = [*rng.random(12), 1e-5, 0.999999]
    for budget in [base, base + 1, most - 1, most, *(int(s * most) for s in shares)]:
        found = relax(table, hulls, budget)
        assert found.multiplier == by_sorting(table, hulls, budget)
        check_relaxation(table, hulls, found, budget)


def test_one_slope_shared_by_every_edge() -> None:
    table = tabulate([(np.array([0, 3]), np.array([6.0, 0.0]))] * 5000)
    hulls = lower_hulls(table)
    for fitting in (0, 1, 2500, 4999, 5000):
        found = relax(table, hulls, 3 * fitting + 1)
        check_relaxation(table, hulls, found, 3 * fitting + 1)
        assert found.multiplier == (2.0 if fitting < 5000 else 0.0)
        assert int(table.cost[found.position].sum()) == 3 * fitting


def check_relaxation(table: Table, hulls: Hulls, found: Relaxation, budget: int) -> None:
    spent = int(table.cost[found.position].sum())
    assert found.room == budget - spent >= 0
    for row, position in enumerate(found.position.tolist()):
        own = vertices(hulls, row)
        slope = hulls.slope[hulls.start[row] : hulls.start[row + 1]]
        k = own.index(position)
        # Edges before the position are at least as steep as the break, those after no steeper.
        assert (slope[:k] >= found.multiplier).all() and (slope[k:] <= found.multiplier).all()
    if found.edge is None:
        assert found.multiplier == 0.0
    else:
        row, target = found.edge
        own = vertices(hulls, row)
        k = own.index(int(found.position[row]))
        assert own[k + 1] == target
        assert hulls.slope[hulls.start[row] + k] == found.multiplier
        assert table.cost[target] - table.cost[found.position[row]] > found.room


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_bound_is_one_and_close_to_the_lagrangian_function(
    ugly: Problems, optimum: Optimum, data: st.DataObject
) -> None:
    problem = data.draw(ugly())
    table = problem.table
    found = relax(table, problem.hulls, table.tightened(problem.budget))
    bound, best = lower_bound(table, found), optimum(problem)
    assert bound <= best
    floor = math.fsum(float(group.loss.min()) for group in problem.groups)
    exact = max(exact_bound(problem, found.multiplier), Fraction(floor))
    assert Fraction(bound) <= exact * (1 + Fraction(1, 2**52))
    assert Fraction(bound) >= exact - Fraction(best) / 2**40 - Fraction(5e-324) * 64


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_multiplier_proves_more_than_the_one_found(
    problems: Problems, data: st.DataObject
) -> None:
    problem = data.draw(problems())
    table = problem.table
    best = lower_bound(table, relax(table, problem.hulls, table.tightened(problem.budget)))
    for lam in [0.0, data.draw(st.floats(0.0, 20.0)), *problem.hulls.slope.tolist()]:
        if lam >= 0:
            assert float(exact_bound(problem, lam)) <= best * (1 + 1e-12) + 1e-300


def test_a_slope_that_is_wrong_only_weakens_the_bound(
    generic: Callable[..., Problem], optimum: Optimum
) -> None:
    problem = generic(4, 6)
    table = problem.table
    found = relax(table, problem.hulls, problem.budget)
    for factor in (0.0, 0.5, 1 - 1e-15, 1 + 1e-9, 2.0, 1e6):
        wrong = Relaxation(found.multiplier * factor, found.position, found.room, found.edge)
        assert lower_bound(table, wrong) <= min(
            optimum(problem), lower_bound(table, found) * 1.0001
        )


def test_the_jump_to_dense_is_one_edge() -> None:
    # From one option to the next it saves 0.1 per unit, then 18.8: seen from afar, 3.8 throughout.
    curve = Group("curve", np.array([0, 4, 8, 10]), np.array([38.4, 38.0, 37.6, 0.0]))
    hulls = Problem((curve,), 10).hulls
    assert hulls.vertex.tolist() == [0, 3]
    assert hulls.slope.tolist() == [3.84, -1.0]
