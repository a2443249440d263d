"""The integer program of a core of options, through cvxpy and HiGHS.

One binary per option, one option of each group: as tight as the linear relaxation. Around a base
choice with Lagrangian prices p, an option is worse by its reduced loss d and spends more of the
budgets by s (less, if negative). What a choice loses, beyond a constant, is

    sum of its d + sum_i p_i left_i,   left_i = room_i - sum of its s_i >= 0,

the objective here. Two things make the program trustworthy where the plain one is not:

* *Scale.* HiGHS stops at absolute tolerances (1e-7 and larger): losses of 1e-9 would all look
  alike. The objective is scaled so that the gap that is left becomes SCALE.
* *Precision.* HiGHS takes no coefficient above 1e15, and a binary may be off by 1e-6, which times a
  large cost is much. A budget with numbers beyond LARGEST is counted in a larger unit, rounded up:
  a choice that fits in the program fits the budget; one that fits by less than a unit for each
  group can be missed.
"""

import dataclasses
import math
import warnings
from typing import Any

import numpy as np

from rankopt_solvers.table import FloatArray, IntArray

#: What the gap between the choice in hand and the bound becomes in the scaled objective.
SCALE = 1e4

#: Largest coefficient of the objective.
LARGEST_OBJECTIVE = 1e12

#: Largest coefficient of a budget.
LARGEST = 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A core of n options under R budgets.

    Attributes:
        group: of each option, sorted, every group at least once; shape ``(n,)``.
        reduced: d, shape ``(n,)``.
        spent: s, shape ``(R, n)``.
        room: what the base choice leaves, shape ``(R,)``; negative where it is over.
        price: p, shape ``(R,)``.
        gap: how much the objective may be, to be of interest; positive.
    """

    group: IntArray
    reduced: FloatArray
    spent: IntArray
    room: IntArray
    price: FloatArray
    gap: float


def require_milp() -> None:
    """Raise ImportError, naming the extra, unless cvxpy, HiGHS and scipy are there."""
    try:
        import cvxpy  # noqa: F401
        import highspy  # noqa: F401  (cvxpy reports it missing only as a failed solve)
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the knapsack solver needs cvxpy and highspy: pip install 'rankopt[milp]'"
        ) from error


def _budget_rows(program: Program) -> tuple[IntArray, IntArray, FloatArray, int]:
    """Coefficients, rooms and prices of the budgets in units that HiGHS takes; the largest unit."""
    start = np.flatnonzero(np.diff(program.group, prepend=-1))
    spent, room, price = program.spent.copy(), program.room.copy(), program.price.copy()
    largest_unit = 1
    for i in range(room.size):
        most = int(np.maximum.reduceat(spent[i], start).sum())
        unit = max(int(np.gcd.reduce(spent[i])), 1)
        largest = max(int(np.abs(spent[i]).max()), abs(min(int(room[i]), most))) // unit
        unit *= 2 ** max(0, largest.bit_length() - LARGEST.bit_length() + 1)
        largest_unit = max(largest_unit, unit if largest >= LARGEST else 1)
        spent[i] = -(-spent[i] // unit)
        # More room than can be spent would only be a large number.
        room[i] = min(int(room[i]) // unit, int(np.maximum.reduceat(spent[i], start).sum()))
        price[i] *= unit
    return spent, room, price, largest_unit


def solve_program(program: Program, time_limit: float) -> tuple[IntArray | None, dict[str, Any]]:
    """The options that HiGHS takes, one of each group, and what it says about itself.

    Args:
        program: the core.
        time_limit: seconds for HiGHS. Its limit is not a hard one: a call may overrun it.

    Returns:
        Indices into the core, shape ``(G,)``, or None; they are to be recounted. In the dict:
        ``columns``, ``highs_status``, and where there is one ``highs_gap``, relative to the gap
        of the program; ``cost_unit`` if costs were counted in a larger unit.
    """
    require_milp()
    import cvxpy as cp
    from scipy.sparse import csr_array

    columns = program.group.size
    groups = int(program.group[-1]) + 1
    spent, room, price, unit = _budget_rows(program)
    stats: dict[str, Any] = {"columns": columns}
    if unit > 1:
        stats["cost_unit"] = unit
    one_each = csr_array(
        (np.ones(columns), (program.group, np.arange(columns))), shape=(groups, columns)
    )
    # A coefficient far above the gap keeps an option out, however large it is.
    with np.errstate(over="ignore"):
        reduced, prices = (
            np.minimum(x / program.gap * SCALE, LARGEST_OBJECTIVE) for x in (program.reduced, price)
        )
    take = cp.Variable(columns, boolean=True)
    left = cp.Variable(room.size, nonneg=True)
    stated = cp.Problem(
        cp.Minimize(reduced @ take + prices @ left),
        [one_each @ take == 1, csr_array(spent.astype(np.float64)) @ take + left == room],
    )
    try:
        with warnings.catch_warnings():
            # At the time limit; the status says so, and the answer is recounted.
            warnings.filterwarnings("ignore", "Solution may be inaccurate", UserWarning)
            stated.solve(
                solver=cp.HIGHS, time_limit=time_limit, mip_rel_gap=0.0, mip_abs_gap=SCALE * 1e-9
            )
    except cp.SolverError as error:
        stats["highs_status"] = f"failed: {error}"
        return None, stats
    stats["highs_status"] = str(stated.status)
    values = take.value
    # Without an incumbent cvxpy reports zeros; a choice takes exactly one option of each group.
    if values is None or not np.array_equal(one_each @ np.round(values), np.ones(groups)):
        return None, stats
    gap = _own_gap(stated)
    if gap is not None:
        stats["highs_gap"] = gap
    return np.flatnonzero(np.round(values) == 1), stats


def _own_gap(stated: Any) -> float | None:
    """Distance of HiGHS's objective and its own bound, as a share of the program's gap."""
    info = stated.solver_stats.extra_stats
    bound = getattr(info, "mip_dual_bound", None)
    found = getattr(info, "objective_function_value", None)
    if bound is None or found is None or not math.isfinite(found - bound):
        return None
    return max(0.0, float(found - bound)) / SCALE
