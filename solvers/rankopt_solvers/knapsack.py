"""The knapsack as an integer program, through cvxpy and HiGHS.

One binary per option. Three things make the program trustworthy where the plain one is not:

* *Reduced-cost fixing.* With the greedy loss U, the Lagrangian bound D and its multiplier lam, an
  option whose reduced loss ``loss + lam*cost - min`` exceeds U - D cannot be in a better choice and
  is left out (Dembo & Hammer 1980).
* *Scale.* HiGHS stops at absolute tolerances (1e-7 and larger), so losses of 1e-9 would all look
  alike. The objective here is the reduced loss plus lam times the budget left over, scaled so that
  U - D becomes SCALE: the same optimum, and tolerances that mean a tiny part of the gap that is
  left. Costs enter as multiples of their common divisor.
* *Recount.* The answer is read as one option for each group and counted again in integers; if it is
  missing, over budget or worse than greedy, the greedy choice is returned and ``stats`` says so.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from rankopt_solvers.greedy import solve_greedy
from rankopt_solvers.hull import IntArray, tightened_budget
from rankopt_solvers.problem import Problem
from rankopt_solvers.solution import Solution, certify

#: What the gap between greedy and bound becomes in the scaled objective.
SCALE = 1e4


@dataclasses.dataclass(frozen=True, eq=False)
class _Core:
    """The options that reduced-cost fixing leaves; all arrays have shape ``(N,)``."""

    group: IntArray
    option: IntArray
    reduced: np.ndarray
    extra_cost: IntArray


def _core(problem: Problem, lam: float, gap: float) -> _Core:
    parts: list[tuple[IntArray, IntArray, np.ndarray, IntArray]] = []
    for index, group in enumerate(problem.groups):
        options = group.pareto
        priced = group.loss[options] + lam * group.cost[options]
        reduced = priced - priced.min()
        kept = reduced <= gap * (1 + 1e-9) + 4 * np.finfo(float).eps * priced.max()
        extra = group.cost[options] - group.cost[options[0]]
        parts.append((np.full(int(kept.sum()), index), options[kept], reduced[kept], extra[kept]))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return _Core(*columns)


def _integer_program(
    problem: Problem, core: _Core, lam: float, gap: float, time_limit: float
) -> tuple[list[int] | None, dict[str, Any]]:
    try:
        import cvxpy as cp
        import highspy  # noqa: F401  (cvxpy reports it missing only as a failed solve)
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ImportError(
            "the knapsack solver needs cvxpy and highspy: pip install 'rankopt[milp]'"
        ) from error
    columns = core.group.size
    divisor = int(np.gcd.reduce(core.extra_cost)) or 1
    base = sum(int(group.cost[group.pareto[0]]) for group in problem.groups)
    room = (tightened_budget(problem) - base) // divisor
    one_each = csr_array(
        (np.ones(columns), (core.group, np.arange(columns))),
        shape=(len(problem.groups), columns),
    )
    take = cp.Variable(columns, boolean=True)
    left = cp.Variable(nonneg=True)
    objective = (core.reduced / gap * SCALE) @ take + (lam * divisor / gap * SCALE) * left
    program = cp.Problem(
        cp.Minimize(objective),
        [one_each @ take == 1, (core.extra_cost // divisor) @ take + left == room],
    )
    stats: dict[str, Any] = {"columns": columns}
    try:
        program.solve(
            solver=cp.HIGHS, time_limit=time_limit, mip_rel_gap=0.0, mip_abs_gap=SCALE * 1e-9
        )
    except cp.SolverError as error:
        stats["highs_status"] = f"failed: {error}"
        return None, stats
    stats["highs_status"] = str(program.status)
    values = take.value
    # Without an incumbent cvxpy reports zeros; a choice takes exactly one option of each group.
    if values is None or not np.allclose(one_each @ np.round(values), 1.0):
        return None, stats
    taken = np.flatnonzero(np.round(values) == 1)
    choice = [0] * len(problem.groups)
    for column in taken.tolist():
        choice[int(core.group[column])] = int(core.option[column])
    return choice, stats


def solve_knapsack(problem: Problem, *, time_limit: float = 30.0) -> Solution:
    """Solve a sum problem as an integer program; never worse than greedy.

    Args:
        problem: a sum problem.
        time_limit: seconds for HiGHS. Its limit is not a hard one: a call may overrun it.

    Raises:
        InfeasibleError: even the cheapest choice is over the budget.
        ImportError: cvxpy or highspy is missing; names the extra ``milp``.
        ValueError: the time limit is not positive.
    """
    if not time_limit > 0 or not math.isfinite(time_limit):
        raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit!r}")
    greedy = solve_greedy(problem)
    if greedy.status == "optimal":
        return dataclasses.replace(greedy, solver="knapsack", stats={"columns": 0})
    lam, gap = greedy.multiplier, greedy.loss - greedy.bound
    core = _core(problem, lam, gap)
    choice, stats = _integer_program(problem, core, lam, gap, time_limit)
    timed_out = "limit" in stats["highs_status"]
    usable = choice is not None and problem.cost_of(choice) <= problem.budget
    better = usable and choice is not None and problem.loss_of(choice) <= greedy.loss
    stats["kept_greedy"] = not better
    final = choice if better and choice is not None else greedy.choice
    return certify(problem, final, "knapsack", timed_out=timed_out, stats=stats)
