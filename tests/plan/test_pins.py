"""Pinned ranks are kept, paid for, and the rest is the optimum beside them."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankopt.errors import InfeasibleBudgetError, OptionError, PlanError
from rankopt.plan.allocation import allocation
from rankopt.plan.compare import Strategy, compare
from rankopt.plan.pins import pinned
from rankopt.plan.plan import Plan
from rankopt.plan.planner import make_plan
from rankopt.profile.profile import Profile
from rankopt.results.results import MeasuredPlan
from tests.synthetic import synthetic_profile


@pytest.fixture(scope="module")
def profile() -> Profile:
    return synthetic_profile()


def names(profile: Profile) -> list[str]:
    return [layer.name for layer in profile.info.layers]


@pytest.mark.parametrize("solver", ["uniform", "proportional", "threshold", "exact", "greedy"])
@pytest.mark.parametrize("objective", ["total", "layerwise", "maxmin"])
def test_every_solver_keeps_them(profile: Profile, solver: str, objective: Any) -> None:
    first, second, *_ = names(profile)
    pins: Any = {first: 2, second: "dense"}
    plan = make_plan(profile, keep=0.7, solver=solver, objective=objective, pins=pins)
    assert plan.ranks[first] == 2 and plan.ranks[second] is None
    assert plan.pinned == (first, second)
    assert plan.size.planned <= plan.budget.parameters
    costs = {layer.name: layer.cost(plan.ranks[layer.name]) for layer in profile.info.layers}
    assert plan.size.planned == sum(costs.values())
    free = make_plan(profile, keep=0.7, solver=solver, objective=objective)
    assert free.ranks[first] != 2 and free.pinned == ()


def test_the_rest_is_optimal_beside_them() -> None:
    """Against every choice there is, where the first layer has one option."""
    profile = synthetic_profile(((6, 5), (7, 6), (5, 8)))
    offered = allocation(profile)
    first = names(profile)[0]
    budget = sum(layer.dense_cost for layer in profile.info.layers) // 2
    free = make_plan(profile, max_params=budget)
    for place, rank in enumerate(offered.ranks[0].tolist()):
        pins: Any = {first: "dense" if rank < 0 else rank}
        left = budget - int(offered.groups[0].cost[place])
        best = min(
            (
                sum(float(g.loss[j]) for g, j in zip(offered.groups[1:], choice, strict=True))
                for choice in itertools.product(*(range(g.cost.size) for g in offered.groups[1:]))
                if sum(int(g.cost[j]) for g, j in zip(offered.groups[1:], choice, strict=True))
                <= left
            ),
            default=None,
        )
        if best is None:
            with pytest.raises(InfeasibleBudgetError, match="1 pinned layers"):
                make_plan(profile, max_params=budget, pins=pins)
            continue
        plan = make_plan(profile, max_params=budget, pins=pins)
        assert plan.certificate.status == "optimal"
        assert plan.certificate.loss == pytest.approx(best + float(offered.groups[0].loss[place]))
        assert plan.certificate.loss >= free.certificate.loss - 1e-12


@pytest.mark.parametrize("solver", ["threshold", "exact"])
def test_a_poor_one_lowers_nobody_else(profile: Profile, solver: str) -> None:
    """The others share out what is left as if it were not there."""
    first, *rest = names(profile)
    poor = make_plan(profile, keep=0.6, solver=solver, objective="maxmin", pins={first: 1})
    of_first = next(e for e in poor.layers if e.layer.name == first)
    others = min(entry.retained for entry in poor.layers if entry.layer.name != first)
    free = make_plan(profile, keep=0.6, solver=solver, objective="maxmin")
    assert of_first.retained < others and others >= free.retained_worst
    assert poor.worst_layer == first and poor.retained_worst == of_first.retained
    assert {*rest} == {e.layer.name for e in poor.layers} - {first}


@pytest.mark.parametrize("floor", [0.95, "best"])
def test_a_floor_is_for_the_others(profile: Profile, floor: Any) -> None:
    first = names(profile)[0]
    plan = make_plan(profile, keep=0.6, min_retained=floor, pins={first: 1})
    assert plan.min_retained is not None
    kept = {entry.layer.name: entry.retained for entry in plan.layers}
    assert kept.pop(first) < plan.min_retained <= min(kept.values()) + 1e-9


def test_a_share_is_for_the_others(profile: Profile) -> None:
    first = names(profile)[0]
    plan = make_plan(profile, solver="threshold", share=0.9, pins={first: 1})
    kept = {entry.layer.name: entry.retained for entry in plan.layers}
    assert plan.ranks[first] == 1 and kept.pop(first) < 0.9 <= min(kept.values())


def test_the_last_decides_and_globs_reach_all(profile: Profile) -> None:
    first = names(profile)[0]
    plan = make_plan(profile, keep=1.0, pins={"*": "dense", first: 3})
    assert plan.ranks[first] == 3 and set(plan.pinned) == {*names(profile)}
    assert all(rank is None for name, rank in plan.ranks.items() if name != first)
    assert make_plan(profile, keep=0.7, pins={}) == make_plan(profile, keep=0.7)
    of_numpy = make_plan(profile, keep=1.0, pins={"*": "dense", first: np.int64(3)})
    assert of_numpy == plan and Plan.from_json(of_numpy.to_json()) == plan


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"*nowhere*": 2}, "names no planned layer"),
        ({"*": 0}, "a rank of 1 or more, or dense, not 0"),
        ({"*": True}, "not True"),
        ({"*": 1.5}, "not 1.5"),
        ({"*": "low"}, "not 'low'"),
        ({"*": 10_000}, "the largest that saves parameters in the form"),
    ],
)
def test_what_cannot_be_is_said(profile: Profile, pins: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_plan(profile, keep=0.7, pins=pins)


def test_multiples_bind_them_too(profile: Profile) -> None:
    first = names(profile)[0]
    with pytest.raises(OptionError, match=f"{first} cannot have rank 3: it is no multiple of 2"):
        make_plan(profile, keep=0.7, rank_multiple=2, pins={first: 3})
    assert make_plan(profile, keep=0.7, rank_multiple=2, pins={first: 4}).ranks[first] == 4


def test_ranks_that_were_not_measured_are_not_on_offer(profile: Profile) -> None:
    import dataclasses

    offered = allocation(profile)
    few = dataclasses.replace(
        offered,
        ranks=tuple(r[::2] for r in offered.ranks),
        lost_shares=tuple(x[::2] for x in offered.lost_shares),
    )
    missing = int(offered.ranks[0][1])
    with pytest.raises(OptionError, match="was measured at other ranks, near it"):
        pinned(few, {names(profile)[0]: missing})


def test_the_file_says_which(profile: Profile, tmp_path: Path) -> None:
    first = names(profile)[0]
    plan = make_plan(profile, keep=0.7, pins={first: 2})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan and "1 of them pinned" in str(plan)
    text = (tmp_path / "plan.json").read_text(encoding="utf-8")
    with pytest.raises(PlanError, match="pinned names something else"):
        Plan.from_json(text.replace(f'"pinned": [\n  "{first}"', '"pinned": [\n  "nobody"'))
    assert '"pinned"' not in make_plan(profile, keep=0.7).to_json()


def test_compared_plans_with_and_without_are_two(profile: Profile) -> None:
    first = names(profile)[0]
    (free,) = compare(profile, (0.7,), [Strategy("exact")])
    (bound,) = compare(profile, (0.7,), [Strategy("exact")], pins={first: 2})
    ours, theirs = MeasuredPlan.of(bound), MeasuredPlan.of(free)
    assert ours.pins == (f"{first}=2",) and theirs.pins == () and ours.asked != theirs.asked
