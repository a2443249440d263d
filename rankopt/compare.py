"""Strategies side by side, from one profile and without torch."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rankopt.allocate import Objective
from rankopt.errors import BudgetError
from rankopt.plan import Plan
from rankopt.planning import is_known_solver, known_solvers, make_plan
from rankopt.profile import Profile

if TYPE_CHECKING:
    from rankopt.evaluation import Evaluation


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A solver and what it maximises; written ``solver`` or ``solver/objective``."""

    solver: str
    objective: Objective = "total"

    @classmethod
    def parse(cls, text: str) -> "Strategy":
        """From ``solver/objective``.

        Raises:
            BudgetError: unknown solver or objective.
        """
        solver, _, objective = text.partition("/")
        if not is_known_solver(solver):
            raise BudgetError(f"unknown solver {solver!r}; known: {', '.join(known_solvers())}")
        for known in ("total", "layerwise", "maxmin"):
            if objective in (known, ""):
                return cls(solver, known if objective else "total")
        raise BudgetError(f"unknown objective {objective!r}; known: total, layerwise, maxmin")

    def __str__(self) -> str:
        return self.solver if self.objective == "total" else f"{self.solver}/{self.objective}"


#: What ``rankopt compare`` shows: every strategy, and every objective solved exactly.
DEFAULT_STRATEGIES = (
    Strategy("uniform"),
    Strategy("proportional"),
    Strategy("threshold"),
    Strategy("greedy"),
    Strategy("knapsack"),
    Strategy("exact"),
    Strategy("exact", "layerwise"),
    Strategy("exact", "maxmin"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One strategy at one budget.

    Attributes:
        strategy: who chose.
        keep: share of the planned layers' parameters asked for.
        plan: the choice.
        seconds: what choosing took.
        measured: the loss on data, if a model was given.
    """

    strategy: Strategy
    keep: float
    plan: Plan
    seconds: float
    measured: "Evaluation | None" = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plan = self.plan
        found: dict[str, Any] = {
            "strategy": self.strategy.solver,
            "objective": self.strategy.objective,
            "keep": self.keep,
            "retained_total": plan.retained_total,
            "retained_worst": plan.retained_worst,
            "worst_layer": plan.worst_layer,
            "parameters": plan.size.planned,
            "budget": plan.budget.parameters,
            "kept": plan.size.planned / plan.size.planned_dense,
            "model_parameters": plan.size.model,
            "model_bytes": plan.size.model_bytes,
            "gap": plan.certificate.gap,
            "status": plan.certificate.status,
            "seconds": self.seconds,
        }
        if self.measured is not None:
            found["loss"] = self.measured.loss
            found.update(self.measured.metrics)
        return found


def compare(
    profile: Profile,
    keeps: Sequence[float],
    strategies: Sequence[Strategy] = DEFAULT_STRATEGIES,
    **options: Any,
) -> Iterator[Row]:
    """Plan with every strategy at every budget, one row at a time.

    Args:
        profile: what every rank retains.
        keeps: budgets, as shares of the planned layers' parameters.
        strategies: who chooses.
        options: passed to make_plan: backend, scale, rank_multiple.

    Raises:
        BudgetError, InfeasibleBudgetError: as make_plan.
    """
    for keep in keeps:
        for strategy in strategies:
            start = time.perf_counter()
            plan = make_plan(
                profile,
                keep=keep,
                solver=strategy.solver,
                objective=strategy.objective,
                **options,
            )
            yield Row(strategy, keep, plan, time.perf_counter() - start)
