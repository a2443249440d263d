"""The core and its dynamic program: in a list or an array, it agrees with enumeration."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt_solvers import Group, Problem
from rankopt_solvers.exact.core import core_of, enumerate_core
from rankopt_solvers.exact.dynamic import LISTED, Step, Steps, run
from rankopt_solvers.hull import relax

#: Lists throughout, a list that soon becomes an array, and an array.
WIDE = (0.0, 0.02, math.inf)

Optimum = Callable[[Problem], float]


def brute_core(given: Steps) -> int | None:
    """The least loss of any choice that ends within the room."""
    losses = []
    for options in itertools.product(*[range(s.change.size) for s in given.steps]):
        chosen = list(zip(given.steps, options, strict=True))
        if given.cost + sum(int(s.change[j]) for s, j in chosen) <= given.room:
            losses.append(given.loss + sum(int(s.loss[j]) for s, j in chosen))
    return min(losses, default=None)


@st.composite
def cores(draw: st.DrawFn) -> Steps:
    """Rows around a vertex of change 0; whole numbers keep the reduced losses exact."""
    lam = draw(st.integers(0, 6))
    steps = []
    for row in range(draw(st.integers(0, 5))):
        above = draw(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 20)), max_size=3))
        # Undominated, as in a table: cost up, loss down. Loss is what the price leaves of it.
        made = {0: 0} | {change: extra - lam * change for change, extra in above if change}
        kept: list[tuple[int, int]] = []
        for change in sorted(made):
            if not kept or made[change] < kept[-1][1]:
                kept.append((change, made[change]))
        change, loss = (np.array(x, dtype=np.int64) for x in zip(*kept, strict=True))
        steps.append(Step(row, change, loss, (loss + lam * change).astype(np.float64)))
    cost = draw(st.integers(-3, 3))
    loss = draw(st.integers(0, 10)) - lam * cost
    return Steps(steps, cost, loss, draw(st.integers(0, 30)), float(lam), 0.0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(given_=cores(), left=st.sampled_from([0.0, 3.0, 10.0, 40.0, 1e6]))
def test_lists_and_arrays_agree_with_enumeration(given_: Steps, left: float) -> None:
    steps = dataclasses.replace(given_, left=left)
    best = brute_core(steps)
    # What a choice adds to the Lagrangian function is its loss and the price of all it changes.
    reached = best is not None and best + steps.multiplier * steps.room <= left
    found = []
    for wide in WIDE:
        complete, options, loss, _ = run(steps, 10**6, wide)
        assert complete
        if options is not None:
            chosen = list(zip(steps.steps, options, strict=True))
            assert steps.loss + sum(int(s.loss[j]) for s, j in chosen) == loss
            assert steps.cost + sum(int(s.change[j]) for s, j in chosen) <= steps.room
            assert best is not None and loss >= best
        if reached:
            assert options is not None and loss == best
        found.append(loss if options is not None else None)
    if reached:
        assert found == [found[0]] * len(WIDE)


@pytest.mark.parametrize("wide", WIDE)
def test_a_program_gives_up_at_its_limit(wide: float) -> None:
    step = Step(0, np.arange(10), -np.arange(10), np.zeros(10))
    steps = Steps([step] * 5, 0, 0, 20, 1.0, 5.0)
    complete, options, _, states = run(steps, 50, wide)
    assert not complete and options is None and states * LISTED > 50
    assert run(steps, 10**6, wide)[2] == -20


@pytest.mark.parametrize("seed", range(8))
def test_a_core_holds_the_best_choice_within_its_tolerance(optimum: Optimum, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = tuple(
        Group(f"g{i}", rng.integers(0, 40, 6) * 3, rng.integers(0, 1000, 6).astype(float))
        for i in range(4)
    )
    smallest = sum(int(g.cost.min()) for g in groups)
    problem = Problem(groups, smallest + int(rng.integers(0, 120)))
    table = problem.table
    core = core_of(table, relax(table, problem.hulls, table.tightened(problem.budget)))
    best = optimum(problem)
    assert core.bound <= best
    for tolerance in (0.0, (best - core.bound) * 0.99, best - core.bound, 300.0, 1e9):
        found = enumerate_core(core, tolerance, 10**6)
        assert found.complete
        if found.position is not None:
            choice = table.options_at(found.position)
            assert problem.cost_of(choice) <= problem.budget
            assert problem.loss_of(choice) == found.loss <= core.bound + tolerance
        if best <= core.bound + tolerance:
            assert found.loss == best
