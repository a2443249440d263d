"""The linear relaxation under several budgets, by column generation.

The relaxation takes a convex mixture of options in every group. HiGHS solves it over a small set of
columns, the master; its dual prices, one for each budget, value all options at once in numpy, and
the best option of each group joins the set until none is better than what the mixture has (Dantzig
& Wolfe 1960; Gilmore & Gomory 1961). Millions of options take a handful of rounds and some thousand
columns. At most as many groups as there are budgets stay mixed.

The prices are all that is believed: the bound is the Lagrangian function at them, over all options.
If the columns cannot meet the budgets the same rounds minimise the excess instead of the loss.
Prices at which the cheapest options together cost more than all rooms together prove that no
mixture, and so no choice, meets the budgets (Farkas 1902).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rankopt_solvers.knapsack.budgets import Budgets, Priced, priced
from rankopt_solvers.table import EPS, FloatArray, IntArray

#: Rounds of pricing; a dozen are usual.
MOST_ROUNDS = 40

#: Relative distance of the master's optimum and the bound at which the rounds end.
CLOSE = 1e-10


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """What column generation ends with.

    Attributes:
        at: the prices with the best bound.
        value: the master's optimum: the value of the relaxation, if the rounds ended by themselves.
        column: positions of the options with a positive weight.
        weight: of each of them.
        rounds: masters solved.
        columns: in the last one.
    """

    at: Priced
    value: float
    column: IntArray
    weight: FloatArray
    rounds: int
    columns: int

    @property
    def stats(self) -> dict[str, Any]:
        """What a solution says of it."""
        return {"rounds": self.rounds, "lp_columns": self.columns, "lp": self.value}


@dataclasses.dataclass(frozen=True, eq=False)
class Excess:
    """Proof that no choice meets all budgets.

    Attributes:
        row: the budget to blame.
        needed: of it, beside the others: more than its room.
    """

    row: int
    needed: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Master:
    value: float
    weight: FloatArray
    price: FloatArray


def relax_columns(budgets: Budgets, stopped: Callable[[], bool]) -> Linear | Excess:
    """Solve the linear relaxation.

    Args:
        budgets: at least one.
        stopped: asked between rounds; the best prices so far are good for a bound.
    """
    columns = _first_columns(budgets)
    none = dataclasses.replace(budgets, loss=np.zeros_like(budgets.loss))
    rounds = 0
    # First the excess, usually zero at once; then the loss.
    excess = np.zeros(budgets.room.size)
    while True:
        master, excess = _solve_master(none, columns, None)
        rounds += 1
        at = priced(none, master.price)
        new = np.setdiff1d(_wanted(at), columns)
        if master.value <= 1e-9 or not new.size or rounds >= MOST_ROUNDS or stopped():
            break
        columns = np.union1d(columns, new)
    if master.value > 1e-9:
        proof = _proof_of_excess(budgets, at)
        if proof is not None:
            return proof
    best = priced(budgets, np.zeros(budgets.room.size))
    while True:
        master, _ = _solve_master(budgets, columns, excess)
        rounds += 1
        at = priced(budgets, master.price)
        if at.bound > best.bound:
            best = at
        new = np.setdiff1d(_wanted(at), columns)
        close = master.value - best.bound <= CLOSE * abs(master.value)
        if close or not new.size or rounds >= MOST_ROUNDS or stopped():
            break
        columns = np.union1d(columns, new)
    used = master.weight > 1e-9
    return Linear(best, master.value, columns[used], master.weight[used], rounds, columns.size)


def _scales(budgets: Budgets) -> FloatArray:
    """What a unit of each row of the master is worth: its room, or its dearest option."""
    dearest = budgets.cost.max(axis=1)
    return np.where(budgets.room > 0, budgets.room, dearest).astype(np.float64)


def _first_columns(budgets: Budgets) -> IntArray:
    """Least loss, least cost, and the best options at some prices in between.

    The prices go from all budgets being cheap to all being dear: up to there the budgets' sum, in
    units of their rooms, is one budget, and these are vertices of its hulls.
    """
    scales = _scales(budgets)
    wanted = [priced(budgets, np.zeros(scales.size)).position]
    none = dataclasses.replace(budgets, loss=np.zeros_like(budgets.loss))
    for row in range(scales.size):
        wanted.append(priced(none, np.eye(scales.size)[row]).position)
    total = float(np.maximum.reduceat(budgets.loss, budgets.start[:-1]).sum())
    for power in range(-8, 5):
        price = np.minimum(total * 2.0**power / scales, np.finfo(np.float64).max)
        wanted.append(priced(budgets, price).position)
    return np.unique(np.concatenate(wanted))


def _wanted(at: Priced) -> IntArray:
    """The best option of each group, and the options beside it: prices are not final yet."""
    here = at.position
    beside = np.concatenate((here - 1, here, here + 1))
    beside = beside[(beside >= 0) & (beside < at.reduced.size)]
    return np.unique(beside)


def _solve_master(
    budgets: Budgets, columns: IntArray, excess: FloatArray | None
) -> tuple[_Master, FloatArray]:
    """Minimise the loss over some columns, or the excess over the rooms if none is given yet."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, hstack

    groups, rows = budgets.start.size - 1, budgets.room.size
    group = np.searchsorted(budgets.start, columns, side="right") - 1
    lost = budgets.loss[columns]
    least = np.full(groups, np.inf)
    np.minimum.at(least, group, lost)
    lost = lost - least[group]
    unit = float(lost.max()) or 1.0
    scales = _scales(budgets)
    first = excess is None
    objective = np.concatenate((lost / unit * (not first), np.full(rows, float(first))))
    one_each = csr_array(
        (np.ones(columns.size), (group, np.arange(columns.size))),
        shape=(groups, columns.size + rows),
    )
    spent = csr_array(budgets.cost[:, columns] / scales[:, None])
    within = hstack((spent, -csr_array(np.eye(rows))))
    upper = [None] * rows if excess is None else (excess + 1e-12).tolist()
    solved = linprog(
        objective,
        A_ub=within,
        b_ub=budgets.room / scales,
        A_eq=one_each,
        b_eq=np.ones(groups),
        bounds=[(0, None)] * columns.size + [(0, most) for most in upper],
        method="highs",
        options={"dual_feasibility_tolerance": 1e-10, "primal_feasibility_tolerance": 1e-10},
    )
    if solved.x is None:
        raise RuntimeError(f"HiGHS did not solve the linear relaxation: {solved.message}")
    price = np.maximum(-solved.ineqlin.marginals, 0.0) / scales
    value = float(solved.fun)
    if not first:
        price, value = price * unit, value * unit + math.fsum(least.tolist())
    return _Master(value, solved.x[:-rows], price), solved.x[-rows:]


def _proof_of_excess(budgets: Budgets, at: Priced) -> Excess | None:
    """Whether the cheapest options cost more than all rooms, at prices for costs alone."""
    asked = at.price * budgets.room
    over = at.least - math.fsum(asked.tolist())
    rounding = (budgets.start.size + 2 * budgets.room.size + 4) * EPS
    if over <= rounding * (at.least + float(asked.sum())):
        return None
    row = int(np.argmax(asked))
    if not at.price[row] > 0:
        row = int(np.argmax(at.price))
    extra = max(1, math.ceil(over / at.price[row] * (1 - 1e-9)))
    return Excess(row, int(budgets.room[row]) + extra)
