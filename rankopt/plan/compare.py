"""Strategies side by side, from one profile and without torch."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, cast

from rankopt.errors import OptionError
from rankopt.layers import FORMS, Form
from rankopt.plan.allocation import Objective
from rankopt.plan.plan import Plan
from rankopt.plan.planner import is_known_solver, known_solvers, make_plan
from rankopt.profile.profile import Profile


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Who chooses the ranks; written ``SOLVER[/OBJECTIVE][/min=SHARE][/FORM][@BACKEND]``.

    Attributes:
        solver: a name that make_plan takes.
        objective: what it maximises.
        backend: whose losses it sees and whose factors are made; None is the profile's default.
        min_retained: share that every layer retains at least, or ``best``; None is no floor.
        form: ``pairs`` or ``pivoted``; None is the profile's.
    """

    solver: str
    objective: Objective = "total"
    backend: str | None = None
    min_retained: float | Literal["best"] | None = None
    form: Form | None = None

    @classmethod
    def parse(cls, text: str) -> "Strategy":
        """From ``exact``, ``exact/layerwise``, ``exact/pairs``,
        ``exact/layerwise/min=best@svd``.

        Whether a profile has the backend, and a solver the floor, shows later.

        Raises:
            OptionError: unknown solver or objective, no share after min=, or no backend after
                the @.
        """
        chooser, at, backend = text.partition("@")
        if at and (not backend or "/" in backend or "@" in backend):
            raise OptionError(f"strategy {text!r} names no backend after the @: {GRAMMAR}")
        solver, *rest = chooser.split("/")
        if not is_known_solver(solver):
            raise OptionError(f"unknown solver {solver!r}; known: {', '.join(known_solvers())}")
        form = next((known for known in FORMS if rest[-1:] == [known]), None)
        if form:
            rest.pop()
        floor = None
        if rest and rest[-1].startswith("min="):
            floor = _floor(text, rest.pop()[len("min=") :])
        objective = "/".join(rest)
        for known in ("total", "layerwise", "maxmin"):
            if objective == known or not rest:
                return cls(solver, known if objective else "total", backend or None, floor, form)
        raise OptionError(
            f"unknown objective {objective!r} in strategy {text!r}; known: total, layerwise, "
            f"maxmin: {GRAMMAR}"
        )

    def __str__(self) -> str:
        objective = "" if self.objective == "total" else f"/{self.objective}"
        floor = "" if self.min_retained is None else f"/min={self.min_retained}"
        form = "" if self.form is None else f"/{self.form}"
        return self.solver + objective + floor + form + (f"@{self.backend}" if self.backend else "")


#: How a strategy is written; nothing in it means something to a shell.
GRAMMAR = "SOLVER[/OBJECTIVE][/min=SHARE][/FORM][@BACKEND]"


def _floor(text: str, given: str) -> float | Literal["best"]:
    if given == "best":
        return "best"
    try:
        share = float(given)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise OptionError(
            f"strategy {text!r}: min= takes a share between 0 and 1, or best, not {given!r}"
        )
    return share


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


def spread(
    strategies: Iterable[Strategy], backends: Sequence[str], forms: Sequence[str]
) -> list[Strategy]:
    """Every strategy with every backend and form, unless it names its own; each once.

    Args:
        strategies: who choose.
        backends: none is the profile's default, which is then not named.
        forms: likewise.
    """
    found: dict[Strategy, None] = {}
    for each in strategies:
        for backend in (each.backend,) if each.backend else (*backends,) or (None,):
            for form in (each.form,) if each.form else (*forms,) or (None,):
                named = dataclasses.replace(each, backend=backend, form=cast(Form | None, form))
                found[named] = None
    return list(found)


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
        options: passed to make_plan: backend, min_retained and form (of the strategies that name
            none), scale, rank_multiple, pins.

    Raises:
        BudgetError, InfeasibleBudgetError, OptionError, ProfileError: as make_plan.
    """
    backend, floor = options.pop("backend", None), options.pop("min_retained", None)
    form = options.pop("form", None)
    for keep in keeps:
        for strategy in strategies:
            start = time.perf_counter()
            plan = make_plan(
                profile,
                keep=keep,
                solver=strategy.solver,
                objective=strategy.objective,
                backend=strategy.backend or backend,
                min_retained=floor if strategy.min_retained is None else strategy.min_retained,
                form=strategy.form or form,
                **options,
            )
            yield ComparedPlan(strategy, keep, plan, time.perf_counter() - start)
