"""Every choice that could be better, where these are few: the optimum, proven without a program.

At prices p of the budgets a choice loses the Lagrangian bound L(p), the reduced losses of its
options, and p times what it leaves unspent. One that loses less than U has reduced losses of less
than U - L(p) together. Partial choices are extended group by group, those with the fewest such
options first, as long as that and all budgets can still be kept.
"""

import itertools

import numpy as np

from rankopt_solvers.knapsack.budgets import Budgets, Priced
from rankopt_solvers.table import EPS, IntArray

#: Partial choices that are held at once.
MOST_STATES = 100_000


def best_of_all(budgets: Budgets, at: Priced, gap: float) -> tuple[bool, IntArray | None]:
    """The best choice that loses at most ``gap`` more than the bound.

    Args:
        budgets: all options.
        at: prices, and the bound.
        gap: finite.

    Returns:
        Whether all were looked at; and positions, shape ``(G,)``, if there is such a choice.
    """
    rounding = 4 * (len(at.price) + 1) * EPS * at.least
    most = gap * (1 + 1e-9) + rounding
    kept = np.flatnonzero(at.reduced <= most)
    start = np.searchsorted(kept, budgets.start)
    parts = [kept[a:b] for a, b in itertools.pairwise(start)]
    order = sorted(range(len(parts)), key=lambda g: parts[g].size)
    # What the groups that are still to come take at the least.
    least = np.array([budgets.cost[:, part].min(axis=1) for part in parts])
    ahead = least.sum(axis=0)
    spent = np.zeros((1, budgets.room.size), dtype=np.int64)
    reduced, lost = np.zeros(1), np.zeros(1)
    path: list[tuple[int, IntArray, IntArray]] = []
    for g in order:
        part = parts[g]
        if spent.shape[0] * part.size > 10 * MOST_STATES:
            return False, None
        ahead = ahead - least[g]
        longer = spent[:, None, :] + budgets.cost[:, part].T
        above = reduced[:, None] + at.reduced[part]
        fits = (above <= most) & (longer + ahead <= budgets.room).all(axis=2)
        parent, option = np.nonzero(fits)
        if parent.size > MOST_STATES:
            return False, None
        path.append((g, parent, part[option]))
        spent, reduced = longer[parent, option], above[parent, option]
        lost = lost[parent] + budgets.loss[part[option]]
    if not lost.size:
        return True, None
    state, position = int(lost.argmin()), np.zeros(len(parts), dtype=np.int64)
    for g, parent, option in reversed(path):
        position[g], state = option[state], parent[state]
    return True, position
