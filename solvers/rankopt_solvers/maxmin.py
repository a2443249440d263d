"""Max-min fairness: the smallest attainable maximum of the losses, by bisection.

The cost of "every group loses at most t" only changes where t passes a loss that some option has,
so the search runs over the sorted attainable losses and ends with a proof: the level found fits
the budget, the next smaller attainable one does not. With loss = share of a layer that is *not*
retained this is max-min retained Fisher information; it gives the same choice as one retained
share for all layers, bisected to the budget.
"""

import dataclasses

import numpy as np

from rankopt_solvers.problem import Group, IntArray, Problem


def cheapest_within(group: Group, level: float) -> int:
    """Index of the cheapest option that loses at most level, or -1 if there is none."""
    options = group.pareto
    # Along the undominated options the loss strictly falls, so its negative is sorted.
    position = int(np.searchsorted(-group.loss[options], -level, side="left"))
    return int(options[position]) if position < options.size else -1


def choice_within(problem: Problem, level: float) -> tuple[int, ...] | None:
    """The cheapest choice in which every group loses at most level; None if over the budget."""
    choice = tuple(cheapest_within(group, level) for group in problem.groups)
    if -1 in choice or problem.cost_of(choice) > problem.budget:
        return None
    return choice


def smallest_level(problem: Problem) -> float:
    """The optimum of the max objective, exactly.

    Raises:
        InfeasibleError: even the cheapest choice is over the budget.
    """
    problem.require_feasible()
    levels = np.unique(np.concatenate([group.loss[group.pareto] for group in problem.groups]))
    low, high = -1, levels.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if choice_within(problem, float(levels[middle])) is None:
            low = middle
        else:
            high = middle
    return float(levels[high])


def restricted(problem: Problem, level: float) -> tuple[Problem, list[IntArray]]:
    """The sum problem whose options all lose at most level, and its options' original indices.

    This is the second stage: among all choices with the best maximum, the one with the best sum.
    """
    keep = [np.flatnonzero(group.loss <= level) for group in problem.groups]
    groups = tuple(
        Group(group.name, group.cost[kept], group.loss[kept])
        for group, kept in zip(problem.groups, keep, strict=True)
    )
    return dataclasses.replace(problem, groups=groups, objective="sum"), keep
