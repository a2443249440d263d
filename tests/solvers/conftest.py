"""Small problems and their answers by enumeration, layers and theirs by dynamic programming.

The strategies are handed out by fixtures because test modules cannot import this file by name.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import strategies as st

import rankopt_solvers.exact.branch_and_bound as exact_module
from rankopt_solvers import Group, Problem
from rankopt_solvers.problem import Objective

_FEW = st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.0, 8.0])
_SMALL = st.one_of(st.sampled_from([0, 1, 2, 3]), st.integers(0, 30))

#: What losses may look like, and by what they are multiplied.
_LOSSES = {
    "few": (_FEW, 1.0),
    "any": (st.one_of(_FEW, st.floats(0.0, 10.0, allow_subnormal=False)), 1.0),
    "tenths": (st.integers(0, 30), 0.1),
    "wide": (st.one_of(st.just(0.0), st.floats(-12.0, 12.0).map(lambda e: 10.0**e)), 1.0),
    "minute": (st.floats(0.0, 1.0, allow_subnormal=False), 1e-300),
    "subnormal": (st.integers(0, 12), 5e-324),
    "enormous": (st.floats(0.0, 1.0, allow_subnormal=False), 1e300),
}

#: What costs may look like: unit and offset turn small numbers into large ones.
_COSTS = {"small": (1, 0), "coarse": (12, 5), "huge": (10**14, 0), "uneven": (10**14 + 7, 3)}


@st.composite
def _tables(
    draw: st.DrawFn, cost: st.SearchStrategy[int], loss: st.SearchStrategy[float]
) -> tuple[list[int], list[float]]:
    size = draw(st.sampled_from([5, 4, 3, 2, 1]))
    costs = draw(st.lists(cost, min_size=size, max_size=size))
    losses = draw(st.lists(loss, min_size=size, max_size=size))
    # Unsorted, most options dominate each other; a falling curve keeps them all in play.
    if draw(st.sampled_from([True, True, False])):
        return sorted(costs), sorted(losses, reverse=True)
    return costs, losses


@st.composite
def _problems(
    draw: st.DrawFn, objective: Objective = "sum", scale: float = 1.0, whole: bool = False
) -> Problem:
    size = draw(st.sampled_from([3, 2, 4, 1]))
    # Few distinct values on purpose: ties, equal costs, zero costs and dominated options.
    table = _tables(_SMALL, _FEW if whole else _LOSSES["any"][0])
    tables = draw(st.lists(table, min_size=size, max_size=size))
    groups = tuple(
        Group(f"g{i}", np.array(cost), np.array(loss) * scale)
        for i, (cost, loss) in enumerate(tables)
    )
    smallest = sum(int(group.cost.min()) for group in groups)
    largest = sum(int(group.cost.max()) for group in groups)
    return Problem(groups, draw(st.integers(smallest, largest + 2)), objective)


@st.composite
def _ugly(draw: st.DrawFn, objective: Objective = "sum", subnormal: bool = True) -> Problem:
    kinds = [kind for kind in sorted(_LOSSES) if subnormal or kind != "subnormal"]
    loss, scale = _LOSSES[draw(st.sampled_from(kinds))]
    unit, offset = _COSTS[draw(st.sampled_from(["small", *_COSTS]))]
    size = draw(st.sampled_from([3, 2, 4, 1]))
    twins = draw(st.sampled_from([False, False, True]))
    tables = draw(st.lists(_tables(_SMALL, loss), min_size=1 if twins else size, max_size=size))
    groups = []
    for i in range(size):
        cost, values = tables[i % len(tables)]
        wiggle = 0 if unit < 10**14 or twins else i
        groups.append(
            Group(f"g{i}", np.array(cost) * (unit + wiggle) + offset, np.array(values) * scale)
        )
    smallest = sum(int(group.cost.min()) for group in groups)
    largest = sum(int(group.cost.max()) for group in groups)
    anything = st.integers(smallest, largest + 2)
    budget = draw(st.one_of(anything, anything, st.sampled_from([smallest, largest, 10**30])))
    return Problem(tuple(groups), budget, objective)


def _choices(problem: Problem) -> Iterator[tuple[int, ...]]:
    return itertools.product(*[range(group.cost.size) for group in problem.groups])


def _feasible_choices(problem: Problem) -> list[tuple[int, ...]]:
    return [choice for choice in _choices(problem) if problem.cost_of(choice) <= problem.budget]


def _optimum(problem: Problem) -> float:
    cost, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    combine = np.add if problem.objective == "sum" else np.maximum
    for group in problem.groups:
        cost = np.add.outer(cost, group.cost).ravel()
        loss = combine.outer(loss, group.loss).ravel()
    fits = np.flatnonzero(cost <= min(problem.budget, 2**62))
    # Sums in another order differ in their last digits: the candidates are added up correctly.
    close = fits[loss[fits] <= loss[fits].min() * (1 + 1e-13)][:64]
    shape = [group.cost.size for group in problem.groups]
    return min(
        problem.loss_of(choice) for choice in zip(*np.unravel_index(close, shape), strict=True)
    )


def _steps(problem: Problem) -> int:
    """Common divisor of the cost differences inside groups, at least 1."""
    step = 0
    for group in problem.groups:
        step = math.gcd(step, *(group.cost - group.cost.min()).tolist())
    return max(step, 1)


def _best_losses(problem: Problem) -> Callable[[int], float]:
    """Least sum of losses for any budget up to the problem's, by dynamic programming over costs."""
    step = _steps(problem)
    best = np.zeros((problem.budget - problem.smallest_cost) // step + 1)
    for group in problem.groups:
        longer = np.full(best.size, np.inf)
        costs = (group.cost - group.cost.min()) // step
        for cost, loss in zip(costs.tolist(), group.loss.tolist(), strict=True):
            if cost < best.size:
                np.minimum(longer[cost:], best[: best.size - cost] + loss, out=longer[cost:])
        best = longer
    last = best.size - 1
    return lambda budget: float(best[min((budget - problem.smallest_cost) // step, last)])


@pytest.fixture(scope="session")
def problems() -> Callable[..., st.SearchStrategy[Problem]]:
    """Feasible problems of at most 4 groups and 5 options: ``(objective, scale, whole)``."""
    return _problems


@pytest.fixture(scope="session")
def ugly() -> Callable[..., st.SearchStrategy[Problem]]:
    """The same at every scale of costs and losses, with twins: ``(objective, subnormal)``."""
    return _ugly


@pytest.fixture(scope="session")
def feasible_choices() -> Callable[[Problem], list[tuple[int, ...]]]:
    """All choices within the budget."""
    return _feasible_choices


@pytest.fixture(scope="session")
def optimum() -> Callable[[Problem], float]:
    """The smallest loss of any choice within the budget."""
    return _optimum


@pytest.fixture(scope="session")
def best_losses() -> Callable[[Problem], Callable[[int], float]]:
    """Budget -> optimum of the sum, for problems too large to enumerate."""
    return _best_losses


@pytest.fixture(scope="session")
def generic() -> Callable[..., Problem]:
    """Random problems without ties: ``generic(groups, options, share_of_the_largest_cost)``."""

    def make(groups: int, options: int, share: float = 0.4, seed: int = 0) -> Problem:
        rng = np.random.default_rng(seed)
        made = tuple(
            Group(f"g{i}", rng.integers(0, 10**6, options), rng.random(options))
            for i in range(groups)
        )
        smallest = sum(int(group.cost.min()) for group in made)
        largest = sum(int(group.cost.max()) for group in made)
        return Problem(made, smallest + int(share * (largest - smallest)))

    return make


@pytest.fixture(scope="session")
def layers() -> Callable[..., Problem]:
    """Layers that are cut to a rank or kept dense: a falling curve and a long jump at its end.

    ``layers(shapes, share_of_the_dense_cost, seed, flat)``; the flatter the spectra, the longer the
    jumps.
    """

    def make(
        shapes: list[tuple[int, int]], share: float = 0.5, seed: int = 0, flat: float = 0.5
    ) -> Problem:
        rng = np.random.default_rng(seed)
        groups = []
        for i, (m, n) in enumerate(shapes):
            energy = np.arange(1, min(m, n) + 1) ** -rng.uniform(0.0, 2 * (1 - flat))
            energy = np.sort(energy * rng.uniform(0.98, 1.02, energy.size))[::-1]
            lost = np.append(np.cumsum(energy[::-1])[::-1][1:], 0.0) * rng.lognormal(0.0, 0.8)
            ranks = np.arange(1, (m * n - 1) // (m + n) + 1)
            cost = np.append(ranks * (m + n), m * n)
            groups.append(Group(f"layer{i}", cost, np.append(lost[ranks - 1], 0.0)))
        return Problem(tuple(groups), int(share * sum(m * n for m, n in shapes)))

    return make


@pytest.fixture
def always_branching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly any enumeration, so that small problems need many cases."""
    monkeypatch.setattr(exact_module, "MOST_STATES", 40)
    monkeypatch.setattr(exact_module, "MOST_STATES_LONG", 40)
