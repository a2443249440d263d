"""Costs that are concave in the rank, alone and beside linear ones, against enumeration.

A matrix of rank r has r (m + n - r) degrees of freedom: every rank up to full costs less than
dense, options are dense in cost towards it, and the loss over the cost is far from convex there.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import rankopt_solvers.hull as hull_module
import rankopt_solvers.table as table_module
from rankopt_solvers import (
    Group,
    InfeasibleError,
    Problem,
    frontier,
    margins,
    shared_choice,
    solve,
    solve_with_level,
    verify,
)
from rankopt_solvers.greedy import _best_steps
from rankopt_solvers.hull import Relaxation, lower_bound, lower_hulls, relax, relax_near
from rankopt_solvers.search.multipliers import reweighted
from rankopt_solvers.table import Table

BestLosses = Callable[[Problem], Callable[[int], float]]

#: Relative rounding of a sum of a few losses.
ROUNDING = 1e-12


def matrix(name: str, m: int, n: int, rng: np.random.Generator, forms: str = "any") -> Group:
    """One matrix: its ranks as pivoted factors, as pairs, or as both, and dense."""
    size = min(m, n)
    kind = rng.integers(6)
    order = np.arange(1, size + 1)
    spectrum = (
        order ** -rng.uniform(0.1, 2.0),
        np.exp(-order * rng.uniform(0.1, 2.0)),
        np.ones(size),
        rng.integers(0, 3, size).astype(float),  # ties, plateaus
        np.zeros(size),
        rng.random(size),
    )[kind] * rng.choice([1.0, 1.0, rng.lognormal(0.0, 2.0)])
    lost = np.append(np.cumsum(np.sort(spectrum))[::-1], 0.0)
    form = str(rng.choice(["pivoted", "pivoted", "pairs", "both"])) if forms == "any" else forms
    step = int(rng.choice([1, 1, 2, 3])) if forms == "any" else 1
    ranks = np.arange(step, size, step)
    costs = {"pivoted": [ranks * (m + n - ranks)], "pairs": [ranks * (m + n)]}
    costs["both"] = costs["pivoted"] + costs["pairs"]
    cost = np.concatenate([*costs[form], [m * n]])
    return Group(name, cost, np.append(np.tile(lost[ranks], len(costs[form])), 0.0))


def instance(seed: int) -> Problem:
    """Two to five matrices, now and then twins or a shared choice; the budget plays no part."""
    rng = np.random.default_rng([7, seed])
    groups = []
    for i in range(int(rng.integers(2, 6))):
        m, n = (int(side) for side in rng.integers(2, 10, 2))
        groups.append(matrix(f"g{i}", m, n, rng))
    if rng.random() < 0.2:
        groups.append(Group("twin", groups[0].cost, groups[0].loss))
    if rng.random() < 0.1:
        parts = [matrix(name, 5, n, rng, "pivoted") for n, name in ((7, "q"), (5, "k"))]
        groups.append(shared_choice("qk", parts))
    return Problem(tuple(groups), 0)


def every_optimum(problem: Problem) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """What all choices cost, in order, and the least loss of any that costs no more."""
    cost, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    for group in problem.groups:
        cost = np.add.outer(cost, group.cost).ravel()
        loss = np.add.outer(loss, group.loss).ravel()
        order = np.lexsort((loss, cost))
        cost, loss = cost[order], np.minimum.accumulate(loss[order])
        # Of one cost the best, of a dearer choice only a better one.
        keep = np.concatenate(([True], loss[1:] < loss[:-1]))
        cost, loss = cost[keep], loss[keep]
    return cost, loss


def budgets(problem: Problem, cost: npt.NDArray[np.int64], seed: int) -> list[int]:
    """Feasible and not, met to the unit and missed by one."""
    rng = np.random.default_rng([8, seed])
    most = sum(int(group.cost.max()) for group in problem.groups)
    met = int(rng.choice(cost))
    return [met, met - 1, int(rng.integers(problem.smallest_cost - 2, most + 2))]


def check(seed: int, solvers: tuple[str, ...] = ("exact",)) -> int:
    """Each solver at three budgets of an instance; how many were feasible."""
    problem = instance(seed)
    cost, loss = every_optimum(problem)
    feasible = 0
    for budget in budgets(problem, cost, seed):
        here = problem.with_budget(budget)
        place = int(np.searchsorted(cost, budget, side="right")) - 1
        if place < 0:
            with pytest.raises(InfeasibleError) as caught:
                solve(here, solvers[0])
            assert caught.value.smallest == cost[0]
            continue
        best = float(loss[place])
        for solver in solvers:
            found = solve(here, solver)
            assert here.cost_of(found.choice) == found.cost <= budget
            assert here.loss_of(found.choice) == found.loss
            assert found.bound <= best * (1 + ROUNDING)
            assert best <= found.loss * (1 + ROUNDING)
            if solver == "exact":
                assert found.status == "optimal" and found.gap == 0.0
                assert math.isclose(found.loss, best, rel_tol=ROUNDING)
            verify(here, found)
        feasible += 1
    return feasible


@pytest.mark.parametrize("part", range(5))
def test_exact_is_the_optimum_of_enumeration(part: int) -> None:
    assert sum(check(seed) for seed in range(100 * part, 100 * (part + 1))) > 200


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_exact_is_the_optimum_of_enumeration_on_five_thousand(part: int) -> None:
    assert sum(check(seed) for seed in range(500 * part, 500 * (part + 1))) > 1000


@pytest.mark.usefixtures("always_branching")
def test_branching_reaches_the_same_optimum() -> None:
    assert sum(check(seed) for seed in range(1000, 1100)) > 200


def test_the_greedy_ones_say_how_far_they_may_be_off() -> None:
    for seed in range(100):
        check(seed, ("greedy", "density"))


def cheapest_within(problem: Problem, level: float) -> float:
    """The cost of the cheapest choice in which no group loses more than the level."""
    costs = [group.cost[group.loss <= level] for group in problem.groups]
    return math.inf if any(not c.size for c in costs) else sum(int(c.min()) for c in costs)


def test_the_largest_loss_and_the_sum_within_it() -> None:
    for seed in range(60):
        problem = instance(seed)
        cost, _ = every_optimum(problem)
        for budget in budgets(problem, cost, seed):
            if budget < problem.smallest_cost:
                continue
            here = problem.with_budget(budget)
            worst = solve(dataclasses.replace(here, objective="max"), "exact")
            verify(dataclasses.replace(here, objective="max"), worst)
            levels = sorted({v for group in here.groups for v in group.loss.tolist()})
            assert worst.loss == next(t for t in levels if cheapest_within(here, t) <= budget)
            assert worst.status == "optimal"
            both = solve_with_level(here)
            verify(here, both)
            assert both.stats["level"] == worst.loss and both.loss <= here.loss_of(worst.choice)


def test_the_frontier_brackets_every_optimum() -> None:
    for seed in range(100):
        problem = instance(seed)
        cost, loss = every_optimum(problem)
        curve = frontier(problem)
        for budget, best in zip(cost.tolist(), loss.tolist(), strict=True):
            assert curve.bound(budget) <= best * (1 + ROUNDING)
            assert best <= curve.value(budget) * (1 + ROUNDING)


def test_any_other_option_loses_at_least_the_margin_more() -> None:
    for seed in range(60):
        problem = instance(seed)
        cost, _ = every_optimum(problem)
        here = problem.with_budget(int(cost[cost.size // 2]))
        found = solve(here, "exact")
        lam = found.multiplier
        least = [float((g.loss + lam * g.cost).min()) for g in here.groups]
        floor = math.fsum(least) - lam * here.budget
        for g, margin in enumerate(margins(here, found)):
            group, own = here.groups[g], found.choice[g]
            kept = [np.arange(one.cost.size) for one in here.groups]
            kept[g] = np.delete(kept[g], own)
            if not kept[g].size:
                assert margin == math.inf
                continue
            costs, losses = every_optimum(here.restricted(kept))
            fits = losses[costs <= here.budget]
            excess = float(group.loss[own] + lam * group.cost[own]) - least[g]
            if fits.size:
                assert float(fits.min()) >= floor + excess + margin - 1e-9 * (1 + abs(floor))


def test_reweighted_as_a_search_does_it_stays_proven() -> None:
    for seed in range(60):
        problem = instance(seed)
        weights = np.exp(np.random.default_rng(seed).uniform(-2, 2, len(problem.groups)))
        other = reweighted(problem, weights)
        cost, loss = every_optimum(other)
        place = int(cost.size * 0.4)
        here = other.with_budget(int(cost[place]))
        found = solve(here)
        verify(here, found)
        assert found.status == "optimal"
        assert math.isclose(found.loss, float(loss[place]), rel_tol=ROUNDING)


# Larger matrices, and what spares looking at every option


SHAPES = [(48, 48), (48, 96), (96, 48), (24, 128), (80, 80)]


def pivoted(shapes: list[tuple[int, int]], seed: int, twins: int = 0) -> Problem:
    rng = np.random.default_rng([9, seed])
    groups = [matrix(f"g{i}", m, n, rng, "pivoted") for i, (m, n) in enumerate(shapes)]
    groups += [Group(f"twin {i}", groups[0].cost, groups[0].loss) for i in range(twins)]
    return Problem(tuple(groups), int(0.9 * sum(int(g.cost.max()) for g in groups)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("twins", [0, 3])
def test_matrices_of_every_rank(best_losses: BestLosses, seed: int, twins: int) -> None:
    problem = pivoted(SHAPES * 3, seed, twins)
    best = best_losses(problem)
    for share in (0.2, 0.5, 0.8, 0.97):
        here = problem.with_budget(int(share * problem.budget))
        found = solve(here)
        verify(here, found)
        assert found.status == "optimal"
        assert math.isclose(found.loss, best(here.budget), rel_tol=ROUNDING)


@pytest.fixture(params=[3, 32])
def short_runs(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a few options, and every table large enough to be sampled."""
    for module in (table_module, hull_module):
        monkeypatch.setattr(module, "RUN", request.param)
    monkeypatch.setattr(hull_module, "LARGE", 1)
    monkeypatch.setattr(hull_module, "BLOCK", 50)


