"""From a profile to a plan, without torch."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rankopt.errors import (
    BudgetError,
    InfeasibleBudgetError,
    OptionError,
    ProfileError,
    RankoptError,
    require_a,
)
from rankopt.layers import Bits, Form
from rankopt.plan import heuristics
from rankopt.plan.allocation import Allocation, Objective, allocation
from rankopt.plan.assemble import plan_of
from rankopt.plan.bits import with_bits
from rankopt.plan.budget import NO_BUDGET, Budget, at_least, find_budget
from rankopt.plan.latency import LatencyTable
from rankopt.plan.limits import (
    Cost,
    find_limits,
    infeasible,
    problem_under,
    reached,
)
from rankopt.plan.pins import Pins, pinned
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from rankopt_solvers import (
    SOLVERS,
    InfeasibleError,
    NoChoiceFoundError,
    Problem,
    Solution,
    certify,
    solve,
)
from rankopt_solvers.registry import (
    Solver,
    UnknownSolverError,
    find_solver,
    installed_solvers,
    is_solver_name,
)

#: Strategies that go layer by layer; all other names are solvers of rankopt_solvers.
STRATEGIES: dict[str, Callable[[Profile, Allocation, int], list[int]]] = {
    "uniform": heuristics.uniform,
    "proportional": heuristics.proportional,
    "threshold": heuristics.threshold,
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
    max_bytes: int | None = None,
    max_flops: int | None = None,
    max_latency: float | None = None,
    latency_table: LatencyTable | str | os.PathLike[str] | None = None,
    solver: str | Solver = "exact",
    objective: Objective = "total",
    rank_multiple: int = 1,
    form: Form | None = None,
    backend: str | None = None,
    scale: str | None = None,
    share: float | None = None,
    min_retained: float | Literal["best"] | None = None,
    pins: Pins | None = None,
    bits: Sequence[Bits] = (),
    **options: Any,
) -> Plan:
    """Decide the rank of every layer, and the bits of its weights.

    There may be one budget of parameters and one each of bytes, FLOPs and latency: ranks meet all.

    Args:
        profile: what every rank loses.
        keep: budget as a share of the planned layers' parameters.
        keep_total: budget as a share of the whole model's parameters.
        max_params: budget as a number of parameters for the planned layers.
        max_bytes: of the planned layers' weights, in the dtype that they were profiled in.
        max_flops: of a product with each planned layer, for one token; an addition counts, too.
        max_latency: of one call of each planned layer, in microseconds.
        latency_table: what they take at some ranks, or the file that says it; see
            ``rankopt.LatencyTable``. Ranks above those it lists are not on offer.
        solver: ``uniform``, ``proportional``, ``threshold``; ``exact``, ``greedy``, ``density``,
            ``knapsack``, or any other solver that rankopt_solvers.solve takes. Under several
            budgets ``exact`` leaves to ``knapsack`` what is not solved by one of them; those that
            take one budget refuse more, and the first three take one of parameters.
        objective: ``total``, ``layerwise`` or ``maxmin`` retained Fisher information. The first
            three strategies do not use it; it is what their bound and gap refer to.
        rank_multiple: offer only multiples of it (and dense).
        form: ``pairs`` of factors, or ``pivoted``, which has fewer parameters at the same rank; by
            default what the profile was made for.
        backend: whose losses to use; by default the profile's first.
        scale: how layers compare, one of the backend's; by default its first.
        share: for ``threshold``: retained share of every layer. Needs no budget; with one, a plan
            over it is an error.
        min_retained: share that every layer must retain at least, or ``"best"``: the largest
            that the budget allows. The sum alone starves layers with little information.
        pins: glob of layer names -> rank, or ``dense``: decided already, paid for from the budget,
            and bound by no share or floor. Of several that name a layer the last decides.
        bits: 8, 4: weights may be rounded to so many, too, of a profile that was made with them,
            under ``max_bytes``. A pin decides a rank, not its bits.
        options: passed to the solver, ``time_limit`` for ``exact`` and ``knapsack``.

    Raises:
        BudgetError: no budget, two of parameters, or a share or min_retained out of range.
        InfeasibleBudgetError: no ranks fit; names the smallest reachable budget.
        DataError: the table of latencies is none, or lacks a layer.
        OptionError: an unknown solver, objective, scale or form, an option that the solver does not
            take, a form that the profile does not reach, no layer with a rank that is a multiple,
            or a pin that names no layer or no rank on offer.
        ProfileError: the profile lacks the backend, or is none.
    """
    require_a(Profile, profile, ProfileError, "read it with rankopt.Profile.load")
    budget = find_budget(profile.info, keep, keep_total, max_params)
    limits = find_limits(max_bytes, max_flops, max_latency, latency_table)
    if budget is None and limits:
        first, everything = limits[0], profile.info.planned_parameters
        budget = Budget(kind=first.kind, asked=first.asked, parameters=everything)
    offered, solution = choose(
        profile,
        budget,
        limits=limits,
        solver=solver,
        objective=objective,
        rank_multiple=rank_multiple,
        form=form,
        backend=backend,
        scale=scale,
        share=share,
        min_retained=min_retained,
        pins=pins,
        bits=bits,
        options=options,
    )
    if budget is None:
        assert share is not None
        budget = Budget(kind="share", asked=share, parameters=solution.cost)
    return plan_of(profile, offered, solution, budget, limits)


def choose(
    profile: Profile,
    budget: Budget | None,
    *,
    limits: Sequence[Cost] = (),
    solver: str | Solver = "exact",
    objective: Objective = "total",
    rank_multiple: int = 1,
    form: Form | None = None,
    backend: str | None = None,
    scale: str | None = None,
    share: float | None = None,
    min_retained: float | Literal["best"] | None = None,
    pins: Pins | None = None,
    bits: Sequence[Bits] = (),
    options: Mapping[str, Any] | None = None,
) -> tuple[Allocation, Solution]:
    """What was on offer, and what the solver chose of it.

    Args:
        profile: what every rank loses.
        budget: ``share`` needs none.
        limits: beside it, or what it is of.
        solver: see make_plan, as all that follow.
        objective: see make_plan.
        rank_multiple: see make_plan.
        form: see make_plan.
        backend: see make_plan.
        scale: see make_plan.
        share: see make_plan.
        min_retained: see make_plan.
        pins: see make_plan.
        bits: see make_plan.
        options: passed to the solver.

    Raises:
        RankoptError: see make_plan.
    """
    _require_solver(solver, share)
    _require_one_budget(solver, objective, min_retained, budget, limits)
    offered = allocation(profile, backend, scale, objective, rank_multiple, form)
    offered = reached(pinned(offered, pins or {}), limits)
    if bits:
        if not any(limit.kind == "max_bytes" for limit in limits):
            raise OptionError("rounding changes bytes, not parameters: bits need max_bytes")
        offered = with_bits(offered, profile, bits)
    if min_retained is not None:
        _require_floor(min_retained, solver, objective)
    if share is not None:
        if options:
            raise OptionError(f"threshold takes no options, got {', '.join(options)}")
        return offered, _at_share(offered, share, budget)
    if budget is None:
        raise BudgetError(NO_BUDGET)
    problem = problem_under(offered, budget, limits)
    try:
        if min_retained is not None:
            floor = None if min_retained == "best" else float(min_retained)
            one = dataclasses.replace(problem, side_budgets=()) if limits else problem
            offered = offered.with_floor(one, floor)
            problem = problem_under(offered, budget, limits)
        return offered, _solve(profile, offered, problem, solver, dict(options or {}))
    except InfeasibleError as error:
        also = "" if min_retained is None else f" and min_retained={min_retained}"
        also += f" and {len(offered.pinned)} pinned layers" if offered.pinned else ""
        if limits:
            with_these = f"rank multiples of {rank_multiple}{also}"
            raise infeasible(problem, budget, limits, error, with_these) from error
        raise InfeasibleBudgetError(
            f"{budget} allows the planned layers "
            f"{max(error.budget, 0):,} parameters; the smallest reachable with rank multiples "
            f"of {rank_multiple}{also} is {error.smallest:,} "
            f"({budget.kind} {at_least(profile.info, budget.kind, error.smallest)}); "
            f"it binds first in {', '.join(error.largest_groups)}"
        ) from error


def _require_one_budget(
    solver: str | Solver,
    objective: Objective,
    min_retained: float | str | None,
    budget: Budget | None,
    limits: Sequence[Cost],
) -> None:
    """Of parameters, for what goes layer by layer; of anything, for what looks at levels."""
    if not limits:
        return
    if isinstance(solver, str) and solver in STRATEGIES:
        raise OptionError(
            f"{solver} goes layer by layer under one budget of parameters, and cannot meet "
            f"{limits[0].kind}: exact does"
        )
    if len(limits) + (budget is not None and budget.of_parameters) == 1:
        return
    for what, taken in (
        ("objective maxmin", objective == "maxmin"),
        ("min_retained best", min_retained == "best"),
    ):
        if taken:
            named = [str(limit) for limit in (budget, *limits) if limit is not None]
            raise OptionError(f"{what} takes one budget, not {' and '.join(dict.fromkeys(named))}")


def _require_solver(solver: str | Solver, share: float | None) -> None:
    if solver == "search":
        raise OptionError(
            "search measures a model: use rankopt.search_plan, or --solver search with --model"
        )
    if isinstance(solver, str) and not is_known_solver(solver):
        raise OptionError(f"unknown solver {solver!r}; known: {', '.join(known_solvers())}")
    if share is not None and solver != "threshold":
        raise OptionError(f"share belongs to the threshold strategy, not to {solver}")


def _at_share(offered: Allocation, share: float, budget: Budget | None) -> Solution:
    choice = heuristics.share_level(offered, share)
    spent = sum(int(group.cost[j]) for group, j in zip(offered.groups, choice, strict=True))
    if budget is not None and spent > budget.parameters:
        raise InfeasibleBudgetError(
            f"retaining {share} of every layer takes {spent:,} parameters; "
            f"{budget} allows {budget.parameters:,}"
        )
    allowed = spent if budget is None else budget.parameters
    return certify(offered.problem(allowed), choice, "threshold")


def _require_floor(min_retained: float | str, solver: str | Solver, objective: Objective) -> None:
    if isinstance(solver, str) and solver in STRATEGIES:
        raise OptionError(f"min_retained is for solvers; {solver} goes layer by layer")
    if objective == "maxmin":
        raise OptionError("objective maxmin has the best min_retained already")
    number = isinstance(min_retained, int | float) and not isinstance(min_retained, bool)
    if min_retained != "best" and not (number and 0.0 <= float(min_retained) <= 1.0):
        raise BudgetError(f"min_retained must be between 0 and 1, or 'best', got {min_retained!r}")


def _solve(
    profile: Profile,
    offered: Allocation,
    problem: Problem,
    solver: str | Solver,
    options: dict[str, Any],
) -> Solution:
    if isinstance(solver, str) and solver in STRATEGIES:
        if options:
            raise OptionError(f"{solver} takes no options, got {', '.join(options)}")
        problem.require_feasible()
        choice = STRATEGIES[solver](profile, offered, problem.budget)
        return certify(problem, choice, solver)
    if solver == "exact" and problem.side_budgets:
        solver = "knapsack"  # which leaves to exact what it can prove
    return solved(problem, solver, options)


def solved(problem: Problem, solver: str | Solver, options: dict[str, Any]) -> Solution:
    """What a solver, ours or somebody else's, chose.

    Args:
        problem: to solve.
        solver: of rankopt_solvers, installed, ``module:function``, or a function.
        options: passed to it.

    Raises:
        InfeasibleError: no choice fits the budget.
        OptionError: an unknown solver, options that it does not take, or whatever a foreign one
            does wrong.
    """
    if callable(solver) or solver in SOLVERS:
        return _called(problem, solver, options)
    problem.require_feasible()
    with _foreign(solver):
        return _called(problem, solver, options)


@contextlib.contextmanager
def _foreign(name: str) -> Iterator[None]:
    """Whatever a solver of somebody else's does is a mistake in its name; it prints on stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except RankoptError:
        raise
    except (Exception, SystemExit) as error:
        said = str(error).strip().splitlines()
        why = ": ".join([type(error).__name__, *(line[:200] for line in said[:1])])
        raise OptionError(
            f"solver {name}: {why}; wanted is a function of a problem that returns a Solution"
        ) from error


def _called(problem: Problem, solver: str | Solver, options: dict[str, Any]) -> Solution:
    name = find_solver(solver)[0] if callable(solver) else solver
    try:
        return solve(problem, solver, **options)
    except InfeasibleError:
        raise
    except NoChoiceFoundError as error:
        raise InfeasibleBudgetError(f"solver {name}: {error}") from error
    except UnknownSolverError as error:
        raise OptionError(str(error)) from error
    except (ValueError, ImportError) as error:
        raise OptionError(f"solver {name}: {error}") from error
    except TypeError as error:
        refused = [option for option in options if f"keyword argument '{option}'" in str(error)]
        if refused:
            raise OptionError(f"solver {name} takes no option {refused[0]}") from error
        raise
