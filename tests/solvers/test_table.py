"""The flat table against its definition, row by row."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rankopt_solvers.table as module
from rankopt_solvers import Group, Problem
from rankopt_solvers.table import Table, pareto, tabulate

Problems = Callable[..., st.SearchStrategy[Problem]]


def rows(table: Table) -> list[list[tuple[int, float]]]:
    pairs = list(zip(table.cost.tolist(), table.loss.tolist(), strict=True))
    return [pairs[a:b] for a, b in itertools.pairwise(table.start.tolist())]


def undominated(group: Group) -> list[tuple[int, float]]:
    options = list(zip(group.cost.tolist(), group.loss.tolist(), strict=True))
    return sorted(
        {p for p in options if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in options)}
    )


def random_table(seed: int, groups: int = 40, largest: int = 200) -> Table:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, largest, groups)
    return tabulate([(rng.integers(0, 10**6, k) * 6, rng.random(k)) for k in sizes])


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_rows_hold_the_undominated_options_and_know_where_they_came_from(
    ugly: Problems, data: st.DataObject
) -> None:
    problem = data.draw(ugly())
    table = problem.table
    assert table.rows == len(problem.groups)
    assert rows(table) == [undominated(group) for group in problem.groups]
    for row, group in enumerate(problem.groups):
        for position in range(table.start[row], table.start[row + 1]):
            at = table.start[:-1].copy()
            at[row] = position
            option = table.options_at(at)[row]
            assert group.cost[option] == table.cost[position]
            assert group.loss[option] == table.loss[position]


def test_of_equal_options_the_first_is_kept() -> None:
    assert pareto(np.array([4, 2, 2, 4, 2]), np.array([0.0, 1.0, 1.0, 0.0, 3.0])).tolist() == [1, 0]


def test_tables_without_dominated_options_need_no_index() -> None:
    table = tabulate([(np.array([1, 2]), np.array([1.0, 0.0])), (np.array([5]), np.array([3.0]))])
    assert table.option is None
    assert table.options_at(np.array([1, 2])) == (1, 0)


@pytest.mark.parametrize("block", [1, 7, 100, 10**6])
def test_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    table = random_table(0)
    found, first = [], 0
    for start, part in table.blocks():
        assert start == first
        first += part.rows
        assert part.rows == 1 or part.cost.size <= block
        found += rows(part)
    assert first == table.rows and found == rows(table)


@pytest.mark.parametrize("block", [1, 50, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_the_divisor_divides_all_differences_and_nothing_larger_does(
    monkeypatch: pytest.MonkeyPatch, seed: int, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    table = random_table(seed, groups=5, largest=5)
    differences = [cost - row[0][0] for row in rows(table) for cost, _ in row]
    assert table.divisor == math.gcd(*differences)


def test_single_options_have_no_divisor() -> None:
    table = tabulate([(np.array([9]), np.array([1.0])), (np.array([4]), np.array([2.0]))])
    assert table.divisor == 0
    assert table.tightened(13) == table.tightened(10**30) == 13


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_tightened_budget_is_the_budget_for_undominated_choices(
    ugly: Problems, data: st.DataObject
) -> None:
    problem = data.draw(ugly())
    costs = {sum(c for c, _ in choice) for choice in itertools.product(*rows(problem.table))}
    tight = problem.table.tightened(problem.budget)
    assert max(cost for cost in costs if cost <= problem.budget) <= tight <= problem.budget
    assert problem.table.tightened(tight) == tight


def test_a_budget_is_tightened_to_the_common_step() -> None:
    # Only 7, 17, 27, 37 and so on can be spent; the dominated option of cost 8 does not count.
    steps = Group("a", np.array([7, 8, 17, 37]), np.array([9.0, 9.0, 5.0, 0.0]))
    table = Problem((steps,), 36).table
    assert [table.tightened(budget) for budget in (7, 16, 36, 37, 38, 10**30)] == [
        *(7, 7, 27, 37, 37, 37)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_last_affordable_option_is_the_dearest_within_the_limit(seed: int) -> None:
    table = random_table(seed)
    rng = np.random.default_rng(seed)
    limit = rng.integers(0, 6 * 10**6, table.rows)
    limit[::3] = table.cost[table.start[:-1]][::3]
    limit[1::3] = table.cost[table.start[1:] - 1][1::3]
    found = table.last_affordable(limit)
    for row, options in enumerate(rows(table)):
        fits = [k for k, (cost, _) in enumerate(options) if cost <= limit[row]]
        assert found[row] - table.start[row] == max(fits, default=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("level", [0.0, 1e-3, 0.1, 0.5, 1.0])
def test_the_first_within_a_level_is_the_cheapest(seed: int, level: float) -> None:
    table = random_table(seed)
    found = table.first_within(level)
    for row, options in enumerate(rows(table)):
        within = [k for k, (_, loss) in enumerate(options) if loss <= level]
        assert found[row] - table.start[row] == min(within, default=len(options))


def test_a_level_that_an_option_has_is_within() -> None:
    table = random_table(7)
    for position in range(0, table.cost.size, 11):
        row = int(np.searchsorted(table.start, position, "right")) - 1
        assert table.first_within(float(table.loss[position]))[row] == position


@pytest.mark.parametrize("seed", range(5))
def test_kept_options_remember_their_positions(seed: int) -> None:
    table = random_table(seed)
    mask = np.random.default_rng(seed).random(table.cost.size) < 0.3
    kept = table.keep(mask)
    assert kept.option is not None
    assert kept.option.tolist() == np.flatnonzero(mask).tolist()
    assert kept.cost.tolist() == table.cost[mask].tolist()
    assert kept.loss.tolist() == table.loss[mask].tolist()
    inside = [mask[a:b].sum() for a, b in itertools.pairwise(table.start)]
    assert np.diff(kept.start).tolist() == inside


@pytest.mark.parametrize("seed", range(5))
def test_between_takes_a_range_of_each_row(seed: int) -> None:
    table = random_table(seed)
    rng = np.random.default_rng(seed)
    low = rng.integers(table.start[:-1], table.start[1:])
    high = rng.integers(low + 1, table.start[1:] + 1)
    part = table.between(low, high)
    assert part.option is not None
    wanted = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
    assert part.option.tolist() == wanted.tolist()
    assert np.diff(part.start).tolist() == (high - low).tolist()
    assert part.cost.tolist() == table.cost[wanted].tolist()