@pytest.mark.usefixtures("short_runs")
def test_runs_cover_every_option_once_and_promise_no_less() -> None:
    for seed in range(50):
        table = instance(seed).table
        runs = table.runs
        assert runs.option is not None
        ends = np.append(runs.option[1:], table.cost.size)
        assert (ends > runs.option).all() and (ends - runs.option <= hull_module.RUN).all()
        assert runs.option[runs.start[:-1]].tolist() == table.start[:-1].tolist()
        assert runs.option[runs.start[1:] - 1].tolist() == (table.start[1:] - 1).tolist()
        for first, end, cost, loss in zip(runs.option, ends, runs.cost, runs.loss, strict=True):
            assert cost == table.cost[first:end].min() and loss == table.loss[first:end].min()


def same(one: Relaxation, two: Relaxation) -> bool:
    return (one.multiplier, one.room, one.edge) == (two.multiplier, two.room, two.edge) and (
        one.position.tolist() == two.position.tolist()
    )


@pytest.mark.usefixtures("short_runs")
def test_near_the_break_the_relaxation_is_that_of_whole_hulls() -> None:
    for seed in range(40):
        table = pivoted(SHAPES, seed, seed % 3).table
        hulls = lower_hulls(table)
        low = int(table.cost[table.start[:-1]].sum())
        high = int(table.cost[table.start[1:] - 1].sum())
        for budget in np.linspace(low, high, 9).astype(int).tolist():
            assert same(relax_near(table, budget), relax(table, hulls, budget))


