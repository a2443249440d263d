"""Greedy over the convex hull, then fill.

Walk the hull edges in order of loss saved per unit of cost and take each one that still fits: up to
the first that does not, this is the optimum of the linear relaxation (Sinha & Zoltners 1979).
Walking the hull instead of the options is what makes the jump to "dense" visible: the
long edge competes with its average slope. The rest of the budget is then spent on single options,
those off the hull included, best saving per cost first.
"""

import numpy as np

from rankopt_solvers.hull import HullEdges, hull_edges
from rankopt_solvers.problem import Group, Problem
from rankopt_solvers.solution import Solution, certify


def _best_step(group: Group, current: int, left: int) -> tuple[float, int]:
    """Largest loss saved per cost among the options that cost at most ``left`` more."""
    extra = group.cost[group.pareto] - group.cost[current]
    saved = group.loss[current] - group.loss[group.pareto]
    fits = np.flatnonzero((extra > 0) & (extra <= left) & (saved > 0))
    if not fits.size:
        return 0.0, current
    density = saved[fits] / extra[fits]
    best = int(np.argmax(density))
    return float(density[best]), int(group.pareto[fits[best]])


def fill(problem: Problem, choice: list[int]) -> None:
    """Spend what the choice leaves of the budget, in place, one best step at a time."""
    left = problem.budget - problem.cost_of(choice)
    steps = [_best_step(g, j, left) for g, j in zip(problem.groups, choice, strict=True)]
    while True:
        g = max(range(len(steps)), key=lambda k: steps[k][0])
        density, option = steps[g]
        if density <= 0.0:
            return
        group = problem.groups[g]
        left -= int(group.cost[option] - group.cost[choice[g]])
        choice[g] = option
        for k, other in enumerate(problem.groups):
            stale = k == g or other.cost[steps[k][1]] - other.cost[choice[k]] > left
            if stale:
                steps[k] = _best_step(other, choice[k], left)


def _walk(problem: Problem, edges: HullEdges, choice: list[int]) -> int:
    """Take hull edges beyond the choice, in place, while they fit; then fill.

    Returns:
        The position of the first edge that did not fit, or -1.
    """
    left = problem.budget - problem.cost_of(choice)
    first = -1
    ends = zip(edges.group.tolist(), edges.target.tolist(), strict=True)
    for position, (g, target) in enumerate(ends):
        cost = problem.groups[g].cost
        extra = int(cost[target] - cost[choice[g]])
        if extra > left:
            # Later edges of this group end further away still: they cannot fit either.
            first = position if first < 0 else first
        elif extra > 0:
            choice[g], left = target, left - extra
    fill(problem, choice)
    return first


def solve_greedy(problem: Problem) -> Solution:
    """Solve a sum problem greedily; the gap in the solution says how far off it can be.

    Two walks are compared: one passes over the first edge that does not fit, one takes that edge
    before all others. With a long edge to dense at the break, either can be the better one.

    Raises:
        InfeasibleError: even the cheapest choice is over the budget.
    """
    problem.require_feasible()
    edges = hull_edges(problem)
    cheapest = [int(group.hull.vertices[0]) for group in problem.groups]
    choice = list(cheapest)
    broken = _walk(problem, edges, choice)
    if broken >= 0:
        other = list(cheapest)
        other[int(edges.group[broken])] = int(edges.target[broken])
        if problem.cost_of(other) <= problem.budget:
            _walk(problem, edges, other)
            choice = min(choice, other, key=problem.loss_of)
    return certify(problem, choice, "greedy")
