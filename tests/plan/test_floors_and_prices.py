"""Floors of what every layer retains, and what a parameter more would save."""

from typing import Any

import pytest

from rankopt import make_plan
from rankopt.layers import DENSE
from rankopt.plan.allocation import allocation
from rankopt.plan.plan import Plan
from tests.plan.test_planner import PROFILE, SMOOTH


@pytest.mark.parametrize("objective", ["total", "layerwise"])
def test_price_and_margins_are_those_of_the_problem(objective: Any) -> None:
    plan = make_plan(PROFILE, keep=0.6, objective=objective)
    lam = plan.certificate.multiplier
    assert lam is not None and lam > 0
    offered = allocation(PROFILE, plan.backend, plan.scale, objective, 1)
    choice = [
        ranks.tolist().index(DENSE if entry.rank is None else entry.rank)
        for ranks, entry in zip(offered.ranks, plan.layers, strict=True)
    ]
    for group, j, entry in zip(offered.groups, choice, plan.layers, strict=True):
        prices = [loss + lam * cost for loss, cost in zip(group.loss, group.cost, strict=True)]
        others = prices[:j] + prices[j + 1 :]
        assert entry.margin == pytest.approx(min(others) - prices[j], abs=1e-9 * max(prices))
    assert "1,000 more parameters would save" in str(plan)


def test_price_predicts_what_a_little_more_budget_saves() -> None:
    plan = make_plan(PROFILE, keep=0.6)
    more = make_plan(PROFILE, max_params=plan.budget.parameters + 2_000)
    assert plan.certificate.multiplier is not None and more.certificate.multiplier is not None
    saved = (plan.certificate.bound - more.certificate.bound) / 2_000
    # The curve is convex, but single ranks are coarse: half and double are enough to be wrong.
    assert 0.3 * more.certificate.multiplier < saved < 3 * plan.certificate.multiplier


def test_maxmin_has_no_price() -> None:
    plan = make_plan(PROFILE, keep=0.6, objective="maxmin")
    assert plan.certificate.multiplier is None
    assert {entry.margin for entry in plan.layers} == {None}


@pytest.mark.parametrize("objective", ["total", "layerwise"])
@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_floor_is_kept_and_costs_retained_information(solver: str, objective: Any) -> None:
    free = make_plan(SMOOTH, keep=0.6, solver=solver, objective=objective)
    best = make_plan(SMOOTH, keep=0.6, objective="maxmin").retained_worst
    assert free.retained_worst < best
    floor = (free.retained_worst + best) / 2
    floored = make_plan(SMOOTH, keep=0.6, solver=solver, objective=objective, min_retained=floor)
    assert floored.retained_worst >= floor
    assert floored.min_retained == pytest.approx(floor)
    assert floored.size.planned <= floored.budget.parameters
    assert free.certificate.bound <= floored.certificate.bound <= floored.certificate.loss
    if solver == "exact":
        assert floored.certificate.status == "optimal"
    assert Plan.from_json(floored.to_json()) == floored


def test_best_floor_is_that_of_maxmin() -> None:
    floored = make_plan(SMOOTH, keep=0.6, min_retained="best")
    fair = make_plan(SMOOTH, keep=0.6, objective="maxmin")
    assert floored.min_retained == pytest.approx(fair.retained_worst, rel=1e-12)
    assert floored.retained_total >= fair.retained_total - 1e-12
