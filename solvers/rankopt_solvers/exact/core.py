"""The core: every choice whose Lagrangian loss is within a tolerance, by dynamic programming.

Around the vertices of a linear relaxation, option j of group g changes cost by dc and loss by dl
and adds ``d = dl + lam * dc >= 0`` to the Lagrangian function. A choice loses

    L(lam) + sum_g d_g + lam * unspent,

so a choice within ``tolerance`` of L(lam) uses only options with small d and leaves little
unspent: the core (Balas & Zemel 1980; Pisinger 1995). Losses are integers here (multiples of a
grid), so that sums are exact in any order; d is rounded, and rounded down wherever it decides.

*Lattice.* If all dc in the core are multiples of a divisor, ``room mod divisor`` stays unspent in
every choice. That part of the tolerance is spoken for, fewer options remain, and the divisor may
grow.
"""

import dataclasses

import numpy as np

from rankopt_solvers.exact.dynamic import Step, Steps, run
from rankopt_solvers.hull import Relaxation, reduced_losses
from rankopt_solvers.table import EPS, FloatArray, IntArray, Table


@dataclasses.dataclass(frozen=True, eq=False)
class Core:
    """What a dynamic program needs of a relaxed table.

    Attributes:
        table: the options; losses are whole numbers.
        relaxation: of the table.
        reduced: d of each option, rounded down, shape ``(N,)``.
        bound: L(lam), rounded down.
    """

    table: Table
    relaxation: Relaxation
    reduced: FloatArray
    bound: float


def core_of(table: Table, relaxation: Relaxation) -> Core:
    """Reduced losses and bound of a table whose losses are whole numbers below 2**53."""
    at = relaxation.position
    reduced = reduced_losses(table, relaxation.multiplier, table.cost[at], table.loss[at])
    least = np.minimum.reduceat(reduced, table.start[:-1])
    reduced -= table.spread(least)
    taken = int(table.loss[relaxation.position].sum())
    unspent = relaxation.multiplier * relaxation.room
    # The sum is exact; one rounding of the product and one of each difference remain.
    bound = taken + float(least.sum()) - unspent
    if unspent or least.any():
        bound -= 4 * EPS * (abs(bound) + unspent)
    return Core(table, relaxation, reduced, bound)


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What a dynamic program ends with.

    Attributes:
        complete: every choice within the tolerance was looked at.
        position: the best one, shape ``(G,)``; None if there is none.
        loss: of it.
        states: partial choices looked at.
    """

    complete: bool
    position: IntArray | None
    loss: int
    states: int


def _lattice(core: Core, tolerance: float) -> tuple[IntArray, float, int]:
    """The options of the core, what is left of the tolerance, and the divisor of the changes."""
    table, relaxation = core.table, core.relaxation
    position = table.spread(relaxation.position)
    kept = np.flatnonzero(core.reduced <= tolerance)
    while True:
        change = table.cost[kept] - table.cost[position[kept]]
        divisor = int(np.gcd.reduce(change)) if kept.size else 0
        stuck = relaxation.room % divisor if divisor else relaxation.room
        left = tolerance - relaxation.multiplier * stuck * (1 - EPS)
        if left < 0:
            return kept[:0], left, divisor
        fewer = kept[core.reduced[kept] <= left]
        if fewer.size == kept.size:
            return kept, left, divisor
        kept = fewer


def enumerate_core(core: Core, tolerance: float, most_states: int) -> Found:
    """The best choice within ``bound + tolerance``, if the states do not exceed a limit.

    Args:
        core: of the table.
        tolerance: in units of the losses.
        most_states: partial choices to look at before giving up.
    """
    table, relaxation = core.table, core.relaxation
    kept, left, divisor = _lattice(core, tolerance)
    start = np.searchsorted(kept, table.start)
    size = np.diff(start)
    if (size == 0).any():
        return Found(True, None, 0, 0)
    unit = max(divisor, 1)
    # Rows with one option left may not keep their vertex: the change they force comes first.
    alone = size == 1
    single, vertex = kept[start[:-1][alone]], relaxation.position[alone]
    steps = Steps(
        steps=_steps(core, kept, start, unit),
        cost=int((table.cost[single] - table.cost[vertex]).sum()) // unit,
        loss=int((table.loss[single] - table.loss[vertex]).sum()),
        room=relaxation.room // unit,
        multiplier=relaxation.multiplier * unit,
        left=left,
    )
    complete, options, loss, states = run(steps, most_states)
    total = int(table.loss[relaxation.position].sum()) + loss
    if options is None or total > core.bound + tolerance:
        return Found(complete, None, 0, states)
    position = relaxation.position.copy()
    position[alone] = single
    for step, option in zip(steps.steps, options, strict=True):
        position[step.row] = kept[start[step.row] + option]
    return Found(complete, position, total, states)


def _steps(core: Core, kept: IntArray, start: IntArray, unit: int) -> list[Step]:
    """The rows with a choice left, those with a cheap second option first."""
    table = core.table
    steps = []
    for row in np.flatnonzero(np.diff(start) > 1).tolist():
        options = kept[start[row] : start[row + 1]]
        at = core.relaxation.position[row]
        steps.append(
            Step(
                row,
                (table.cost[options] - table.cost[at]) // unit,
                (table.loss[options] - table.loss[at]).astype(np.int64),
                core.reduced[options],
            )
        )
    return sorted(steps, key=lambda step: float(np.partition(step.reduced, 1)[1]))
