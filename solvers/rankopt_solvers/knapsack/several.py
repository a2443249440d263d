"""Several budgets: a bound from the linear relaxation, a choice from rounding and a core program.

1. *Relax* by column generation (see columns): prices, a bound, a mixture. Each budget alone, with
   these prices for the others, is solved exactly (see single), which may end it.
2. *Round* the mixture to a choice within the budgets (see rounding).
3. *Reduce.* An option whose reduced loss at the prices exceeds the distance between choice and
   bound cannot be in a better choice (Dembo & Hammer 1980).
4. *Integer programs* over what is left: first a few of these options, which HiGHS is done with soon
   and which lessen that distance; then all that are left. Where these are
   more than MOST_COLUMNS a better choice may be missed. The bound does not depend on that.
5. *Enumerate* (see enumeration) what could still be better, where that is little: the optimum is
   proven, whatever HiGHS said.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rankopt_solvers.knapsack.budgets import Budgets, Priced, infeasible, normal_form, priced
from rankopt_solvers.knapsack.columns import Excess, Linear, relax_columns
from rankopt_solvers.knapsack.integer_program import Program, solve_program
from rankopt_solvers.knapsack.rounding import fill, least_beside, loss_of, round_mixture
from rankopt_solvers.problem import Problem
from rankopt_solvers.solution import NoChoiceFoundError
from rankopt_solvers.table import EPS, FloatArray, IntArray

#: Options in the first integer programs, and in the last: HiGHS overruns its time with more.
FEW_COLUMNS = 2_000
MOST_COLUMNS = 6_000

#: Options to round with.
NEAR = 20_000

#: Share of the time left that each of the first programs gets.
FIRST_SHARE = 0.3


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What the search ends with.

    Attributes:
        position: the choice, as positions of the options, shape ``(G,)``.
        timed_out: the clock ended it.
        stats: of its parts.
    """

    position: IntArray
    timed_out: bool
    stats: dict[str, Any]


def relaxed(problem: Problem, budgets: Budgets, stopped: Callable[[], bool]) -> Linear:
    """The linear relaxation.

    Raises:
        InfeasibleError: it has no solution, so no choice meets all budgets.
    """
    linear = relax_columns(budgets, stopped)
    if isinstance(linear, Excess):
        raise infeasible(problem, budgets, linear.row, linear.needed)
    return linear


def solve_several(
    problem: Problem,
    budgets: Budgets,
    linear: Linear,
    stopped: Callable[[], bool],
    remaining: Callable[[], float],
) -> Found:
    """Search for the best choice under two or more budgets.

    Args:
        problem: for the words of errors.
        budgets: of it.
        linear: their relaxation.
        stopped: asked before each integer program.
        remaining: seconds left.

    Raises:
        InfeasibleError: no choice meets all budgets; proven in numpy, not taken from HiGHS.
        NoChoiceFoundError: none was found.
    """
    at = linear.at
    near = _near(budgets, linear)
    core = budgets.keep(near)
    rounded = round_mixture(core, np.searchsorted(near, linear.column), linear.weight, at.price)
    best = None if rounded is None else near[rounded]
    stats: dict[str, Any] = {**linear.stats, "columns": 0, "kept_greedy": True}
    timed_out, most, share = False, FEW_COLUMNS, FIRST_SHARE
    while True:
        kept, whole = _survivors(budgets, at, best, most)
        if not kept.size:
            stats.setdefault("highs_status", "not needed: the choice reaches the bound")
            break
        if stopped():
            stats.setdefault("highs_status", "not tried: out of time")
            timed_out = True
            break
        seconds = remaining() * (1.0 if whole else share)
        found, said = _program_choice(budgets, at, best, kept, seconds)
        stats |= {**said, "all_columns": whole}
        timed_out = "limit" in said["highs_status"]
        before = _gap(budgets, at, best)
        if found is not None and _gap(budgets, at, found) < before:
            best = found
            stats["kept_greedy"] = False
        if whole or most == MOST_COLUMNS:
            break
        if not _gap(budgets, at, best) < before / 2:
            # Another sample of this size would not help.
            most, share = MOST_COLUMNS, 1.0
    if best is None:
        proof = least_beside(budgets)
        if proof is not None:
            raise infeasible(problem, budgets, *proof)
        raise NoChoiceFoundError(
            f"no choice within all {budgets.room.size} budgets was found (HiGHS: "
            f"{stats['highs_status']}), nor a proof that there is none: "
            "allow more time, or raise a limit"
        )
    return Found(best, timed_out, stats)


