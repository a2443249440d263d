"""Forms of a low rank: what they cost, and what plans of them are."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from rankopt import OptionError, Plan, PlanError, Profile, make_plan
from rankopt.layers import DENSE, FORMS, Layer, largest_rank
from rankopt.plan.allocation import allocation
from rankopt.plan.planner import STRATEGIES
from tests.synthetic import synthetic_profile

SMALL = ((6, 4), (4, 7), (5, 5))


def pivoted(**options: Any) -> Profile:
    """A synthetic profile for the pivoted form."""
    made = synthetic_profile(**options)
    return dataclasses.replace(made, info=made.info.model_copy(update={"form": "pivoted"}))


def layer(out: int, into: int, members: int = 1) -> Layer:
    named: dict[str, Any] = {"name": "x", "kind": "x", "itemsize": 4, "digest": ""}
    partners = tuple(f"p{n}" for n in range(members - 1))
    return Layer(out_features=out, in_features=into, partners=partners, **named)


def test_the_largest_rank_is_the_last_that_saves() -> None:
    for out, into, members in itertools.product(range(1, 14), range(1, 14), range(1, 4)):
        x = layer(out, into, members)
        for form in FORMS:
            ranks = range(1, min(out, into) + 1)
            saving = [r for r in ranks if x.cost(r, form) < out * into]
            assert saving == list(range(1, len(saving) + 1))
            assert x.largest_rank(form) == len(saving), (out, into, members, form)
    # In exact integers, however large.
    assert largest_rank(2**40 + 1, 2**39 + 3, 1, "pivoted") == 2**39 + 2


def test_costs_count_degrees_of_freedom() -> None:
    x = layer(30, 12)
    for rank in range(1, 13):
        assert x.cost(rank) == rank * 42
        assert x.cost(rank, "pivoted") == rank * (42 - rank)
    assert x.cost(12, "pivoted") == x.dense_cost == x.cost(None, "pivoted")
    ranks = np.array([1, 5, DENSE])
    for form in FORMS:
        wanted = [x.cost(r, form) for r in (1, 5, None)]
        assert x.costs(ranks, form).tolist() == wanted
    assert layer(30, 12, 2).cost(3, "pivoted") == 2 * 3 * 39


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("keep", [0.7, 0.8, 0.9, 0.97])
def test_the_optimum_is_that_of_all_choices(keep: float, multiple: int) -> None:
    profile = pivoted(shapes=SMALL)
    plan = make_plan(profile, keep=keep, rank_multiple=multiple)
    assert plan.form == "pivoted" and plan.certificate.gap == 0.0
    info = profile.info.backends[0].scales[0]
    options = []
    for x, factor in zip(profile.info.layers, info.factors, strict=True):
        losses = factor * profile.loss_curve("fwsvd", x.name).losses
        ranks = range(multiple, min(x.out_features, x.in_features), multiple)
        low = [(r * (x.out_features + x.in_features - r), losses[r]) for r in ranks]
        options.append([*low, (x.dense_cost, 0.0)])
    best = min(
        sum(loss for _, loss in each)
        for each in itertools.product(*options)
        if sum(cost for cost, _ in each) <= plan.budget.parameters
    )
    assert plan.certificate.loss == pytest.approx(best, rel=1e-12)
    assert "form pivoted" in str(plan)


@pytest.mark.parametrize("solver", [*STRATEGIES, "exact", "greedy", "density", "knapsack"])
def test_every_solver_keeps_the_budget_and_gains_on_pairs(solver: str) -> None:
    profile = pivoted(tied=(1,))
    for keep in (0.4, 0.7, 0.95):
        plan = make_plan(profile, keep=keep, solver=solver)
        pairs = make_plan(profile, keep=keep, solver=solver, form="pairs")
        assert plan.size.planned <= plan.budget.parameters
        spent = [x.layer.cost(x.rank, "pivoted") for x in plan.layers]
        assert spent == [x.parameters for x in plan.layers]
        assert plan.certificate.bound <= plan.certificate.loss
        if solver in ("exact", "knapsack"):
            assert plan.certificate.loss <= pairs.certificate.loss
        if solver == "uniform":
            dense = [x.layer.dense_cost for x in plan.layers]
            steps = [x.layer.cost(1, "pivoted") for x in plan.layers]
            for cost, whole, step in zip(spent, dense, steps, strict=True):
                assert abs(cost - keep * whole) <= step


def test_proportional_ranks_follow_the_traces_in_either_form() -> None:
    profile = pivoted(shapes=((400, 400), (400, 400)), seed=3)
    trace = [profile.fisher_trace(x.name) for x in profile.info.layers]
    for form in FORMS:
        plan = make_plan(profile, keep=0.5, solver="proportional", form=form)
        small, large = plan.layers[0].rank, plan.layers[1].rank
        assert small is not None and large is not None
        assert large / small == pytest.approx(trace[1] / trace[0], rel=0.05)


def test_a_profile_says_which_form_plans_have() -> None:
    of_pairs, of_pivoted = synthetic_profile(), pivoted()
    assert make_plan(of_pairs, keep=0.5).form == "pairs"
    assert make_plan(of_pivoted, keep=0.5).form == "pivoted"
    again = make_plan(of_pivoted, keep=0.5, form="pairs")
    assert (again.form, again.ranks) == ("pairs", make_plan(of_pairs, keep=0.5).ranks)
    with pytest.raises(OptionError, match=r"made for pairs of factors.*profile again"):
        make_plan(of_pairs, keep=0.5, form="pivoted")
    with pytest.raises(OptionError, match="unknown form 'triples'; known: pairs, pivoted"):
        make_plan(of_pairs, keep=0.5, form="triples")  # type: ignore[arg-type]


def test_ranks_up_to_full_are_on_offer() -> None:
    profile = pivoted()
    offered = allocation(profile)
    for x, ranks, group in zip(profile.info.layers, offered.ranks, offered.groups, strict=True):
        full = min(x.out_features, x.in_features)
        assert ranks.tolist() == [*range(1, full), DENSE]
        assert (np.diff(group.cost) > 0).all() and group.cost[-1] == x.dense_cost
        # Each rank costs less than the one before.
        assert (np.diff(group.cost, 2) == -2).all()
    by_three = allocation(profile, rank_multiple=3)
    assert all((r[:-1] % 3 == 0).all() for r in by_three.ranks)


def test_the_form_is_in_the_file_and_held_against_the_parameters(tmp_path: Any) -> None:
    profile, path = pivoted(), tmp_path / "profile.safetensors"
    profile.save(path)
    assert Profile.load(path).info.form == "pivoted"
    assert Profile.load(path).digest() == profile.digest() != synthetic_profile().digest()
    plan = make_plan(profile, keep=0.8)
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="in the form pairs"):
        Plan.from_json(plan.to_json().replace('"form": "pivoted",', ""))
    with pytest.raises(PlanError, match="form: Input should be 'pairs' or 'pivoted'"):
        Plan.from_json(plan.to_json().replace('"form": "pivoted"', '"form": "odd"'))


def test_what_says_no_form_is_of_pairs() -> None:
    plan = make_plan(synthetic_profile(), keep=0.5)
    assert '"form"' not in plan.to_json() and Plan.from_json(plan.to_json()) == plan
    assert "form" not in synthetic_profile().info.model_dump(mode="json")
