"""Seeded problems of many shapes, and their answers by enumeration, for the conformance kit.

The enumeration adds up all choices at once: the costs of the first g groups are the outer sum of
those of the first g-1 and of the options of group g. Costs stay integers; a sum of G losses >= 0
carries a relative error of at most G-1 roundings, so comparisons allow RELATIVE.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from rankopt_solvers.problem import Group, Problem, SideBudget, shared_choice

#: Relative slack of every comparison of losses; there is no absolute one, so no scale is special.
RELATIVE = 1e-12

Tables = list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]


def _falling(rng: np.random.Generator) -> Tables:
    shapes = rng.integers(2, 7, rng.integers(2, 6))
    return [(np.sort(rng.integers(0, 60, k)), np.sort(rng.random(k))[::-1]) for k in shapes]


def _unordered(rng: np.random.Generator) -> Tables:
    return [(rng.integers(0, 60, 6), rng.random(6)) for _ in range(4)]


def _ties(rng: np.random.Generator) -> Tables:
    few = np.array([0.0, 1.0, 2.0, 5.0])
    return [(rng.integers(0, 4, 6), rng.choice(few, 6)) for _ in range(4)]


def _dense_jump(rng: np.random.Generator) -> Tables:
    """Low-rank curves that end in a jump to dense."""
    tables = []
    for _ in range(4):
        m, n = (int(side) for side in rng.integers(4, 40, 2))
        ranks = np.unique(np.linspace(1, m * n // (m + n), 6).astype(int))
        lost = 1.0 - (ranks / min(m, n)) ** rng.uniform(0.2, 1.0)
        tables.append((np.append(ranks * (m + n), m * n), np.append(lost, 0.0) * m))
    return tables


def _wide(rng: np.random.Generator) -> Tables:
    return [
        (np.sort(rng.integers(0, 60, 5)), np.sort(10.0 ** rng.uniform(-12, 12, 5))[::-1])
        for _ in range(4)
    ]


def _large(rng: np.random.Generator) -> Tables:
    """Costs up to 1e15 and sums beyond 2^53 that differ in their last digits."""
    return [
        (np.array([0, 5, 10]) * 10**14 + rng.integers(0, 9, 3), np.sort(rng.random(3))[::-1])
        for _ in range(10)
    ]


def _beyond_int32(rng: np.random.Generator) -> Tables:
    return [(np.sort(rng.integers(0, 2**31, 4)), np.sort(rng.random(4))[::-1]) for _ in range(5)]


def _single(rng: np.random.Generator) -> Tables:
    return [(rng.integers(0, 60, 1), rng.random(1)) for _ in range(4)]


def _one_group(rng: np.random.Generator) -> Tables:
    return [(np.sort(rng.integers(0, 60, 12)), np.sort(rng.random(12))[::-1])]


def _zero_losses(rng: np.random.Generator) -> Tables:
    tables = _falling(rng)
    dead = int(rng.integers(len(tables) + 1))
    # One group without losses, and now and then all of them.
    return [(c, v * 0.0 if dead in (g, len(tables)) else v) for g, (c, v) in enumerate(tables)]


def _zero_costs(rng: np.random.Generator) -> Tables:
    free = rng.integers(0, 2, 4)
    return [(rng.integers(0, 60, 5) * free[g], rng.random(5)) for g in range(4)]


def _rank_multiples(rng: np.random.Generator) -> Tables:
    tables = []
    for _ in range(4):
        m, n = (int(side) for side in rng.choice([64, 96, 128, 192], 2))
        ranks = np.arange(16, m * n // (m + n), 16)
        kept = np.cumsum(np.arange(1, min(m, n) + 1) ** -rng.uniform(0.5, 2.0))
        lost = np.append(kept[-1] - kept[ranks - 1], 0.0)
        tables.append((np.append(ranks * (m + n), m * n), lost))
    return tables


def _generic(rng: np.random.Generator) -> Tables:
    """No two sums alike: for promises that ties would blur."""
    return [(np.sort(rng.integers(0, 10**6, 6)), np.sort(rng.random(6))[::-1]) for _ in range(12)]


def _shared(rng: np.random.Generator) -> Tables:
    """Three matrices of a block share their rank: sums of curves with a dent each."""
    tables = []
    for _ in range(4):
        parts = []
        for name in "qkv":
            loss = np.linspace(1.0, 0.0, 8) ** 0.5 * rng.uniform(0.1, 2.0)
            loss[int(rng.integers(1, 8)) :] *= 0.3
            parts.append(Group(name, np.cumsum(rng.integers(1, 9, 8)), loss))
        block = shared_choice("block", parts)
        tables.append((block.cost, block.loss))
    return tables


def _concave(rng: np.random.Generator) -> Tables:
    """Pivoted factors: rank r of an m x n matrix costs r (m + n - r), so that all ranks save."""
    tables = []
    for _ in range(4):
        m, n = (int(side) for side in rng.integers(2, 12, 2))
        ranks = np.arange(1, min(m, n))
        kept = np.cumsum(np.arange(1, min(m, n) + 1) ** -rng.uniform(0.0, 2.0))
        lost = np.append(kept[-1] - kept[ranks - 1], 0.0) * rng.lognormal()
        tables.append((np.append(ranks * (m + n - ranks), m * n), lost))
    return tables


FAMILIES: dict[str, Callable[[np.random.Generator], Tables]] = {
    "falling": _falling,
    "unordered": _unordered,
    "ties": _ties,
    "dense_jump": _dense_jump,
    "wide": _wide,
    "large": _large,
    "beyond_int32": _beyond_int32,
    "single": _single,
    "one_group": _one_group,
    "zero_losses": _zero_losses,
    "zero_costs": _zero_costs,
    "rank_multiples": _rank_multiples,
    "shared": _shared,
    "generic": _generic,
    "concave": _concave,
}


def _problem(tables: Tables, share: float) -> Problem:
    """A budget at the given share of the way from the cheapest choice to the dearest."""
    groups = tuple(Group(f"g{i}", cost, loss) for i, (cost, loss) in enumerate(tables))
    least = sum(int(group.cost.min()) for group in groups)
    most = sum(int(group.cost.max()) for group in groups)
    return Problem(groups, least + int(share * (most - least)))


def random_problem(family: str, seed: int) -> Problem:
    """A small feasible problem of one of FAMILIES; the same for the same arguments."""
    rng = np.random.default_rng([list(FAMILIES).index(family), seed])
    return _problem(FAMILIES[family](rng), float(rng.uniform(0.0, 0.9)))


def two_budgets(family: str, seed: int) -> Problem:
    """A random problem with a second budget, which now and then leaves no choice at all."""
    problem = random_problem(family, seed)
    rng = np.random.default_rng([100, seed])
    costs = tuple(rng.integers(0, 50, group.cost.size) for group in problem.groups)
    side = SideBudget("latency", costs, limit=int(rng.integers(20, 120)))
    return dataclasses.replace(problem, side_budgets=(side,))


def hard_problem(groups: int = 400, options: int = 100) -> Problem:
    """Loss almost in proportion to cost, so that bounds prune little: for limits and signals."""
    rng = np.random.default_rng(103)
    tables = []
    for _ in range(groups):
        cost = np.sort(rng.choice(10**7, options, replace=False))
        loss = (cost[-1] - cost) * (1.0 + 1e-3 * rng.random(options))
        tables.append((cost, np.sort(loss)[::-1]))
    return _problem(tables, 0.37)


@functools.lru_cache(maxsize=1)
def million_options() -> Problem:
    """A thousand matrices of 2000 x 2000 at every rank below break-even, and dense."""
    cost = np.append(np.arange(1, 1000) * 4000, 2000 * 2000)
    rng = np.random.default_rng(104)
    tables = []
    for _ in range(1000):
        spectrum = np.arange(1, 1001) ** -rng.uniform(0.5, 2.0) * rng.lognormal(0.0, 2.0)
        loss = np.append(np.cumsum(spectrum[::-1])[::-1][1:], 0.0)
        tables.append((cost, loss))
    return _problem(tables, 0.3)


def optimum(problem: Problem) -> float:
    """The smallest loss of any choice within all budgets, by enumeration; inf if there is none."""
    loss = functools.reduce(
        lambda total, part: np.add.outer(total, part).ravel(),
        [group.loss for group in problem.groups],
    )
    fits = np.ones(loss.size, dtype=bool)
    costs = [([group.cost for group in problem.groups], problem.budget)]
    costs += [(list(side.costs), side.limit) for side in problem.side_budgets]
    for tables, limit in costs:
        total = functools.reduce(lambda a, b: np.add.outer(a, b).ravel(), tables)
        fits &= total <= limit
    return float(loss[fits].min()) if fits.any() else math.inf
