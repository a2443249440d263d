"""Lower convex hulls and the Lagrangian bound.

For a multiplier lam >= 0 the Lagrangian function

    L(lam) = sum_g min_j (loss_gj + lam * cost_gj) - lam * budget

is a lower bound on the sum objective, whatever lam is; its maximum over lam is the optimum of the
linear relaxation, reached at the slope of the hull edge at which the budget runs out (Sinha &
Zoltners 1979; Dyer 1984). The bound returned here is evaluated from the option tables at that
slope, so a wrong slope could only make it weaker, never wrong.

The low-rank options of a layer are convex in their cost, but "keep it dense" adds a jump at the
end: the hull replaces the last low-rank options by one long edge to dense.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rankopt_solvers.problem import Problem

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Hull:
    """Vertices of a lower convex hull, cheapest first.

    Attributes:
        vertices: option indices, shape ``(H,)``.
        slopes: loss saved per unit of cost along each edge, shape ``(H-1,)``, not increasing.
    """

    vertices: IntArray
    slopes: FloatArray


def pareto(cost: IntArray, loss: FloatArray) -> IntArray:
    """Indices of options that no other option beats: cost strictly up, loss strictly down."""
    order = np.lexsort((loss, cost))
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], loss[order][:-1])))
    return np.asarray(order[loss[order] < best_before], dtype=np.int64)


def lower_hull(cost: IntArray, loss: FloatArray, undominated: IntArray) -> Hull:
    """Monotone chain over the undominated options; shapes ``(K,)``, ``(K,)``, ``(P,)``."""
    costs, losses = cost[undominated].tolist(), loss[undominated].tolist()
    kept: list[int] = []
    slopes: list[float] = []
    for k, (c, v) in enumerate(zip(costs, losses, strict=True)):
        slope = math.inf
        while kept:
            slope = (losses[kept[-1]] - v) / (c - costs[kept[-1]])
            if slopes and slope >= slopes[-1]:
                kept.pop()
                slopes.pop()
            else:
                slopes.append(slope)
                break
        kept.append(k)
    return Hull(undominated[kept], np.array(slopes, dtype=np.float64))


@dataclasses.dataclass(frozen=True, eq=False)
class HullEdges:
    """All hull edges of a problem, best loss per cost first; ties in order of the groups.

    Attributes:
        group: index of the group, shape ``(E,)``.
        target: option index at the far end of the edge, shape ``(E,)``.
        cost: cost of taking the edge, shape ``(E,)``.
        slope: loss saved per unit of cost, shape ``(E,)``.
    """

    group: IntArray
    target: IntArray
    cost: IntArray
    slope: FloatArray


def hull_edges(problem: "Problem") -> HullEdges:
    """Sort the hull edges of all groups by slope; inside a group their order is kept."""
    hulls = [group.hull for group in problem.groups]
    group = np.repeat(np.arange(len(hulls)), [h.slopes.size for h in hulls])
    target = np.concatenate([h.vertices[1:] for h in hulls])
    cost = np.concatenate(
        [np.diff(g.cost[h.vertices]) for g, h in zip(problem.groups, hulls, strict=True)]
    )
    slope = np.concatenate([h.slopes for h in hulls])
    order = np.argsort(-slope, kind="stable")
    return HullEdges(group[order], target[order], cost[order], slope[order])


def tightened_budget(problem: "Problem") -> int:
    """The largest total cost <= budget that the common divisor of the costs allows.

    Every choice costs the cheapest choice plus a multiple of the divisor, so nothing is lost, and
    the bound no longer counts parameters that cannot be spent.
    """
    divisor, base = 0, 0
    for group in problem.groups:
        cheapest = int(group.cost[group.pareto[0]])
        base += cheapest
        divisor = math.gcd(divisor, int(np.gcd.reduce(group.cost[group.pareto] - cheapest)))
    if divisor == 0:
        return base
    return base + (problem.budget - base) // divisor * divisor


def multiplier(problem: "Problem", edges: HullEdges) -> float:
    """The slope of the edge at which the budget runs out: the best lam; 0 when all edges fit."""
    base = sum(int(group.cost[group.hull.vertices[0]]) for group in problem.groups)
    over = np.flatnonzero(base + np.cumsum(edges.cost) > tightened_budget(problem))
    return float(edges.slope[over[0]]) if over.size else 0.0


def lagrangian_bound(problem: "Problem", lam: float) -> float:
    """L(lam) for the sum objective, rounded down: no choice within the budget loses less.

    Args:
        problem: its objective is taken as the sum.
        lam: loss per unit of cost, >= 0.
    """
    least = [float((group.loss + lam * group.cost).min()) for group in problem.groups]
    if lam == 0.0:
        return math.fsum(least)
    spent = lam * tightened_budget(problem)
    # Each term carries up to two roundings and the last difference one more.
    rounding = 4 * np.finfo(float).eps * (math.fsum(least) + spent)
    floor = math.fsum(float(group.loss.min()) for group in problem.groups)
    return max(math.fsum(least) - spent - float(rounding), floor)
