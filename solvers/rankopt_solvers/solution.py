"""The solution and its certificate.

A solver hands over a choice and nothing else is believed: cost and loss are recounted from the
tables, and the bound comes from the Lagrangian function (sum) or from the next attainable level
(max). ``status`` is ``optimal`` only when that bound, or a proof by cases, reaches the loss.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rankopt_solvers.hull import lower_bound
from rankopt_solvers.maxmin import smallest_level
from rankopt_solvers.problem import Problem

Status = Literal["optimal", "feasible", "time_limit"]


class SolutionError(ValueError):
    """A solution does not hold what it claims; the message says which claim."""


class NoChoiceFoundError(ValueError):
    """No choice within all budgets was found, nor a proof that there is none."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A node of a proof by cases.

    Attributes:
        multiplier: for a leaf, the lam at which its Lagrangian function is evaluated.
        group: for a split, the group whose options are divided; -1 for a leaf.
        cost: the cases are: the group's option costs less than this, or at least this.
        below: index of the first case in ``Proof.cases``.
        above: index of the second.
    """

    multiplier: float
    group: int = -1
    cost: int = 0
    below: int = -1
    above: int = -1


@dataclasses.dataclass(frozen=True)
class Proof:
    """Why no choice loses less than a bound, when one multiplier cannot show it.

    Options whose reduced loss at ``multiplier`` is too large are out. For the rest the first case
    is everything; a split divides its case in two, where groups with identical options are taken
    to be sorted by cost, and each leaf holds by its own multiplier and, if that falls short, by
    enumerating the few choices that it does not exclude.

    Attributes:
        multiplier: lam for the whole problem.
        cases: a tree; children come after their parents.
        budget: of which it speaks, with prices for the others: 0 is the problem's own, i the i-th
            of its side budgets. None is all of them: without cases, the choices that the
            solution's multipliers do not exclude are few, and are enumerated.
    """

    multiplier: float
    cases: tuple[Case, ...]
    budget: int | None = 0


@dataclasses.dataclass(frozen=True)
class Solution:
    """One option of every group, with what it costs, loses, and how good it provably is.

    Attributes:
        choice: option index of each group, in the order of ``problem.groups``.
        cost: total cost, at most the budget.
        loss: sum or maximum of the chosen losses.
        bound: no choice within the budget has a smaller loss than this.
        multiplier: for the sum, the lam of the linear relaxation: the loss that one more unit of
            budget would save. 0 for the max objective.
        status: ``optimal`` (loss equals bound), ``feasible``, or ``time_limit``.
        solver: name of the solver.
        stats: what the solver wishes to say about its work.
        side_multipliers: the same as multiplier, for each side budget.
        proof: by cases, if the multiplier alone does not prove the bound.
    """

    choice: tuple[int, ...]
    cost: int
    loss: float
    bound: float
    multiplier: float
    status: Status
    solver: str
    stats: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    side_multipliers: tuple[float, ...] = ()
    proof: Proof | None = None

    @property
    def gap(self) -> float:
        """Relative distance to the bound, (loss - bound) / loss: 0 means proven optimal."""
        return (self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


def bound_of(problem: Problem) -> tuple[float, float]:
    """A lower bound on the objective and the multiplier that proves it (0 for the max).

    Side budgets are left out: without them a choice can only lose less.
    """
    if problem.objective == "max":
        return smallest_level(problem), 0.0
    relaxation = problem.relaxation
    return lower_bound(problem.table, relaxation), relaxation.multiplier


def checked_choice(problem: Problem, choice: Sequence[int], solver: str) -> tuple[int, ...]:
    """The choice as a tuple, if it names one existing option of every group.

    Raises:
        SolutionError: wrong length, no index, or one out of range (a negative one included).
    """
    try:
        indices = tuple(int(j) for j in choice)
        whole = all(i == j for i, j in zip(indices, choice, strict=True))
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise SolutionError(f"{solver}: the choice {choice!r:.60} is no list of option indices")
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
    bound: tuple[float, float] | None = None,
    side_multipliers: tuple[float, ...] = (),
    proof: Proof | None = None,
) -> Solution:
    """Turn a choice into a Solution: recount, bound, and refuse what is not a valid choice.

    Args:
        problem: the problem that was solved.
        choice: one option index for each group.
        solver: the name to report.
        timed_out: report ``time_limit`` unless the bound proves the choice optimal anyway.
        stats: passed on.
        bound: a bound and its multiplier, from a solver that has them; else they are computed.
        side_multipliers: that prove the bound together with its multiplier.
        proof: of the bound.

    Raises:
        SolutionError: wrong length, an index out of range, a cost over a budget, or a loss or
            bound that is not a number.
    """
    indices = checked_choice(problem, choice, solver)
    cost, loss = problem.cost_of(indices), problem.loss_of(indices)
    if cost > problem.budget:
        raise SolutionError(
            f"{solver}: the choice costs {cost:,}, the budget is {problem.budget:,}"
        )
    for side in problem.side_budgets:
        if side.cost_of(indices) > side.limit:
            raise SolutionError(
                f"{solver}: the choice costs {side.cost_of(indices):,} of {side.name!r}, "
                f"the limit is {side.limit:,}"
            )
    if not math.isfinite(loss):
        raise SolutionError(f"{solver}: the choice loses {loss}")
    least, lam = bound_of(problem) if bound is None else bound
    if math.isnan(least):
        raise SolutionError(f"{solver}: the bound is {least}")
    status: Status = "time_limit" if timed_out else "feasible"
    if loss <= least:
        status, least = "optimal", loss
    return Solution(
        indices,
        cost,
        loss,
        least,
        lam,
        status,
        solver,
        dict(stats or {}),
        side_multipliers or (0.0,) * len(problem.side_budgets),
        proof,
    )


@np.errstate(over="ignore")
def margins(problem: Problem, solution: Solution) -> tuple[float, ...]:
    """How sure each group's option is: what its next-best option would lose more.

    At the price of the budget, ``loss + lam * cost``: near 0 (or below it, where the budget's last
    parameters were spent) another option would do as well; a large margin means that any other
    choice of this group makes the solution worse by about that much. Infinite for a group without
    another option. Without a multiplier (the max objective) it is the plain difference of losses.

    Args:
        problem: that was solved.
        solution: of it.

    Returns:
        One number for each group, in the unit of the losses.
    """
    found = []
    for g, (group, j) in enumerate(zip(problem.groups, solution.choice, strict=True)):
        more = (group.loss - group.loss[j]) + solution.multiplier * (group.cost - group.cost[j])
        for side, lam in zip(problem.side_budgets, solution.side_multipliers, strict=True):
            more = more + lam * (side.costs[g] - side.costs[g][j])
        others = np.delete(more, j)
        found.append(float(others.min()) if others.size else math.inf)
    return tuple(found)
