"""One budget kept, the others priced: a bound by the exact solver, and a choice.

With prices ``p_i >= 0`` of all budgets but one, k,

    min { sum_g (loss_g + sum_i p_i d_ig) : sum_g d_kg <= room_k } - sum_i p_i room_i

is a lower bound on the loss of every choice within all budgets, and at the prices of the linear
relaxation never below it (Geoffrion 1974): the problem of one budget has no integrality gap here,
as ``exact`` solves it. Where only k binds the other prices are 0, and a choice that keeps the other
budgets is the optimum.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from rankopt_solvers.exact.branch_and_bound import solve_exact
from rankopt_solvers.knapsack.budgets import Budgets, Priced
from rankopt_solvers.problem import Problem, alone
from rankopt_solvers.solution import Case, Proof
from rankopt_solvers.table import EPS


@dataclasses.dataclass(frozen=True, eq=False)
class Single:
    """What one budget and the prices of the others prove.

    Attributes:
        bound: on the loss of every choice within all budgets.
        multipliers: of the problem's budgets, its own first.
        proof: of the bound, beside these.
        choice: of the problem with the one budget; it may be over the others.
    """

    bound: float
    multipliers: tuple[float, ...]
    proof: Proof
    choice: tuple[int, ...]


def keep_one(problem: Problem, budgets: Budgets, at: Priced, row: int, time_limit: float) -> Single:
    """Solve the problem with one of the budgets that count and prices for the others.

    Args:
        problem: under several budgets.
        budgets: those that count.
        at: prices.
        row: the one to keep, of ``budgets``.
        time_limit: seconds, for ``exact``.
    """
    own = budgets.which[row]
    one = alone(problem, own)
    lams = [0.0] * (1 + len(problem.side_budgets))
    losses, spent = [group.loss for group in problem.groups], []
    for i, which in enumerate(budgets.which):
        lams[which] = float(at.price[i]) / budgets.unit[i] if i != row else 0.0
        if lams[which]:
            costs = [group.cost for group in alone(problem, which).groups]
            losses = [
                loss + lams[which] * (cost - cost.min())
                for loss, cost in zip(losses, costs, strict=True)
            ]
            spent.append(lams[which] * budgets.unit[i] * int(budgets.room[i]))
    groups = tuple(
        dataclasses.replace(group, loss=loss)
        for group, loss in zip(one.groups, losses, strict=True)
    )
    found = solve_exact(dataclasses.replace(one, groups=groups), time_limit=time_limit)
    lams[own] = found.multiplier
    # Sums of losses are exact; of those that are priced, every term is rounded.
    paid = math.fsum(spent)
    rounding = 4 * (len(lams) + 3) * EPS * (found.bound + paid) if spent else 0.0
    proof = found.proof or Proof(found.multiplier, (Case(found.multiplier),))
    return Single(
        found.bound - paid - rounding,
        tuple(lams),
        dataclasses.replace(proof, budget=own),
        found.choice,
    )


def singles(
    problem: Problem,
    budgets: Budgets,
    at: Priced,
    remaining: Callable[[], float],
    stopped: Callable[[], bool],
) -> list[Single]:
    """Each budget that counts kept once, the dearest first; as far as time allows."""
    dear = at.price * np.maximum(budgets.room, 1)
    found = []
    for row in np.argsort(-dear, kind="stable").tolist():
        if stopped():
            break
        found.append(keep_one(problem, budgets, at, row, remaining()))
    return found
