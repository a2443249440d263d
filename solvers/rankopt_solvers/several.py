"""Several budgets: a bound from the linear relaxation, a choice from rounding and a core program.

1. *Relax* by column generation (see columns): prices, a bound, a mixture.
2. *Round* the mixture to a choice within the budgets (see rounding).
3. *Reduce.* An option whose reduced loss at the prices exceeds the distance between choice and bound
   cannot be in a better choice (Dembo & Hammer 1980).
4. *Integer programs* over what is left: first the options with the smallest reduced losses, which HiGHS
   finishes and which lower the distance, then more of them. More than MOST_COLUMNS are not tried, so a
   better choice may be missed. The bound does not depend on that.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from rankopt_solvers.budgets import EPS, Budgets, Priced, infeasible, normal_form
from rankopt_solvers.columns import Excess, Linear, relax_columns
from rankopt_solvers.integer_program import Program, solve_program
from rankopt_solvers.problem import Problem
from rankopt_solvers.rounding import fill, least_beside, loss_of, round_mixture
from rankopt_solvers.table import IntArray

#: Options in the first integer program, and in the last.
FEW_COLUMNS = 2_000
MOST_COLUMNS = 20_000

#: Share of the time left that the first one gets.
FIRST_SHARE = 0.3


class NoChoiceFoundError(ValueError):
    """No choice within all budgets was found, nor a proof that there is none."""


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What the search ends with.

    Attributes:
        position: the choice, as positions of the options, shape ``(G,)``.
        at: the prices, and the bound.
        timed_out: the clock ended it.
        stats: of its parts.
    """

    position: IntArray
    at: Priced
    timed_out: bool
    stats: dict[str, Any]


def relaxed(
    problem: Problem, budgets: Budgets, stopped: Callable[[], bool]
) -> Linear:
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
    stopped: Callable[[], bool],
    remaining: Callable[[], float],
) -> Found:
    """Search for the best choice under two or more budgets.

    Args:
        problem: for the words of errors.
        budgets: of it.
        stopped: asked between rounds and before each integer program.
        remaining: seconds left.

    Raises:
        InfeasibleError: no choice meets all budgets; proven in numpy, not taken from HiGHS.
        NoChoiceFoundError: none was found.
    """
    linear = relaxed(problem, budgets, stopped)
    at = linear.at
    near = _near(budgets, linear)
    core = budgets.keep(near)
    rounded = round_mixture(core, np.searchsorted(near, linear.column), linear.weight, at.price)
    best = None if rounded is None else near[rounded]
    stats: dict[str, Any] = {"rounds": linear.rounds, "lp_columns": linear.columns}
    stats |= {"lp": linear.value, "columns": 0, "kept_greedy": True}
    timed_out, most = False, 0
    while most < MOST_COLUMNS:
        most = FEW_COLUMNS if most == 0 else MOST_COLUMNS
        kept, whole = _survivors(budgets, at, best, most)
        if not kept.size:
            stats.setdefault("highs_status", "not needed: the choice reaches the bound")
            break
        if stopped():
            stats.setdefault("highs_status", "not tried: out of time")
            timed_out = True
            break
        seconds = remaining() * (1.0 if whole or most == MOST_COLUMNS else FIRST_SHARE)
        found, said = _program_choice(budgets, at, best, kept, seconds)
        stats |= said
        stats["all_columns"] = whole
        timed_out = "limit" in said["highs_status"]
        if found is not None and (best is None or loss_of(budgets, found) < loss_of(budgets, best)):
            best = found
            stats["kept_greedy"] = False
        if whole:
            break
    if best is None:
        proof = least_beside(budgets)
        if proof is not None:
            raise infeasible(problem, budgets, *proof)
        raise NoChoiceFoundError(
            f"no choice within all {budgets.room.size} budgets was found (HiGHS: "
            f"{stats['highs_status']}), nor a proof that there is none: "
            "allow more time, or raise a limit"
        )
    return Found(best, at, timed_out, stats)


def _near(budgets: Budgets, linear: Linear) -> IntArray:
    """The options to round with: the best at the prices, the mixture, the cheapest of all kinds."""
    wanted = [_smallest(linear.at.reduced, MOST_COLUMNS), linear.column, linear.at.position]
    for cost in budgets.cost:
        # The least d of a group is 0; of several, the one that loses least.
        free = np.flatnonzero(cost == 0)
        order = np.lexsort((budgets.loss[free], np.searchsorted(budgets.start, free, "right")))
        free = free[order]
        group = np.searchsorted(budgets.start, free, side="right")
        wanted.append(free[np.flatnonzero(np.diff(group, prepend=0))])
    return np.unique(np.concatenate(wanted))


def _smallest(reduced: np.ndarray, most: int) -> IntArray:
    if reduced.size <= most:
        return np.arange(reduced.size)
    return np.asarray(np.argpartition(reduced, most)[:most])


def _survivors(
    budgets: Budgets, at: Priced, best: IntArray | None, most: int
) -> tuple[IntArray, bool]:
    """Positions of options that a better choice can have, at most ``most``; and whether all."""
    kept = np.arange(budgets.loss.size)
    if best is not None:
        gap = loss_of(budgets, best) - at.bound
        if gap <= 0:
            return kept[:0], True
        rounding = 4 * (len(at.price) + 1) * EPS * at.least
        kept = np.flatnonzero(at.reduced <= gap * (1 + 1e-9) + rounding)
    if kept.size <= most:
        return kept, True
    kept = kept[_smallest(at.reduced[kept], most)]
    return np.union1d(kept, at.position), False


def program_of(budgets: Budgets, at: Priced, gap: float | None, kept: IntArray) -> Program:
    """The integer program of some options, around the best ones at the prices.

    Args:
        budgets: all options.
        at: prices.
        gap: between the choice in hand and the bound; None without a choice.
        kept: positions, sorted; the best option of each group among them.
    """
    group = np.searchsorted(budgets.start, kept, side="right") - 1
    here = at.position[group]
    spent = budgets.cost[:, kept] - budgets.cost[:, here]
    # Differences of neighbours: they keep digits that the prices of whole options have lost.
    reduced = (budgets.loss[kept] - budgets.loss[here]) + at.price @ spent
    reduced = np.maximum(reduced, 0.0)
    if gap is None:
        gap = float(reduced.max()) or 1.0
    return Program(group, reduced, spent, budgets.left(at.position), at.price, gap)


def _program_choice(
    budgets: Budgets, at: Priced, best: IntArray | None, kept: IntArray, seconds: float
) -> tuple[IntArray | None, dict[str, Any]]:
    gap = None if best is None else loss_of(budgets, best) - at.bound
    taken, said = solve_program(program_of(budgets, at, gap, kept), seconds)
    if taken is None:
        return None, said
    core = budgets.keep(kept)
    if (core.left(taken) < 0).any():
        return None, said
    fill(core, taken)
    return kept[taken], said


def bound_of_several(problem: Problem, stopped: Callable[[], bool]) -> tuple[Budgets, Priced]:
    """The budgets that count, and the prices with the best bound."""
    budgets = normal_form(problem)
    return budgets, relaxed(problem, budgets, stopped).at
