"""From a mixture of options to a choice within several budgets; or the proof that there is none.

At most as many groups as there are budgets are mixed in the linear relaxation. Each way to settle
them is repaired (the change that lessens the excess most for the loss it adds, until there is none)
and filled (the change that saves most for what it spends, until none fits); the best is kept. None
of this is certain to find a choice where there is one.
"""

import itertools
import math

import numpy as np

from rankopt_solvers.knapsack.budgets import Budgets
from rankopt_solvers.table import FloatArray, IntArray

#: Ways to settle the mixed groups that are tried.
MOST_WAYS = 16

#: Partial choices that the proof of infeasibility holds at once.
MOST_STATES = 200_000


def round_mixture(
    core: Budgets, column: IntArray, weight: FloatArray, price: FloatArray
) -> IntArray | None:
    """A choice within the budgets near a mixture; None if none was found.

    Args:
        core: the options to choose from.
        column: positions of the mixture's options, sorted.
        weight: of each of them.
        price: of the budgets, shape ``(R,)``.

    Returns:
        Positions, shape ``(G,)``.
    """
    group = np.searchsorted(core.start, column, side="right") - 1
    order = np.lexsort((-weight, group))
    firsts = np.flatnonzero(np.diff(group[order], prepend=-1))
    heaviest = column[order][firsts]
    parts = np.split(column[order], firsts[1:])
    mixed = [part.tolist() for part in parts if part.size > 1]
    best: IntArray | None = None
    for way in itertools.islice(itertools.product(*mixed), MOST_WAYS):
        position = heaviest.copy()
        settled = np.array(way, dtype=np.int64)
        position[np.searchsorted(core.start, settled, side="right") - 1] = settled
        if not repair(core, position, price):
            continue
        fill(core, position)
        if best is None or loss_of(core, position) < loss_of(core, best):
            best = position
    return best


def loss_of(core: Budgets, position: IntArray) -> float:
    """Sum of the losses, correctly rounded."""
    return math.fsum(core.loss[position].tolist())


def repair(core: Budgets, position: IntArray, price: FloatArray) -> bool:
    """Change a choice, in place, until it is within all budgets; False if that is not reached."""
    group, scale = core.group, _scale(core)
    while True:
        left = core.left(position)
        if (left >= 0).all():
            return True
        here = position[group]
        after = left[:, None] - (core.cost - core.cost[:, here])
        excess = (np.maximum(-after, 0) / scale[:, None]).sum(axis=0)
        lessened = float((np.maximum(-left, 0) / scale).sum()) - excess
        if not float(lessened.max()) > 1e-12:
            return False
        # What the change costs, at the prices of the budgets that it eases or burdens.
        useful = np.maximum(lessened, 1e-12)
        with np.errstate(over="ignore", invalid="ignore"):
            worse = core.loss - core.loss[here] + price @ (core.cost - core.cost[:, here])
            worth = np.where(lessened > 1e-12, np.fmax(worse, 0.0) / useful, np.inf)
        # Of the changes that cost nothing, the one that lessens most.
        best = np.flatnonzero(worth == worth.min())
        change = int(best[np.argmax(lessened[best])])
        position[group[change]] = change


def fill(core: Budgets, position: IntArray) -> None:
    """Spend what a choice within the budgets leaves, in place, while some change saves loss."""
    group, scale = core.group, _scale(core)
    while True:
        here = position[group]
        saved = core.loss[here] - core.loss
        extra = core.cost - core.cost[:, here]
        fits = (saved > 0) & (extra <= core.left(position)[:, None]).all(axis=0)
        if not fits.any():
            return
        spent = (np.maximum(extra, 0) / scale[:, None]).sum(axis=0)
        with np.errstate(over="ignore"):
            density = np.where(fits, saved / np.maximum(spent, 1e-15), -1.0)
        change = int(np.argmax(density))
        position[group[change]] = change


def _scale(core: Budgets) -> FloatArray:
    return np.maximum(core.room, 1).astype(np.float64)


def least_beside(budgets: Budgets) -> tuple[int, int] | None:
    """Proof by enumeration that no choice meets all budgets, where that takes few partial choices.

    Returns:
        A budget and the least of it that a choice within the budgets after it needs, which is more
        than its room; None if there is a choice, or too many partial ones to know.
    """
    for row in range(budgets.room.size - 1):
        states = np.zeros((1, budgets.room.size - row), dtype=np.int64)
        for first, last in itertools.pairwise(budgets.start.tolist()):
            options = np.unique(budgets.cost[row:, first:last].T, axis=0)
            if states.shape[0] * options.shape[0] > 4 * MOST_STATES:
                return None
            states = (states[:, None, :] + options).reshape(-1, states.shape[1])
            # Costs are not negative: what is over now stays over.
            states = states[(states[:, 1:] <= budgets.room[row + 1 :]).all(axis=1)]
            states = _undominated(np.unique(states, axis=0))
            if states.shape[0] > MOST_STATES:
                return None
        if states.size:
            least = int(states[:, 0].min())
            return (row, least) if least > int(budgets.room[row]) else None
        # The budgets after this one contradict each other.
    return None


def _undominated(states: IntArray) -> IntArray:
    """Of sorted states with two costs, those that no other state beats; others as they are."""
    if states.shape[1] != 2 or not states.size:
        return states
    before = np.minimum.accumulate(states[:, 1])
    keep = np.concatenate(([True], states[1:, 1] < before[:-1]))
    return states[keep]
