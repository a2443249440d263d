"""Strategies that go layer by layer: threshold, uniform, proportional."""

import numpy as np
import pytest

from rankopt import make_plan
from rankopt.errors import InfeasibleBudgetError
from rankopt.layers import DENSE
from tests.plan.test_planner import PROFILE, check, smooth_profile, with_fisher


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75, 0.95])
def test_threshold_has_the_best_worst_layer(keep: float) -> None:
    threshold = make_plan(PROFILE, keep=keep, solver="threshold")
    maxmin = make_plan(PROFILE, keep=keep, solver="greedy", objective="maxmin")
    assert threshold.retained_worst == maxmin.retained_worst
    for solver in ("uniform", "proportional", "greedy"):
        other = make_plan(PROFILE, keep=keep, solver=solver)
        assert other.retained_worst <= threshold.retained_worst


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99, 0.999999, 1.0])
def test_threshold_takes_the_smallest_rank_that_keeps_the_share(
    share: float, multiple: int
) -> None:
    plan = make_plan(PROFILE, solver="threshold", share=share, rank_multiple=multiple)
    check(plan, PROFILE)
    assert (plan.budget.kind, plan.budget.asked) == ("share", share)
    assert plan.budget.parameters == plan.size.planned
    for entry in plan.layers:
        assert entry.retained >= share - 1e-15
        curve = PROFILE.curves["fwsvd"][entry.layer.name].losses
        offered = entry.layer.ranks(multiple).tolist()
        less = offered[: offered.index(DENSE if entry.rank is None else entry.rank)]
        if less:
            assert 1 - curve[less[-1]] / curve[0] < share + 1e-15


def test_threshold_with_share_and_budget_stays_within_it_or_says_what_it_takes() -> None:
    free = make_plan(PROFILE, solver="threshold", share=0.9)
    same = make_plan(PROFILE, solver="threshold", share=0.9, max_params=free.size.planned)
    assert same.ranks == free.ranks
    assert same.budget.kind == "max_params"
    with pytest.raises(InfeasibleBudgetError, match=f"takes {free.size.planned:,} parameters"):
        make_plan(PROFILE, solver="threshold", share=0.9, max_params=free.size.planned - 1)


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.6, 0.8])
def test_uniform_gives_every_layer_the_same_share_to_within_a_rank(keep: float) -> None:
    # Crumbs of the large layers' budget would be many ranks for the small ones.
    profile = smooth_profile(((300, 300), (80, 96), (12, 20), (290, 300), (7, 9)))
    plan = make_plan(profile, keep=keep, solver="uniform")
    for entry in plan.layers:
        layer = entry.layer
        assert abs(entry.parameters - keep * layer.dense_cost) <= layer.cost(1)
    assert plan.budget.parameters - plan.size.planned < 600


def test_proportional_ranks_follow_the_fisher_information() -> None:
    profile = smooth_profile(((96, 64), (80, 96), (64, 96), (120, 90)))
    names = [layer.name for layer in profile.info.layers]
    trace = np.array([4.0, 1.0, 2.0, 3.0])
    scaled = {n: t / profile.fisher_rows[n].sum() for n, t in zip(names, trace, strict=True)}
    plan = make_plan(with_fisher(profile, scaled), keep=0.35, solver="proportional")
    ranks = np.array([rank or 0 for rank in plan.ranks.values()])
    assert all(0 < r < e.layer.largest_rank() for r, e in zip(ranks, plan.layers, strict=True))
    factor = ranks.sum() / trace.sum()
    assert np.abs(ranks - factor * trace).max() <= 2


def test_layers_without_fisher_information_come_last_but_the_budget_is_spent() -> None:
    profile = smooth_profile(((96, 64), (80, 96), (64, 96), (120, 90)))
    silent = with_fisher(profile, {"block.1.proj": 0.0, "block.3.proj": 0.0})
    low = make_plan(silent, keep=0.2, solver="proportional")
    assert low.ranks["block.1.proj"] == low.ranks["block.3.proj"] == 1
    high = make_plan(silent, keep=0.9, solver="proportional")
    assert high.ranks["block.0.proj"] is high.ranks["block.2.proj"] is None
    none = with_fisher(profile, dict.fromkeys(profile.fisher_rows, 0.0))
    for made in (low, high, make_plan(none, keep=0.5, solver="proportional")):
        assert made.budget.parameters - made.size.planned < 210


def test_more_fisher_information_never_lowers_a_layers_rank() -> None:
    for seed in range(5):
        profile = smooth_profile(seed=seed)
        names = [layer.name for layer in profile.info.layers]
        rng = np.random.default_rng(seed)
        even = {n: rng.uniform(0.5, 2) / profile.fisher_rows[n].sum() for n in names}
        profile = with_fisher(profile, even)
        before = make_plan(profile, keep=0.5, solver="proportional")
        for name in names:
            after = make_plan(with_fisher(profile, {name: 2.0}), keep=0.5, solver="proportional")
            costs = [
                next(e.parameters for e in plan.layers if e.layer.name == name)
                for plan in (before, after)
            ]
            assert costs[1] >= costs[0]


def test_proportional_counts_the_fisher_information_of_partners() -> None:
    made = smooth_profile(((96, 64), (80, 96), (64, 96), (120, 90)), tied=(1,))
    quiet = with_fisher(made, {"partner.1": 0.0})
    loud = with_fisher(made, {"partner.1": 1000.0})
    ranks = [
        make_plan(p, keep=0.3, solver="proportional").ranks["block.1.proj"] for p in (quiet, loud)
    ]
    assert (ranks[0] or 99) < (ranks[1] or 99)