def brute_bound(table: Table, found: Relaxation) -> float:
    """The Lagrangian function from all options."""
    least = np.minimum.reduceat(table.loss + found.multiplier * table.cost, table.start[:-1])
    spent = int(table.cost[found.position].sum()) + found.room
    return math.fsum(least.tolist()) - found.multiplier * spent


@pytest.mark.usefixtures("short_runs")
def test_options_within_a_gap_are_those_of_all() -> None:
    for seed in range(40):
        table = pivoted(SHAPES, seed).table
        found = relax_near(table, int(0.6 * table.cost[table.start[1:] - 1].sum()))
        at, lam = found.position, found.multiplier
        every = hull_module.reduced_losses(table, lam, table.cost[at], table.loss[at])
        for gap in (0.0, *np.quantile(every, [0.1, 0.5, 1.0]).tolist()):
            near, reduced = hull_module.options_within(table, lam, at, gap)
            assert near.tolist() == np.flatnonzero(every <= gap).tolist()
            assert reduced.tolist() == every[near].tolist()
        for factor in (1.0, 0.5, 1.3):
            wrong = dataclasses.replace(found, multiplier=lam * factor)
            bound = lower_bound(table, wrong)
            scale = float(table.loss[table.start[:-1]].sum())
            floor = float(table.loss[table.start[1:] - 1].sum())
            best = max(brute_bound(table, wrong), floor)
            assert best - 1e-12 * scale <= bound <= best + 1e-12 * scale


@pytest.mark.usefixtures("short_runs")
def test_sampling_changes_no_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    def solutions() -> list[Any]:
        found = []
        for seed in range(12):
            problem = pivoted(SHAPES, seed, 2)
            for share in (0.3, 0.6, 0.9):
                here = Problem(problem.groups, int(share * problem.budget))
                found.append((solve(here), here.relaxation.multiplier))
        return found

    sampled = solutions()
    monkeypatch.setattr(hull_module, "LARGE", 10**9)
    assert solutions() == sampled


@pytest.mark.usefixtures("short_runs")
def test_the_best_steps_are_those_of_all_options() -> None:
    for seed in range(40):
        table = pivoted(SHAPES, seed, seed % 2).table
        rng = np.random.default_rng(seed)
        position = rng.integers(table.start[:-1], table.start[1:])
        for room in (0, 1, 300, 3000, 10**6):
            wanted = []
            for row, now in enumerate(position.tolist()):
                later = slice(now + 1, int(table.start[row + 1]))
                extra = table.cost[later] - table.cost[now]
                density = ((table.loss[now] - table.loss[later]) / extra)[extra <= room]
                if density.size:
                    wanted.append((-density.max(), row, now + 1 + int(np.argmax(density))))
            assert _best_steps(table, position, room) == wanted
