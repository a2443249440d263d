"""Allocation strategies that go layer by layer: the thesis' first two, and uniform.

Each returns one option for every layer, within the budget. All three first say how many parameters
a layer *should* get, take the largest option below, and hand out what rounding left over, one
option at a time, to the layers that have least of what they should get.

``uniform``       the same share of its parameters for every layer: the FWSVD baseline (Hsu et al.,
                  ICLR 2022).
``proportional``  rank in proportion to the layer's share of the total Fisher information (Hofstee,
                  Twente 2024, method 1), between the smallest option and dense. Fisher information
                  of a layer is the trace of its Fisher matrix's diagonal, sum_ij F_ij. The factor
                  of proportion is bisected to the budget.
``threshold``     the smallest rank that retains a given share of the layer's own Fisher information
                  (Hofstee, method 2); without a share, the largest share that the budget allows.

The thesis' text was not available, only its abstract: the formulas are our reading of it.
"""

from collections.abc import Callable

import numpy as np

from rankopt.errors import BudgetError
from rankopt.layers import FloatArray
from rankopt.plan.allocation import Allocation
from rankopt.profile.profile import Profile
from rankopt_solvers import Group, Problem
from rankopt_solvers.maxmin import choice_within, smallest_level


def _largest_within(group: Group, target: float) -> int:
    """Largest option that costs at most target; the cheapest if none does."""
    return max(int(np.searchsorted(group.cost, target, side="right")) - 1, 0)


def _hand_out(problem: Problem, choice: list[int], targets: FloatArray) -> None:
    """Spend what is left on next options, in place: the layer that lags most comes first.

    A layer that has reached its target gets nothing more: what is left over is less than the next
    option of any layer that has not, and must not pile up in the small layers.
    """
    left = problem.budget - problem.cost_of(choice)
    while True:
        best, best_lag = -1, -np.inf
        for g, group in enumerate(problem.groups):
            if choice[g] + 1 == group.cost.size:
                continue
            step = int(group.cost[choice[g] + 1] - group.cost[choice[g]])
            lag = float(targets[g] - group.cost[choice[g]]) / step
            if step <= left and lag * step > 0.5 and lag > best_lag:
                best, best_lag = g, lag
        if best < 0:
            return
        group = problem.groups[best]
        left -= int(group.cost[choice[best] + 1] - group.cost[choice[best]])
        choice[best] += 1


def _to_targets(
    problem: Problem,
    weights: FloatArray,
    spent: Callable[[FloatArray], FloatArray] = lambda weighted: weighted,
) -> list[int]:
    """Options for costs ``spent(factor * weights)``, clipped to what is offered; it is bisected."""
    problem.require_feasible()
    low_costs = np.array([group.cost[0] for group in problem.groups], dtype=np.float64)
    dense_costs = np.array([group.cost[-1] for group in problem.groups], dtype=np.float64)

    if dense_costs.sum() <= problem.budget:
        return [group.cost.size - 1 for group in problem.groups]

    def targets(factor: float) -> FloatArray:
        return np.clip(spent(factor * weights), low_costs, dense_costs)

    # Layers without any weight come last: they share what is left when the others are dense.
    positive = weights > 0
    if not positive.any():
        weights = dense_costs
    else:
        weights = np.where(positive, weights, 1e-6 * weights[positive].min())
    low, high = 0.0, 2 * float((dense_costs / weights).max())
    for _ in range(200):
        middle = 0.5 * (low + high)
        if targets(middle).sum() <= problem.budget:
            low = middle
        else:
            high = middle
    wanted = targets(low)
    # Half a parameter of slack, so that a target which equals an option is not rounded below it.
    choice = [_largest_within(g, t + 0.5) for g, t in zip(problem.groups, wanted, strict=True)]
    while problem.cost_of(choice) > problem.budget:
        over = [
            (float(g.cost[j]) - float(t), k)
            for k, (g, j, t) in enumerate(zip(problem.groups, choice, wanted, strict=True))
            if j > 0
        ]
        choice[max(over)[1]] -= 1
    _hand_out(problem, choice, wanted)
    return choice


def uniform(profile: Profile, offered: Allocation, budget: int) -> list[int]:
    """The same share of its parameters for every layer."""
    dense = np.array([layer.dense_cost for layer in offered.layers], dtype=np.float64)
    return _to_targets(offered.problem(budget), dense)


def proportional(profile: Profile, offered: Allocation, budget: int) -> list[int]:
    """Rank in proportion to the layer's share of the total Fisher information."""
    trace = [profile.fisher_trace(layer.name) for layer in offered.layers]
    members = np.array([float(len(layer.members)) for layer in offered.layers])
    sides = np.array([float(layer.out_features + layer.in_features) for layer in offered.layers])
    full = np.array([float(min(x.out_features, x.in_features)) for x in offered.layers])

    def spent(pairs: FloatArray) -> FloatArray:
        if offered.form == "pairs":
            return pairs
        ranks = np.minimum(pairs / (members * sides), full)
        kept: FloatArray = members * ranks * (sides - ranks)
        return kept

    return _to_targets(offered.problem(budget), np.array(trace) * (members * sides), spent)


def share_level(offered: Allocation, share: float) -> list[int]:
    """The cheapest option of each layer that retains the share of its own Fisher information.

    Raises:
        BudgetError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise BudgetError(f"share must be above 0 and at most 1, got {share!r}")
    return [int(np.flatnonzero(lost <= 1.0 - share)[0]) for lost in offered.free_shares]


def threshold(profile: Profile, offered: Allocation, budget: int) -> list[int]:
    """The largest common retained share that the budget allows, then further options that fit."""
    problem = offered.fairness_problem(budget)
    choice = choice_within(problem, smallest_level(problem))
    assert choice is not None
    picked = list(choice)
    _spend_on_worst(problem, picked)
    return picked


def _spend_on_worst(problem: Problem, choice: list[int]) -> None:
    """Give next options to the layers that lose the largest share, while they fit, in place."""
    left = problem.budget - problem.cost_of(choice)
    open_groups = {g for g, group in enumerate(problem.groups) if choice[g] + 1 < group.cost.size}
    while open_groups:
        worst = max(open_groups, key=lambda g: (problem.groups[g].loss[choice[g]], -g))
        group = problem.groups[worst]
        step = int(group.cost[choice[worst] + 1] - group.cost[choice[worst]])
        if step > left:
            open_groups.discard(worst)
            continue
        choice[worst] += 1
        left -= step
        if choice[worst] + 1 == group.cost.size:
            open_groups.discard(worst)
