"""Small problems and their answers by enumeration.

The strategies are handed out by fixtures because test modules cannot import this file by name.
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import strategies as st

from rankopt_solvers import Group, Problem
from rankopt_solvers.problem import Objective


@st.composite
def _tables(draw: st.DrawFn, whole: bool) -> tuple[list[int], list[float]]:
    # Few distinct values on purpose: ties, equal costs, zero costs and dominated options.
    few = st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.0, 8.0])
    cost = st.one_of(st.sampled_from([0, 1, 2, 3]), st.integers(0, 30))
    loss = few if whole else st.one_of(few, st.floats(0.0, 10.0, allow_subnormal=False))
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
    tables = draw(st.lists(_tables(whole), min_size=size, max_size=size))
    groups = tuple(
        Group(f"g{i}", np.array(cost), np.array(loss) * scale)
        for i, (cost, loss) in enumerate(tables)
    )
    smallest = sum(int(group.cost.min()) for group in groups)
    largest = sum(int(group.cost.max()) for group in groups)
    return Problem(groups, draw(st.integers(smallest, largest + 2)), objective)


def _feasible_choices(problem: Problem) -> list[tuple[int, ...]]:
    every = itertools.product(*[range(group.cost.size) for group in problem.groups])
    return [choice for choice in every if problem.cost_of(choice) <= problem.budget]


@pytest.fixture(scope="session")
def problems() -> Callable[..., st.SearchStrategy[Problem]]:
    """Feasible problems of at most 4 groups and 5 options: ``(objective, scale, whole)``."""
    return _problems


@pytest.fixture(scope="session")
def feasible_choices() -> Callable[[Problem], list[tuple[int, ...]]]:
    """All choices within the budget."""
    return _feasible_choices


@pytest.fixture(scope="session")
def optimum() -> Callable[[Problem], float]:
    """The smallest loss of any choice within the budget."""
    return lambda problem: min(map(problem.loss_of, _feasible_choices(problem)))


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
