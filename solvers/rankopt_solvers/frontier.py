"""The whole curve "budget -> least loss", from one sweep over the hull edges.

Taking the hull edges of all groups in order of loss saved per cost passes through every optimum of
the linear relaxation, for every budget at once (Sinha & Zoltners 1979). Between two of these points
the relaxation is a straight line: the bound. The point on its left is a choice: the value. The
choices along the curve are *nested*: a larger budget never takes anything away from a group. The
optima are not; ``solve`` gives those.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from rankopt_solvers.problem import Problem, refuse_side_budgets
from rankopt_solvers.table import EPS, FloatArray, IntArray

if TYPE_CHECKING:
    from rankopt_solvers.solution import Solution


@dataclasses.dataclass(frozen=True, eq=False)
class Frontier:
    """The curve; its budgets go from the cheapest choice to the one that loses least.

    Attributes:
        problem: whose budget plays no part here.
        cost: of the choice at each point, increasing, shape ``(E+1,)``.
        loss: of the same choices, decreasing, shape ``(E+1,)``.
        slope: loss saved per cost from each point to the next, shape ``(E,)``: the multiplier.
        group: of the edge from each point to the next, shape ``(E,)``.
    """

    problem: Problem
    cost: IntArray
    loss: FloatArray
    slope: FloatArray
    group: IntArray

    def _point(self, budget: int) -> int:
        point = int(np.searchsorted(self.cost, budget, side="right")) - 1
        if point < 0:
            self.problem.with_budget(budget).require_feasible()
        return point

    def _position(self, point: int) -> IntArray:
        hulls = self.problem.hulls
        taken = np.bincount(self.group[:point], minlength=self.problem.table.rows)
        vertex: IntArray = hulls.vertex[hulls.start[:-1] + taken]
        return vertex

    def _value(self, point: int) -> float:
        # The running sums of `loss` are rounded at every step, this one once.
        return math.fsum(self.problem.table.loss[self._position(point)].tolist())

    def value(self, budget: int) -> float:
        """Loss of the nested choice within the budget.

        Raises:
            InfeasibleError: even the cheapest choice is over the budget.
        """
        return self._value(self._point(budget))

    def bound(self, budget: int) -> float:
        """No choice within the budget loses less than this: the linear relaxation, rounded down.

        Raises:
            InfeasibleError: even the cheapest choice is over the budget.
        """
        table, point = self.problem.table, self._point(budget)
        at, saved = self._value(point), 0.0
        usable = table.tightened(budget)
        if point < self.slope.size:
            saved = float(self.slope[point]) * (usable - int(self.cost[point]))
        # Slopes are rounded: by that an edge may be out of its place. The smallest are rounded to
        # multiples of the smallest number, or to zero, which leaves their edges out.
        rounding = 16 * EPS * table.rows * (at + saved)
        rounding += math.ulp(0.0) * (usable - int(self.cost[0]))
        return max(at - saved - rounding, math.fsum(table.loss[table.start[1:] - 1].tolist()))

    def choice(self, budget: int) -> tuple[int, ...]:
        """The nested choice: a larger budget never gives a group a cheaper option.

        Raises:
            InfeasibleError: even the cheapest choice is over the budget.
        """
        return self.problem.table.options_at(self._position(self._point(budget)))

    def nested(self, budget: int) -> "Solution":
        """The nested choice with its certificate.

        Raises:
            InfeasibleError: even the cheapest choice is over the budget.
        """
        from rankopt_solvers.solution import certify

        return certify(self.problem.with_budget(budget), self.choice(budget), "frontier")

    def solve(self, budget: int, solver: str = "exact", **options: Any) -> "Solution":
        """Solve for another budget; the tables and hulls are not prepared again.

        Raises:
            InfeasibleError: even the cheapest choice is over the budget.
        """
        from rankopt_solvers.registry import solve

        return solve(self.problem.with_budget(budget), solver, **options)


def frontier(problem: Problem) -> Frontier:
    """Sweep over all budgets of a sum problem.

    Args:
        problem: its own budget plays no part.

    Raises:
        ProblemError: side budgets, or the max objective.
    """
    refuse_side_budgets(problem, "frontier", sum_only=True)
    table, hulls = problem.table, problem.hulls
    edges = np.flatnonzero(hulls.slope > 0)
    order = edges[np.argsort(-hulls.slope[edges], kind="stable")]
    group = np.searchsorted(hulls.start, order, side="right") - 1
    start, end = hulls.vertex[order], hulls.vertex[order + 1]
    first = hulls.vertex[hulls.start[:-1]]
    cost = int(table.cost[first].sum()) + np.cumsum(table.cost[end] - table.cost[start])
    # Summed from the far end, so that small losses are not differences of large ones.
    last = hulls.vertex[hulls.start[1:] - 1]
    saved = (table.loss[start] - table.loss[end])[::-1]
    loss = np.cumsum(np.concatenate(([math.fsum(table.loss[last].tolist())], saved)))[::-1]
    return Frontier(
        problem,
        np.concatenate(([int(table.cost[first].sum())], cost)),
        loss,
        hulls.slope[order],
        group,
    )
