"""Strategies side by side, from one profile and without torch."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rankopt.errors import OptionError
from rankopt.plan.allocation import Objective
from rankopt.plan.plan import Plan
from rankopt.plan.planner import is_known_solver, known_solvers, make_plan
from rankopt.profile.profile import Profile


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Who chooses the ranks; written ``SOLVER[/OBJECTIVE][@BACKEND]``.

    Attributes:
        solver: a name that make_plan takes.
        objective: what it maximises.
        backend: whose losses it sees and whose factors are made; None is the profile's default.
    """

    solver: str
    objective: Objective = "total"
    backend: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Strategy":
        """From ``SOLVER[/OBJECTIVE][@BACKEND]``; whether a profile has the backend shows later.

        Raises:
            OptionError: unknown solver or objective, or no backend after the @.
        """
        chooser, at, backend = text.partition("@")
        if at and (not backend or "/" in backend or "@" in backend):
            raise OptionError(
                f"strategy {text!r} names no backend after the @: SOLVER[/OBJECTIVE][@BACKEND]"
            )
        solver, _, objective = chooser.partition("/")
        if not is_known_solver(solver):
            raise OptionError(f"unknown solver {solver!r}; known: {', '.join(known_solvers())}")
        for known in ("total", "layerwise", "maxmin"):
            if objective in (known, ""):
                return cls(solver, known if objective else "total", backend or None)
        raise OptionError(f"unknown objective {objective!r}; known: total, layerwise, maxmin")

    def __str__(self) -> str:
        objective = "" if self.objective == "total" else f"/{self.objective}"
        return self.solver + objective + (f"@{self.backend}" if self.backend else "")


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
class ComparedPlan:
    """One strategy at one budget.

    Attributes:
        strategy: who chose.
        keep: share of the planned layers' parameters asked for.
        plan: the choice.
        seconds: what choosing took.
    """

    strategy: Strategy
    keep: float
    plan: Plan
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plan = self.plan
        return {
            "strategy": self.strategy.solver,
            "objective": self.strategy.objective,
            "backend": plan.backend,
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


def compare(
    profile: Profile,
    keeps: Sequence[float],
    strategies: Sequence[Strategy] = DEFAULT_STRATEGIES,
    **options: Any,
) -> Iterator[ComparedPlan]:
    """Plan with every strategy at every budget, one row at a time.

    Each backend has its own losses: retained shares and gaps of different backends are no
    comparison; the measured loss is.

    Args:
        profile: what every rank loses.
        keeps: budgets, as shares of the planned layers' parameters.
        strategies: who chooses.
        options: passed to make_plan: backend (of the strategies that name none), scale,
            rank_multiple, form.

    Raises:
        BudgetError, InfeasibleBudgetError, OptionError, ProfileError: as make_plan.
    """
    backend = options.pop("backend", None)
    for keep in keeps:
        for strategy in strategies:
            start = time.perf_counter()
            plan = make_plan(
                profile,
                keep=keep,
                solver=strategy.solver,
                objective=strategy.objective,
                backend=strategy.backend or backend,
                **options,
            )
            yield ComparedPlan(strategy, keep, plan, time.perf_counter() - start)
