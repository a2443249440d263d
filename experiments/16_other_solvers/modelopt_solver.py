"""rankopt's solver in the place of ModelOpt AutoQuantize's.

    import modelopt.torch.quantization as mtq
    from modelopt_solver import installed

    with installed():
        model, state = mtq.auto_quantize(model, ...)

AutoQuantize chooses one format for each layer, so that the sum of sensitivity scores is smallest
under a limit on the weights' size: a multiple-choice knapsack. It hands that to ``LPS`` (PuLP and
CBC), which is called with keywords and returns the place of each layer's format, and a status.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from rankopt_solvers import Group, InfeasibleError, Problem, SideBudget, solve

Limit = float | tuple[float | None, float | None]


class ExactSolver:
    """Has the constructor and the call of ``modelopt.torch.opt.searcher.LPS``.

    Args:
        name: of the problem.
        constraints: what is limited -> an upper limit, or a lower and an upper one.
        constraints_to_candidate_costs: what is limited -> for each layer the costs of its options.
        candidate_scores: for each layer the scores of its options.
        objective_type: ``minimize`` or ``maximize`` their sum.
        verbose: unused.

    Attributes:
        solution: with its bound, after the call.
    """

    def __init__(
        self,
        name: str,
        constraints: Mapping[str, Limit],
        constraints_to_candidate_costs: Mapping[str, Sequence[Sequence[float]]],
        candidate_scores: Sequence[Sequence[float]],
        objective_type: str = "minimize",
        verbose: bool = False,
    ) -> None:
        scores = [np.asarray(each, dtype=np.float64) for each in candidate_scores]
        sign = 1.0 if objective_type == "minimize" else -1.0
        # Losses are not negative: each layer's are counted from its best option.
        losses = [sign * each - (sign * each).min() for each in scores]
        exact = {
            what: [[Fraction(cost) for cost in layer] for layer in costs]
            for what, costs in constraints_to_candidate_costs.items()
        }
        first, *others = exact
        self.lower: dict[str, tuple[Fraction, int]] = {}
        self.costs: dict[str, list[np.ndarray]] = {}
        limits: dict[str, int] = {}
        for what, layers in exact.items():
            given = constraints[what]
            low, high = given if isinstance(given, tuple) else (None, given)
            unit = math.lcm(*(cost.denominator for layer in layers for cost in layer))
            self.costs[what] = [
                np.array([int(cost * unit) for cost in layer], dtype=np.int64) for layer in layers
            ]
            most = sum(int(each.max()) for each in self.costs[what])
            limits[what] = most if high is None else min(most, math.floor(Fraction(high) * unit))
            if low is not None:
                self.lower[what] = (Fraction(low), unit)
        groups = [
            Group(f"layer {number}", cost, loss)
            for number, (cost, loss) in enumerate(zip(self.costs[first], losses, strict=True))
        ]
        side = [SideBudget(what, self.costs[what], limits[what]) for what in others]
        self.problem = Problem(groups, limits[first], side_budgets=side)
        self.solution: Any = None

    def __call__(self) -> tuple[list[int], str]:
        """The place of each layer's option, and ``Optimal``, ``Infeasible`` or ``Not Solved``."""
        try:
            self.solution = solve(self.problem)
        except InfeasibleError:
            return [int(group.cost.argmin()) for group in self.problem.groups], "Infeasible"
        choice = [int(place) for place in self.solution.choice]
        for what, (low, unit) in self.lower.items():
            spent = sum(int(cost[j]) for cost, j in zip(self.costs[what], choice, strict=True))
            if spent < low * unit:
                return choice, "Infeasible"
        return choice, "Optimal" if self.solution.status == "optimal" else "Not Solved"


@contextlib.contextmanager
def installed(solver: type = ExactSolver) -> Iterator[None]:
    """AutoQuantize solves with it inside the ``with``."""
    from modelopt.torch.quantization import algorithms

    before = algorithms.LPS
    algorithms.LPS = solver
    try:
        yield
    finally:
        algorithms.LPS = before