def _near(budgets: Budgets, linear: Linear) -> IntArray:
    """The options to round with: the best at the prices, the mixture, the cheapest of all kinds."""
    wanted = [_sample(linear.at.reduced, NEAR), linear.column, linear.at.position]
    for cost in budgets.cost:
        # The least d of a group is 0; of several, the one that loses least.
        free = np.flatnonzero(cost == 0)
        order = np.lexsort((budgets.loss[free], np.searchsorted(budgets.start, free, "right")))
        free = free[order]
        group = np.searchsorted(budgets.start, free, side="right")
        wanted.append(free[np.flatnonzero(np.diff(group, prepend=0))])
    return np.unique(np.concatenate(wanted))


def _sample(reduced: FloatArray, most: int) -> IntArray:
    """Indices of about ``most`` options: half of them the best ones, half from everywhere.

    Those with the smallest reduced losses are neighbours in a few groups whose curves are flat, and
    allow small changes only. So of each run of neighbours the best is taken too.
    """
    if reduced.size <= most:
        return np.arange(reduced.size)
    smallest = np.argpartition(reduced, most // 2)[: most // 2]
    run = -(-reduced.size // (most - most // 2))
    starts = np.arange(0, reduced.size, run)
    least = np.minimum.reduceat(reduced, starts)
    hits = np.flatnonzero(reduced == np.repeat(least, np.diff(starts, append=reduced.size)))
    return np.union1d(smallest, hits[np.searchsorted(hits, starts)])


def _gap(budgets: Budgets, at: Priced, best: IntArray | None) -> float:
    return math.inf if best is None else loss_of(budgets, best) - at.bound


def _survivors(
    budgets: Budgets, at: Priced, best: IntArray | None, most: int
) -> tuple[IntArray, bool]:
    """Positions of options that a better choice can have, at most ``most``; and whether all."""
    kept = np.arange(budgets.loss.size)
    gap = _gap(budgets, at, best)
    if gap <= 0:
        return kept[:0], True
    if best is not None:
        rounding = 4 * (len(at.price) + 1) * EPS * at.least
        kept = np.flatnonzero(at.reduced <= gap * (1 + 1e-9) + rounding)
    if kept.size <= most:
        return kept, True
    kept = kept[_sample(at.reduced[kept], most)]
    return np.union1d(kept, at.position), False


def program_of(budgets: Budgets, at: Priced, gap: float, kept: IntArray) -> Program:
    """The integer program of some options, around the best ones at the prices.

    Args:
        budgets: all options.
        at: prices.
        gap: between the choice in hand and the bound; infinite without a choice.
        kept: positions, sorted; the best option of each group among them.
    """
    group = np.searchsorted(budgets.start, kept, side="right") - 1
    here = at.position[group]
    spent = budgets.cost[:, kept] - budgets.cost[:, here]
    # Differences of neighbours: they keep digits that the prices of whole options have lost.
    reduced = (budgets.loss[kept] - budgets.loss[here]) + at.price @ spent
    reduced = np.maximum(reduced, 0.0)
    if gap == math.inf:
        gap = float(reduced.max()) or 1.0
    return Program(group, reduced, spent, budgets.left(at.position), at.price, gap)


def _program_choice(
    budgets: Budgets, at: Priced, best: IntArray | None, kept: IntArray, seconds: float
) -> tuple[IntArray | None, dict[str, Any]]:
    program = program_of(budgets, at, _gap(budgets, at, best), kept)
    taken, said = solve_program(program, seconds)
    if taken is None:
        return None, said
    core = budgets.keep(kept)
    if (core.left(taken) < 0).any():
        return None, said
    fill(core, taken)
    return kept[taken], said


def bound_of_several(problem: Problem, stopped: Callable[[], bool]) -> tuple[Budgets, Priced]:
    """The budgets that count, and the prices with the best bound; no prices if none counts."""
    budgets = normal_form(problem)
    if not budgets.room.size:
        return budgets, priced(budgets, np.zeros(0))
    return budgets, relaxed(problem, budgets, stopped).at
