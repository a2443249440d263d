"""From a profile to a plan, without torch."""

from collections.abc import Callable
from typing import Any

from rankopt import strategies
from rankopt._version import __version__
from rankopt.allocate import Allocation, Objective, allocation
from rankopt.budget import Budget, at_least, find_budget
from rankopt.curves import find_scale
from rankopt.errors import BudgetError, InfeasibleBudgetError
from rankopt.plan import AskedBudget, Certificate, Plan, PlannedLayer, Size
from rankopt.profile import Profile
from rankopt_solvers import SOLVERS, InfeasibleError, Solution, certify, solve
from rankopt_solvers.registry import Solver, find_solver

#: Strategies that look at layers; all other names are solvers of rankopt_solvers.
STRATEGIES: dict[str, Callable[[Profile, Allocation, int], list[int]]] = {
    "uniform": strategies.uniform,
    "proportional": strategies.proportional,
    "threshold": strategies.threshold,
}

_UNITS = {
    "nats": "nats per example (second-order estimate)",
    "sum": "row-sum Fisher units",
    "frobenius": "squared weights",
}


def known_solvers() -> tuple[str, ...]:
    """Every name that make_plan takes."""
    return (*STRATEGIES, *SOLVERS)


def make_plan(
    profile: Profile,
    *,
    keep: float | None = None,
    keep_total: float | None = None,
    max_params: int | None = None,
    solver: str | Solver = "greedy",
    objective: Objective = "total",
    rank_multiple: int = 1,
    backend: str | None = None,
    scale: str | None = None,
    share: float | None = None,
    **options: Any,
) -> Plan:
    """Decide the rank of every layer.

    Args:
        profile: what every rank retains.
        keep: budget as a share of the planned layers' parameters.
        keep_total: budget as a share of the whole model's parameters.
        max_params: budget as a number of parameters for the planned layers.
        solver: ``uniform``, ``proportional``, ``threshold``, ``greedy``, ``knapsack``, or a
            callable as in rankopt_solvers.
        objective: ``total``, ``layerwise`` or ``maxmin`` retained Fisher information. The first
            three strategies do not look at it; it is what their bound and gap refer to.
        rank_multiple: offer only multiples of it (and dense).
        backend: whose spectra to use; by default the profile's first.
        scale: how layers compare (see curves); by default the backend's first.
        share: for ``threshold``: retained share of every layer. Needs no budget; with one, a plan
            over it is an error.
        options: passed to the solver, ``time_limit`` for ``knapsack``.

    Raises:
        BudgetError: no or two budgets, or an unknown solver, objective, scale or option.
        InfeasibleBudgetError: no ranks fit; names the smallest reachable budget.
        ProfileError: the profile lacks the backend.
    """
    if isinstance(solver, str) and solver not in known_solvers():
        raise BudgetError(f"unknown solver {solver!r}; known: {', '.join(known_solvers())}")
    if share is not None and solver != "threshold":
        raise BudgetError(f"share belongs to the threshold strategy, not to {solver}")
    backend = profile.backends[0] if backend is None else backend
    profile.spectra(backend)
    scale = find_scale(backend, scale)
    offered = allocation(profile, backend, scale, objective, rank_multiple)
    budget = find_budget(profile.info, keep, keep_total, max_params)
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
            asked = _asked(budget)
        solution = certify(offered.problem(asked.parameters), choice, "threshold")
    else:
        if budget is None:
            raise BudgetError("a budget is needed: keep, keep_total or max_params")
        try:
            solution = _solve(profile, offered, budget.parameters, solver, options)
        except InfeasibleError as error:
            raise InfeasibleBudgetError(
                f"{budget.kind}={budget.asked} allows the planned layers "
                f"{max(error.budget, 0):,} parameters; the smallest reachable with rank multiples "
                f"of {rank_multiple} is {error.smallest:,} "
                f"({budget.kind} {at_least(profile.info, budget.kind, error.smallest)}); "
                f"it binds first in {', '.join(error.largest_groups)}"
            ) from error
        asked = _asked(budget)
    return _plan(profile, offered, solution, asked, backend, scale, rank_multiple)


def _asked(budget: Budget) -> AskedBudget:
    return AskedBudget(kind=budget.kind, asked=budget.asked, parameters=budget.parameters)


def _solve(
    profile: Profile,
    offered: Allocation,
    budget: int,
    solver: str | Solver,
    options: dict[str, Any],
) -> Solution:
    problem = offered.problem(budget)
    name = find_solver(solver)[0] if callable(solver) else solver
    if isinstance(solver, str) and solver in STRATEGIES:
        if options:
            raise BudgetError(f"{solver} takes no options, got {', '.join(options)}")
        problem.require_feasible()
        return certify(problem, STRATEGIES[solver](profile, offered, budget), solver)
    try:
        return solve(problem, solver, **options)
    except InfeasibleError:
        raise
    except (ValueError, ImportError) as error:
        raise BudgetError(f"solver {name}: {error}") from error
    except TypeError as error:
        if options and "unexpected keyword" in str(error):
            raise BudgetError(f"solver {name}: {error}") from error
        raise


def _plan(
    profile: Profile,
    offered: Allocation,
    solution: Solution,
    asked: AskedBudget,
    backend: str,
    scale: str,
    rank_multiple: int,
) -> Plan:
    info = profile.info
    retained = offered.retained(solution.choice)
    ranks = offered.ranks_of(solution.choice)
    entries = tuple(
        PlannedLayer(layer=layer, rank=rank, parameters=layer.cost(rank), retained=kept)
        for layer, rank, kept in zip(offered.layers, ranks, retained, strict=True)
    )
    saved = info.planned_parameters - solution.cost
    saved_bytes = info.planned_bytes - sum(e.parameters * e.layer.itemsize for e in entries)
    worst = min(range(len(retained)), key=lambda k: retained[k])
    unit = _UNITS[scale] if offered.objective == "total" else "lost share of a layer's Fisher"
    return Plan(
        rankopt=__version__,
        backend=backend,
        scale=scale,
        solver=solution.solver,
        objective=offered.objective,
        rank_multiple=rank_multiple,
        budget=asked,
        certificate=Certificate(
            loss=solution.loss,
            bound=solution.bound,
            gap=solution.gap,
            status=solution.status,
            unit=unit,
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
