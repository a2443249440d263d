"""From a profile to a plan, without torch."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rankopt._version import __version__
from rankopt.errors import BudgetError, InfeasibleBudgetError
from rankopt.plan import heuristics as strategies
from rankopt.plan.allocation import Allocation, Objective, allocation
from rankopt.plan.budget import AskedBudget, Budget, at_least, find_budget
from rankopt.plan.plan import Certificate, Plan, PlannedLayer, Size
from rankopt.profile.profile import Profile
from rankopt_solvers import (
    SOLVERS,
    InfeasibleError,
    Problem,
    Solution,
    certify,
    margins,
    solve,
    within_level,
)
from rankopt_solvers.registry import Solver, find_solver, installed_solvers, is_solver_name

#: Strategies that look at layers; all other names are solvers of rankopt_solvers.
STRATEGIES: dict[str, Callable[[Profile, Allocation, int], list[int]]] = {
    "uniform": strategies.uniform,
    "proportional": strategies.proportional,
    "threshold": strategies.threshold,
}


def known_solvers() -> tuple[str, ...]:
    """Every name that make_plan takes, those of other distributions included."""
    return (*STRATEGIES, *SOLVERS, *installed_solvers())


def is_known_solver(name: str) -> bool:
    """Whether make_plan takes the name: a strategy, a solver, or ``module:function``."""
    return name in STRATEGIES or is_solver_name(name)


def make_plan(
    profile: Profile,
    *,
    keep: float | None = None,
    keep_total: float | None = None,
    max_params: int | None = None,
    solver: str | Solver = "exact",
    objective: Objective = "total",
    rank_multiple: int = 1,
    backend: str | None = None,
    scale: str | None = None,
    share: float | None = None,
    min_retained: float | Literal["best"] | None = None,
    **options: Any,
) -> Plan:
    """Decide the rank of every layer.

    Args:
        profile: what every rank loses.
        keep: budget as a share of the planned layers' parameters.
        keep_total: budget as a share of the whole model's parameters.
        max_params: budget as a number of parameters for the planned layers.
        solver: ``uniform``, ``proportional``, ``threshold``; ``exact``, ``greedy``, ``density``,
            ``knapsack``, or any other solver that rankopt_solvers.solve takes.
        objective: ``total``, ``layerwise`` or ``maxmin`` retained Fisher information. The first
            three strategies do not look at it; it is what their bound and gap refer to.
        rank_multiple: offer only multiples of it (and dense).
        backend: whose losses to use; by default the profile's first.
        scale: how layers compare, one of the backend's; by default its first.
        share: for ``threshold``: retained share of every layer. Needs no budget; with one, a plan
            over it is an error.
        min_retained: share that every layer must retain at least, or ``"best"``: the largest
            that the budget allows. The sum alone starves layers with little information.
        options: passed to the solver, ``time_limit`` for ``exact`` and ``knapsack``.

    Raises:
        BudgetError: no or two budgets, an unknown solver, objective, scale or option, or no layer
            with a rank that is a multiple.
        InfeasibleBudgetError: no ranks fit; names the smallest reachable budget.
        ProfileError: the profile lacks the backend.
    """
    if solver == "search":
        raise BudgetError(
            "search measures a model: use rankopt.search_plan, or --solver search with --model"
        )
    if isinstance(solver, str) and not is_known_solver(solver):
        raise BudgetError(f"unknown solver {solver!r}; known: {', '.join(known_solvers())}")
    if share is not None and solver != "threshold":
        raise BudgetError(f"share belongs to the threshold strategy, not to {solver}")
    found = profile.backend(backend)
    backend, scale = found.name, found.find_scale(scale).name
    offered = allocation(profile, backend, scale, objective, rank_multiple)
    budget = find_budget(profile.info, keep, keep_total, max_params)
    if min_retained is not None:
        _require_floor(min_retained, solver, objective)
    if share is not None:
        if options:
            raise BudgetError(f"threshold takes no options, got {', '.join(options)}")
        choice = strategies.share_level(offered, share)
        spent = sum(int(group.cost[j]) for group, j in zip(offered.groups, choice, strict=True))
        if budget is None:
            asked = AskedBudget(kind="share", asked=share, parameters=spent)
        elif spent > budget.parameters:
            raise InfeasibleBudgetError(
                f"retaining {share} of every layer takes {spent:,} parameters; "
                f"{budget.kind}={budget.asked} allows {budget.parameters:,}"
            )
        else:
            asked = asked_budget(budget)
        solution = certify(offered.problem(asked.parameters), choice, "threshold")
    else:
        if budget is None:
            raise BudgetError("a budget is needed: keep, keep_total or max_params")
        try:
            if min_retained is None:
                problem = offered.problem(budget.parameters)
                solution = _solve(profile, offered, problem, solver, options)
            else:
                return _floored(
                    profile, offered, budget, solver, options, min_retained, (backend, scale)
                )
        except InfeasibleError as error:
            floor = "" if min_retained is None else f" and min_retained={min_retained}"
            raise InfeasibleBudgetError(
                f"{budget.kind}={budget.asked} allows the planned layers "
                f"{max(error.budget, 0):,} parameters; the smallest reachable with rank multiples "
                f"of {rank_multiple}{floor} is {error.smallest:,} "
                f"({budget.kind} {at_least(profile.info, budget.kind, error.smallest)}); "
                f"it binds first in {', '.join(error.largest_groups)}"
            ) from error
        asked = asked_budget(budget)
    return plan_of(profile, offered, solution, asked, backend, scale)


def _require_floor(min_retained: float | str, solver: str | Solver, objective: Objective) -> None:
    if isinstance(solver, str) and solver in STRATEGIES:
        raise BudgetError(f"min_retained is for solvers; {solver} does not look at a problem")
    if objective == "maxmin":
        raise BudgetError("objective maxmin has the best min_retained already")
    number = isinstance(min_retained, int | float) and not isinstance(min_retained, bool)
    if min_retained != "best" and not (number and 0.0 <= float(min_retained) <= 1.0):
        raise BudgetError(f"min_retained must be between 0 and 1, or 'best', got {min_retained!r}")


def _floored(
    profile: Profile,
    offered: Allocation,
    budget: Budget,
    solver: str | Solver,
    options: dict[str, Any],
    min_retained: float | str,
    how: tuple[str, str],
) -> Plan:
    """In two stages: a floor for every layer, then the best sum above it."""
    problem = offered.problem(budget.parameters)
    level = None if min_retained == "best" else 1.0 - float(min_retained)
    second, kept, level = within_level(problem, level, offered.lost_shares)
    found = _solve(profile, offered, second, solver, options)
    sure = margins(second, found)
    choice = tuple(int(k[j]) for k, j in zip(kept, found.choice, strict=True))
    return plan_of(
        profile,
        offered,
        dataclasses.replace(found, choice=choice),
        asked_budget(budget),
        *how,
        min_retained=1.0 - level,
        sure=sure,
    )


def asked_budget(budget: Budget) -> AskedBudget:
    """The budget as a plan records it."""
    return AskedBudget(kind=budget.kind, asked=budget.asked, parameters=budget.parameters)


def _solve(
    profile: Profile,
    offered: Allocation,
    problem: Problem,
    solver: str | Solver,
    options: dict[str, Any],
) -> Solution:
    if isinstance(solver, str) and solver in STRATEGIES:
        if options:
            raise BudgetError(f"{solver} takes no options, got {', '.join(options)}")
        problem.require_feasible()
        choice = STRATEGIES[solver](profile, offered, problem.budget)
        return certify(problem, choice, solver)
    name = find_solver(solver)[0] if callable(solver) else solver
    try:
        return solve(problem, solver, **options)
    except InfeasibleError:
        raise
    except (ValueError, ImportError) as error:
        raise BudgetError(f"solver {name}: {error}") from error
    except TypeError as error:
        refused = [option for option in options if f"keyword argument '{option}'" in str(error)]
        if refused:
            raise BudgetError(f"solver {name} takes no option {refused[0]}") from error
        raise


def plan_of(
    profile: Profile,
    offered: Allocation,
    solution: Solution,
    asked: AskedBudget,
    backend: str,
    scale: str,
    *,
    min_retained: float | None = None,
    sure: Sequence[float] | None = None,
) -> Plan:
    """A solution as a plan.

    Args:
        profile: the problem's.
        offered: the problem's.
        solution: of the problem.
        asked: the budget.
        backend: whose losses were used.
        scale: how layers were compared.
        min_retained: the floor that the solution keeps.
        sure: margins of the layers, if they are not those of the problem without a floor.
    """
    info = profile.info
    priced = offered.objective != "maxmin"
    if sure is None:
        sure = margins(offered.problem(asked.parameters), solution)
    retained = offered.retained(solution.choice)
    ranks = offered.ranks_of(solution.choice)
    entries = tuple(
        PlannedLayer(
            layer=layer,
            rank=rank,
            parameters=layer.cost(rank),
            retained=kept,
            margin=margin if priced and math.isfinite(margin) else None,
        )
        for layer, rank, kept, margin in zip(offered.layers, ranks, retained, sure, strict=True)
    )
    saved = info.planned_parameters - solution.cost
    saved_bytes = info.planned_bytes - sum(e.parameters * e.layer.itemsize for e in entries)
    worst = min(range(len(retained)), key=lambda k: retained[k])
    unit = "lost share of a layer's Fisher"
    if offered.objective == "total":
        unit = profile.backend(backend).find_scale(scale).unit
    return Plan(
        rankopt=__version__,
        backend=backend,
        scale=scale,
        solver=solution.solver,
        objective=offered.objective,
        rank_multiple=offered.rank_multiple,
        min_retained=min_retained,
        budget=asked,
        certificate=Certificate(
            loss=solution.loss,
            bound=solution.bound,
            gap=solution.gap,
            status=solution.status,
            unit=unit,
            multiplier=solution.multiplier if priced else None,
        ),
        retained_total=offered.retained_total(solution.choice),
        retained_worst=retained[worst],
        worst_layer=offered.layers[worst].name,
        size=Size(
            planned_dense=info.planned_parameters,
            planned=solution.cost,
            model_dense=info.model_parameters,
            model=info.model_parameters - saved,
            model_bytes_dense=info.model_bytes,
            model_bytes=info.model_bytes - saved_bytes,
        ),
        architecture=info.architecture,
        fingerprint=info.fingerprint,
        profile_digest=profile.digest(),
        layers=entries,
    )
