"""A solution of the problem as a plan: what it keeps, costs and is expected to lose."""

import math
from collections.abc import Sequence

from rankopt._version import __version__
from rankopt.plan.allocation import Allocation
from rankopt.plan.budget import Budget
from rankopt.plan.limits import Cost, prices_of, problem_under
from rankopt.plan.plan import Certificate, Plan, PlannedLayer, Size
from rankopt.profile.profile import Profile
from rankopt_solvers import Solution, margins


def plan_of(
    profile: Profile,
    offered: Allocation,
    solution: Solution,
    budget: Budget,
    limits: Sequence[Cost] = (),
) -> Plan:
    """A solution as a plan.

    Args:
        profile: the problem's.
        offered: the problem's.
        solution: of the problem.
        budget: what was asked for.
        limits: beside it, or what it is of.
    """
    info = profile.info
    priced = offered.objective != "maxmin"
    sure = margins(problem_under(offered, budget, limits), solution)
    retained = offered.retained(solution.choice)
    ranks = offered.ranks_of(solution.choice)
    price, prices = prices_of(budget, limits, solution)
    costs = {limit.kind: limit.options(offered) for limit in limits}
    took: Sequence[int | None] = [
        int(cost[j]) for cost, j in zip(costs.get("max_latency", ()), solution.choice, strict=False)
    ]
    entries = tuple(
        PlannedLayer(
            layer=layer,
            rank=rank,
            parameters=layer.cost(rank, offered.form),
            retained=share,
            margin=margin if priced and math.isfinite(margin) else None,
            nanoseconds=nanoseconds,
            bits=bits,
        )
        for layer, rank, bits, share, margin, nanoseconds in zip(
            offered.layers,
            ranks,
            offered.bits_of(solution.choice),
            retained,
            sure,
            took or (None,) * len(ranks),
            strict=True,
        )
    )
    spent = sum(entry.parameters for entry in entries)
    saved = info.planned_parameters - spent
    saved_bytes = info.planned_bytes - sum(entry.bytes_in(offered.form) for entry in entries)
    worst = min(range(len(retained)), key=lambda k: retained[k])
    return Plan(
        rankopt=__version__,
        backend=offered.backend,
        scale=offered.scale,
        solver=solution.solver,
        objective=offered.objective,
        rank_multiple=offered.rank_multiple,
        form=offered.form,
        min_retained=offered.min_retained,
        pinned=offered.pinned,
        budget=budget,
        limits=tuple(
            limit.stated(entries, offered.form, price if priced else None)
            for limit, price in zip(limits, prices, strict=True)
        ),
        certificate=Certificate(
            loss=solution.loss,
            bound=solution.bound,
            gap=solution.gap,
            status=solution.status,
            unit=offered.unit,
            multiplier=price if priced else None,
        ),
        retained_total=offered.retained_total(solution.choice),
        retained_worst=retained[worst],
        worst_layer=offered.layers[worst].name,
        predicted=_predicted(profile, offered, solution),
        size=Size(
            planned_dense=info.planned_parameters,
            planned=spent,
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


def _predicted(profile: Profile, offered: Allocation, solution: Solution) -> float | None:
    """Nats per target, whatever the objective and the scale that the plan was made with."""
    backend, info = profile.backend(offered.backend), profile.info
    if offered.bits:  # of truncation and of rounding, in nats
        return solution.loss * info.units / info.targets
    scale = next((scale for scale in backend.scales if scale.unit.startswith("nats")), None)
    if scale is None:
        return None
    per_unit = math.fsum(
        factor * profile.loss_curve(backend.name, layer.name, scale.name).lost(rank)
        for layer, factor, rank in zip(
            offered.layers, scale.factors, offered.ranks_of(solution.choice), strict=True
        )
    )
    return per_unit * info.units / info.targets
