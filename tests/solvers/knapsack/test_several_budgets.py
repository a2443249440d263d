"""Two and three budgets of different costs, against all choices that there are, and at scale."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from rankopt_solvers import (
    Group,
    InfeasibleError,
    Problem,
    SideBudget,
    SolutionError,
    certify,
    solve,
    verify,
)

pytest.importorskip("cvxpy")
pytest.importorskip("highspy")

ROUNDING = 1e-12


def small(rng: np.random.Generator, rows: int) -> Problem:
    """Up to 4 groups of up to 6 options: falling curves or none, few distinct costs or many."""
    sizes = rng.integers(1, 7, int(rng.integers(1, 5)))
    most = int(rng.choice([4, 60, 10**9]))
    tables = [[rng.integers(0, most, size) for size in sizes] for _ in range(rows)]
    losses = [rng.choice([rng.random(size), rng.integers(0, 4, size)]) for size in sizes]
    if rng.random() < 0.6:
        tables = [[np.sort(cost) for cost in costs] for costs in tables]
        losses = [np.sort(loss)[::-1] for loss in losses]
    limits = []
    for costs in tables:
        low, high = sum(int(c.min()) for c in costs), sum(int(c.max()) for c in costs)
        limits.append(int(low + rng.uniform(-0.05, 0.9) * (high - low)))
    scale = float(rng.choice([1e-9, 1.0, 1e6]))
    groups = [
        Group(f"g{i}", cost, loss * scale)
        for i, (cost, loss) in enumerate(zip(tables[0], losses, strict=True))
    ]
    sides = [SideBudget(f"row {i}", tuple(tables[i]), limits[i]) for i in range(1, rows)]
    return Problem(tuple(groups), max(limits[0], 0), side_budgets=tuple(sides))


def all_choices(problem: Problem) -> list[tuple[int, ...]]:
    return list(itertools.product(*[range(group.cost.size) for group in problem.groups]))


def check(seed: int, rows: int) -> str:
    """One problem: the optimum, a bound below it, and the proof; or no choice at all."""
    problem = small(np.random.default_rng((seed, rows)), rows)
    losses = [problem.loss_of(c) for c in all_choices(problem) if problem.keeps(c)]
    if not losses:
        with pytest.raises(InfeasibleError) as caught:
            solve(problem, "knapsack")
        error = caught.value
        name, _, beside = error.what.partition(" (beside ")
        row = 0 if name == "budget" else int(name.removeprefix("row "))
        costs = [problem.cost_of, *(side.cost_of for side in problem.side_budgets)]
        limits = [problem.budget, *(side.limit for side in problem.side_budgets)]
        assert error.budget == limits[row] < error.smallest
        # Nothing within the budgets that it is said to stand beside takes less.
        kept = [
            i for i in range(rows) if i != row and f"row {i}" in beside.replace("budget", "row 0")
        ]
        for choice in all_choices(problem):
            if all(costs[i](choice) <= limits[i] for i in kept):
                assert costs[row](choice) >= error.smallest
        return "infeasible"
    solution = solve(problem, "knapsack")
    verify(problem, solution)
    best = min(losses)
    assert problem.keeps(solution.choice)
    assert math.isclose(solution.loss, best, rel_tol=ROUNDING)
    assert solution.bound <= best * (1 + ROUNDING)
    return solution.status


@pytest.mark.parametrize("rows", [2, 3])
def test_the_optimum_of_small_problems_is_found_and_never_overclaimed(rows: int) -> None:
    found = [check(seed, rows) for seed in range(24)]
    assert set(found) == {"infeasible", "optimal"} and found.count("optimal") >= 10


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 3])
def test_the_optimum_of_thousands_of_small_problems(rows: int) -> None:
    found = [check(seed, rows) for seed in range(60, 1_060)]
    assert set(found) == {"infeasible", "optimal"} and found.count("optimal") > 600


def layers(number: int, options: int, seed: int = 0) -> Problem:
    """Ranks with costs that are linear in them, and latencies that go in steps."""
    rng = np.random.default_rng(seed)
    groups, took = [], []
    for i in range(number):
        m, n = (int(side) for side in rng.choice([512, 768, 1024, 1536], 2))
        ranks = np.unique(np.linspace(1, min(m, n) - 1, options - 1).astype(np.int64))
        energy = np.arange(1.0, min(m, n) + 1) ** -rng.uniform(0.2, 1.5) * rng.lognormal(0, 0.8)
        tail = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
        groups.append(
            Group(
                f"layer {i}",
                np.append(ranks * (m + n - ranks), m * n),
                np.append(tail[ranks], 0.0),
            )
        )
        steps = 3000 + -(-ranks // 16) * 16 * (m + n) // 100
        took.append(np.append(steps, 1500 + m * n // 100))
    half = [int(np.searchsorted(g.cost, 0.6 * int(g.cost[-1]))) for g in groups]
    problem = Problem(
        tuple(groups),
        sum(int(g.cost[j]) for g, j in zip(groups, half, strict=True)),
    )
    alone = SideBudget("latency", tuple(took), 0).cost_of(solve(problem).choice)
    side = SideBudget("latency", tuple(took), int(0.98 * alone))
    return dataclasses.replace(problem, side_budgets=(side,))


@pytest.mark.slow
def test_two_hundred_layers_of_five_hundred_options_have_a_small_proven_gap() -> None:
    problem = layers(200, 500)
    assert sum(group.cost.size for group in problem.groups) > 95_000
    solution = solve(problem, "knapsack", time_limit=15.0)
    verify(problem, solution)
    assert solution.gap < 2e-3
    assert solution.multiplier > 0 and solution.side_multipliers[0] > 0


def test_a_budget_that_binds_alone_is_proven_and_needs_no_integer_program() -> None:
    """The other one is loose, but could be exceeded."""
    problem = layers(12, 40)
    (side,) = problem.side_budgets
    loose = dataclasses.replace(side, limit=int(1.1 * side.limit))
    problem = dataclasses.replace(problem, side_budgets=(loose,))
    solution = solve(problem, "knapsack")
    verify(problem, solution)
    assert solution.status == "optimal" and solution.stats["columns"] == 0
    assert solution.choice == solve(dataclasses.replace(problem, side_budgets=()), "exact").choice
    tight = dataclasses.replace(problem, budget=2 * problem.budget)
    tight = dataclasses.replace(tight, side_budgets=(dataclasses.replace(side, limit=side.limit),))
    proven = solve(tight, "knapsack")
    verify(tight, proven)
    assert proven.status == "optimal" and proven.proof is not None and proven.proof.budget == 1


def test_proofs_that_prove_something_else_are_refused() -> None:
    rng = np.random.default_rng(3)
    groups = [Group(f"g{i}", rng.integers(0, 999, 6), rng.random(6)) for i in range(8)]
    side = SideBudget("side", tuple(rng.integers(0, 999, (8, 6))), 2600)
    problem = Problem(tuple(groups), 2600, side_budgets=(side,))
    solution = solve(problem, "knapsack")
    verify(problem, solution)
    assert solution.status == "optimal" and solution.proof is not None
    assert solution.proof.budget is None
    of_one = dataclasses.replace(solution.proof, budget=1)
    beyond = dataclasses.replace(solution.proof, budget=2)
    for proof in (None, of_one, beyond):
        with pytest.raises(SolutionError):
            verify(problem, dataclasses.replace(solution, proof=proof))
    worse = next(
        c
        for c in all_choices(dataclasses.replace(problem, groups=groups[:3], side_budgets=()))
        if problem.keeps(c + solution.choice[3:]) and c != solution.choice[:3]
    )
    worse += solution.choice[3:]
    claimed = certify(problem, worse, "liar", bound=(problem.loss_of(worse), solution.multiplier))
    claimed = dataclasses.replace(
        claimed, side_multipliers=solution.side_multipliers, proof=solution.proof
    )
    with pytest.raises(SolutionError, match="a choice within all budgets loses"):
        verify(problem, claimed)
