"""The solution and its certificate.

A solver hands over a choice and nothing else is believed: cost and loss are recounted from the
tables, and the bound comes from the Lagrangian function (sum) or from the next attainable level
(max). ``status`` is ``optimal`` only when that bound is reached.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rankopt_solvers.hull import hull_edges, lagrangian_bound, multiplier
from rankopt_solvers.maxmin import smallest_level
from rankopt_solvers.problem import Problem

Status = Literal["optimal", "feasible", "time_limit"]


class SolutionError(ValueError):
    """A solution does not hold what it claims; the message says which claim."""


@dataclasses.dataclass(frozen=True)
class Solution:
    """One option of every group, with what it costs, loses, and how good it provably is.

    Attributes:
        choice: option index of each group, in the order of ``problem.groups``.
        cost: total cost, at most the budget.
        loss: sum or maximum of the chosen losses.
        bound: no choice within the budget has a smaller loss than this.
        multiplier: for the sum, the lam that proves the bound: the loss that one more unit of
            budget would save. 0 for the max objective.
        status: ``optimal`` (loss equals bound), ``feasible``, or ``time_limit``.
        solver: name of the solver.
        stats: what the solver wishes to say about its work.
    """

    choice: tuple[int, ...]
    cost: int
    loss: float
    bound: float
    multiplier: float
    status: Status
    solver: str
    stats: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def gap(self) -> float:
        """Relative distance to the bound, (loss - bound) / loss: 0 means proven optimal."""
        return (self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


def bound_of(problem: Problem) -> tuple[float, float]:
    """A lower bound on the objective and the multiplier that proves it (0 for the max)."""
    if problem.objective == "max":
        return smallest_level(problem), 0.0
    lam = multiplier(problem, hull_edges(problem))
    return lagrangian_bound(problem, lam), lam


def checked_choice(problem: Problem, choice: Sequence[int], solver: str) -> tuple[int, ...]:
    """The choice as a tuple, if it names one existing option of every group.

    Raises:
        SolutionError: wrong length, or an index out of range (a negative one included).
    """
    indices = tuple(int(j) for j in choice)
    if len(indices) != len(problem.groups):
        raise SolutionError(f"{solver}: {len(indices)} choices for {len(problem.groups)} groups")
    for group, j in zip(problem.groups, indices, strict=True):
        if not 0 <= j < group.cost.size:
            raise SolutionError(f"{solver}: group {group.name!r} has no option {j}")
    return indices


def certify(
    problem: Problem,
    choice: Sequence[int],
    solver: str,
    *,
    timed_out: bool = False,
    stats: Mapping[str, Any] | None = None,
) -> Solution:
    """Turn a choice into a Solution: recount, bound, and refuse what is not a valid choice.

    Args:
        problem: the problem that was solved.
        choice: one option index for each group.
        solver: the name to report.
        timed_out: report ``time_limit`` unless the bound proves the choice optimal anyway.
        stats: passed on.

    Raises:
        SolutionError: wrong length, an index out of range, or a cost over the budget.
    """
    indices = checked_choice(problem, choice, solver)
    cost, loss = problem.cost_of(indices), problem.loss_of(indices)
    if cost > problem.budget:
        raise SolutionError(
            f"{solver}: the choice costs {cost:,}, the budget is {problem.budget:,}"
        )
    bound, lam = bound_of(problem)
    status: Status = "time_limit" if timed_out else "feasible"
    if loss <= bound:
        status, bound = "optimal", loss
    return Solution(indices, cost, loss, bound, lam, status, solver, dict(stats or {}))


def verify(problem: Problem, solution: Solution) -> None:
    """Check a solution's claims without any of the solvers' code.

    The cost is added in Python integers and the loss from the tables. The bound of a sum must be
    proven by the Lagrangian function at the solution's own multiplier or at zero, for the part of
    the budget that the common divisor of the costs lets a choice spend; the bound of a max must be
    a level below which no choice fits the budget.

    Raises:
        SolutionError: naming the first claim that does not hold.
    """
    indices = checked_choice(problem, solution.choice, solution.solver)
    options = list(zip(problem.groups, indices, strict=True))
    cost = sum(int(group.cost[j]) for group, j in options)
    losses = [float(group.loss[j]) for group, j in options]
    loss = math.fsum(losses) if problem.objective == "sum" else max(losses)
    if cost != solution.cost or cost > problem.budget:
        raise SolutionError(f"cost is {cost:,}; claimed {solution.cost:,} of {problem.budget:,}")
    if not math.isclose(loss, solution.loss, rel_tol=1e-12):
        raise SolutionError(f"loss is {loss!r}; claimed {solution.loss!r}")
    if not solution.bound <= solution.loss:
        raise SolutionError(f"bound {solution.bound!r} lies above the loss {solution.loss!r}")
    if solution.status == "optimal" and solution.gap != 0.0:
        raise SolutionError(f"claimed optimal with a gap of {solution.gap:.3g}")
    proven = (
        _proven_max(problem, solution)
        if problem.objective == "max"
        else _proven_sum(problem, solution.multiplier)
    )
    if solution.bound > proven + 1e-12 * max(proven, solution.loss):
        raise SolutionError(f"bound {solution.bound!r} is not proven: only {proven!r} is")


def _proven_sum(problem: Problem, lam: float) -> float:
    if not (math.isfinite(lam) and lam >= 0):
        raise SolutionError(f"the multiplier must be a finite number >= 0, got {lam!r}")
    # Dominated options are never needed, so only the others say what a choice can cost.
    step, start = 0, 0
    for group in problem.groups:
        best, useful = math.inf, []
        for cost, loss in sorted(zip(group.cost.tolist(), group.loss.tolist(), strict=True)):
            if loss < best:
                best = loss
                useful.append(cost)
        start += useful[0]
        step = math.gcd(step, *(cost - useful[0] for cost in useful))
    usable = start + (problem.budget - start) // step * step if step else start
    least = [float((group.loss + lam * group.cost).min()) for group in problem.groups]
    unpriced = [float(group.loss.min()) for group in problem.groups]
    return max(math.fsum(unpriced), math.fsum([*least, -lam * usable]))


def _proven_max(problem: Problem, solution: Solution) -> float:
    spent = 0
    for group in problem.groups:
        below = group.cost[group.loss < solution.bound]
        if not below.size:
            return solution.bound
        spent += int(below.min())
    return solution.bound if spent > problem.budget else 0.0
