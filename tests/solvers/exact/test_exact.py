"""The exact solver: proven optima on ugly tables, layers and twins."""

import dataclasses
import itertools
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rankopt_solvers import (
    Group,
    InfeasibleError,
    Problem,
    Solution,
    shared_choice,
    solve,
    verify,
)

Optimum = Callable[[Problem], float]
BestLosses = Callable[[Problem], Callable[[int], float]]

SHAPES = [(48, 48), (48, 96), (96, 48), (64, 128), (80, 80), (128, 32)]


def group(name: str, cost: list[int], loss: list[float]) -> Group:
    return Group(name, np.array(cost), np.array(loss))


def proven(problem: Problem, **options: Any) -> Solution:
    """The solution, after checking that it is proven."""
    solution = solve(problem, "exact", **options)
    verify(problem, solution)
    assert solution.status == "optimal"
    assert solution.gap == 0.0 and solution.bound == solution.loss
    return solution


# Ugly tables


@pytest.mark.parametrize(
    ("tables", "budget", "loss"),
    [
        pytest.param([([5], [1.0])], 5, 1.0, id="one-option"),
        pytest.param([([5], [1.0]), ([7], [2.0])], 12, 3.0, id="single-options"),
        pytest.param([([0, 0, 0], [3.0, 1.0, 2.0])], 0, 1.0, id="only-zero-costs"),
        pytest.param([([2, 3], [0.0, 0.0]), ([1, 4], [0.0, 0.0])], 5, 0.0, id="only-zero-losses"),
        pytest.param(
            [([4, 4, 4], [3.0, 1.0, 2.0]), ([0, 1], [1.0, 0.0])], 4, 2.0, id="equal-costs"
        ),
        pytest.param([([1, 2, 3], [5.0, 5.0, 5.0])] * 3, 9, 15.0, id="equal-losses"),
        pytest.param([([2, 2, 1, 1], [0.0, 0.0, 1.0, 1.0])] * 2, 3, 1.0, id="duplicates"),
        pytest.param([([1, 5, 3], [9.0, 7.0, 1.0])] * 2, 6, 2.0, id="dear-and-bad"),
        pytest.param([([0, 5], [5.0, 0.0])] * 2 + [([0, 3], [3.1, 0.0])], 10, 3.1, id="knapsack"),
        pytest.param([([0, 10], [10.0, 0.0])] * 3, 29, 10.0, id="nothing-but-jumps"),
    ],
)
@pytest.mark.parametrize("unit", [1, 12, 10**15])
@pytest.mark.parametrize("scale", [1.0, 2.0**-1000, 2.0**1000])
def test_small_tables(
    tables: list[tuple[list[int], list[float]]],
    budget: int,
    loss: float,
    unit: int,
    scale: float,
) -> None:
    groups = tuple(
        Group(f"g{i}", np.array(c) * unit, np.array(v) * scale) for i, (c, v) in enumerate(tables)
    )
    # A power of two scales every sum exactly.
    assert proven(Problem(groups, budget * unit)).loss == loss * scale
    assert proven(Problem(groups, budget * unit + unit - 1)).loss == loss * scale


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("unit", [1, 10**13])
def test_losses_from_1e_minus_12_to_1e12_in_one_problem(
    optimum: Optimum, seed: int, unit: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = tuple(
        Group(f"g{i}", rng.integers(0, 60, 7) * unit + rng.integers(0, 9, 7), 10.0**loss)
        for i, loss in enumerate(rng.uniform(-12, 12, (5, 7)))
    )
    smallest = sum(int(g.cost.min()) for g in groups)
    for extra in (0, 40, 100, 150):
        problem = Problem(groups, smallest + extra * unit)
        assert math.isclose(proven(problem).loss, optimum(problem), rel_tol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_costs_without_a_common_divisor_are_counted_to_the_last_unit(
    optimum: Optimum, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = tuple(
        Group(f"g{i}", np.array([0, 5, 10]) * 10**14 + rng.integers(0, 9, 3), rng.random(3))
        for i in range(6)
    )
    every = sorted({sum(costs) for costs in itertools.product(*[g.cost.tolist() for g in groups])})
    for total in rng.choice(every[len(every) // 4 :], 4).tolist():
        for budget in (total - 1, total):
            problem = Problem(groups, budget)
            assert math.isclose(proven(problem).loss, optimum(problem), rel_tol=1e-12)


@pytest.mark.parametrize("unit", [1, 10**14])
def test_subnormal_losses(optimum: Optimum, unit: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        groups = tuple(
            Group(f"g{i}", rng.integers(0, 30, 5) * unit, rng.integers(0, 40, 5) * 5e-324)
            for i in range(4)
        )
        smallest = sum(int(g.cost.min()) for g in groups)
        problem = Problem(groups, smallest + int(rng.integers(0, 60)) * unit)
        assert proven(problem).loss == optimum(problem)


def test_huge_losses_under_huge_costs_do_not_overflow(optimum: Optimum) -> None:
    # The steep edge of "a" is priced on the long one of "b": 1e298 * 7e14.
    a = group("a", [7, 23], [2.8e299, 3e298])
    b = group("b", [747088740227960, 62166848573063], [1.5e299, 6.8e299])
    for budget in (62166848573070, 62166848573085, 62166848573086, 10**30):
        problem = Problem((a, b), budget)
        assert proven(problem).loss == optimum(problem)


def test_the_smallest_budget_leaves_no_choice(generic: Callable[..., Problem]) -> None:
    problem = generic(30, 20, 0.0)
    assert proven(problem).cost == problem.budget == problem.smallest_cost
    with pytest.raises(InfeasibleError):
        solve(problem.with_budget(problem.budget - 1), "exact")


@pytest.mark.parametrize("budget", [10**12, 10**30])
def test_a_huge_budget_takes_every_smallest_loss(
    generic: Callable[..., Problem], budget: int
) -> None:
    problem = generic(30, 20).with_budget(budget)
    assert proven(problem).loss == math.fsum(float(g.loss.min()) for g in problem.groups)


@pytest.mark.parametrize("seed", range(4))
def test_a_shared_choice_is_one_decision(feasible_choices: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tied = [Group(f"t{i}", rng.integers(0, 20, 4), rng.random(4)) for i in range(2)]
    free = [Group(f"f{i}", rng.integers(0, 20, 4), rng.random(4)) for i in range(2)]
    apart = Problem((*tied, *free), 10**6)
    together = (shared_choice("t", tied), *free)
    smallest = sum(int(g.cost.min()) for g in together)
    for budget in range(smallest, smallest + 40, 5):
        same = [c for c in feasible_choices(apart.with_budget(budget)) if c[0] == c[1]]
        solution = proven(Problem(together, budget))
        assert math.isclose(solution.loss, min(map(apart.loss_of, same)), rel_tol=1e-12)


def test_few_states_in_a_wide_window_take_little_time_and_memory(optimum: Optimum) -> None:
    # Costs with nothing in common and one steep curve: a window of 5e7 costs, four states in it.
    rng = np.random.default_rng(13)
    groups = tuple(
        Group(f"g{i}", rng.integers(0, 60, 7) * 10**13 + rng.integers(0, 9, 7), 10.0**loss)
        for i, loss in enumerate(rng.uniform(-12, 12, (5, 7)))
    )
    problem = Problem(groups, sum(int(g.cost.min()) for g in groups) + 40 * 10**13)
    tracemalloc.start()
    try:
        solution = proven(problem)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert math.isclose(solution.loss, optimum(problem), rel_tol=1e-12)
    assert peak < 200 * 2**20


# Larger instances, against a dynamic program over all costs


@pytest.mark.parametrize("flat", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_layers(
    layers: Callable[..., Problem], best_losses: BestLosses, seed: int, flat: float
) -> None:
    problem = layers(SHAPES * 5, 0.95, seed, flat)
    best = best_losses(problem)
    for share in (0.15, 0.3, 0.5, 0.7, 0.9):
        budget = int(share * problem.budget)
        solution = proven(problem.with_budget(budget))
        assert math.isclose(solution.loss, best(budget), rel_tol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_layers_that_each_lose_a_share_of_their_own(
    layers: Callable[..., Problem], best_losses: BestLosses, seed: int
) -> None:
    # Equal shapes with nearly equal slopes: the hardest of the kind.
    made = layers(SHAPES * 4, 0.9, seed, 0.9)
    problem = dataclasses.replace(
        made, groups=tuple(Group(g.name, g.cost, g.loss / g.loss.max()) for g in made.groups)
    )
    best = best_losses(problem)
    for share in (0.3, 0.6, 0.9):
        budget = int(share * problem.budget)
        solution = proven(problem.with_budget(budget))
        assert math.isclose(solution.loss, best(budget), rel_tol=1e-12)


@pytest.mark.usefixtures("always_branching")
@pytest.mark.parametrize("twins", [False, True])
def test_branching_reaches_the_same_optimum(
    layers: Callable[..., Problem], best_losses: BestLosses, twins: bool
) -> None:
    branched = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        shapes = [(int(m), int(n)) for m, n in rng.choice([4, 6, 8, 12], (8, 2))]
        problem = layers(shapes, 1.0, seed, 0.8)
        if twins:
            again = [Group(f"{g.name} again", g.cost, g.loss) for g in problem.groups[:5]]
            most = sum(int(g.cost.max()) for g in (*problem.groups, *again))
            problem = Problem((*problem.groups, *again), most)
        best = best_losses(problem)
        for share in (0.5, 0.7, 0.9):
            budget = int(share * problem.budget)
            if budget < problem.smallest_cost:
                continue
            solution = proven(problem.with_budget(budget))
            assert math.isclose(solution.loss, best(budget), rel_tol=1e-12)
            check_proof(solution)
            branched += solution.stats.get("nodes", 0) > 1
    assert branched >= 10


def check_proof(solution: Solution) -> None:
    """A proof is a tree whose children come after their parents."""
    if solution.proof is None:
        return
    cases = solution.proof.cases
    children = [c for case in cases if case.group >= 0 for c in (case.below, case.above)]
    assert sorted(children) == list(range(1, len(cases)))
    assert all(i < min(c.below, c.above) for i, c in enumerate(cases) if c.group >= 0)


# Symmetry


@pytest.mark.parametrize("copies", [16, 64])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.77])
def test_identical_layers_with_a_jump_to_dense_need_few_cases(
    layers: Callable[..., Problem], best_losses: BestLosses, copies: int, share: float
) -> None:
    one = layers([(48, 64)], 1.0, 3, 1.0).groups[0]
    groups = tuple(Group(f"copy{i}", one.cost, one.loss) for i in range(copies))
    problem = Problem(groups, int(share * copies * one.cost.max()))
    solution = proven(problem)
    assert math.isclose(solution.loss, best_losses(problem)(problem.budget), rel_tol=1e-12)
    assert solution.stats["nodes"] <= 50


def test_twins_of_several_kinds_need_few_cases(
    layers: Callable[..., Problem], best_losses: BestLosses
) -> None:
    kinds = layers([(48, 48), (32, 64), (64, 64)], 1.0, 5, 1.0).groups
    groups = tuple(
        Group(f"{kind.name} {i}", kind.cost, kind.loss) for i in range(12) for kind in kinds
    )
    problem = Problem(groups, int(0.55 * sum(int(g.cost.max()) for g in groups)))
    solution = proven(problem)
    assert math.isclose(solution.loss, best_losses(problem)(problem.budget), rel_tol=1e-12)
    assert solution.stats["nodes"] <= 500
