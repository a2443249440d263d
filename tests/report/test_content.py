"""What a report says is what profile, plans and results say."""

import math

import numpy as np
import pytest

from rankopt import make_plan
from rankopt.errors import OptionError, PlanError, ResultsError
from rankopt.layers import Layer
from rankopt.plan.allocation import allocation
from rankopt.plan.compare import Strategy
from rankopt.report.content import content_of, layer_data, ranks_data
from rankopt.report.places import blocks_of, kinds_of, places_of
from rankopt.report.views import CURVE_POINTS, thinned
from rankopt.results.summary import prediction, summarise
from rankopt_solvers import frontier
from tests.report import made
from tests.synthetic import full_profile, synthetic_profile


def layer(name: str, kind: str) -> Layer:
    return Layer(name=name, out_features=2, in_features=2, kind=kind, itemsize=4, digest="")


def test_plans_lie_on_the_frontier_or_above_it() -> None:
    profile = made.transformer()
    content = content_of(profile, made.plans(profile), None)
    data = content["views"][0]["frontier"]
    swept = frontier(allocation(profile).problem(0))
    for point in data["frontier"]:
        budget = round(point["share"] * profile.info.planned_parameters)
        assert swept.value(budget) == pytest.approx(point["loss"], rel=2e-3)
    for point, plan in zip(data["plans"], made.plans(profile).values(), strict=True):
        assert point["loss"] == pytest.approx(plan.certificate.loss, rel=1e-9)
        assert point["share"] == plan.size.planned / plan.size.planned_dense
        assert point["loss"] >= swept.bound(plan.size.planned) * (1 - 1e-9)


def test_layers_have_the_ranks_shares_and_margins_of_their_plans() -> None:
    profile = made.transformer()
    plans = made.plans(profile)
    content = content_of(profile, plans, None)
    for found, plan in zip(content["plans"], plans.values(), strict=True):
        assert found["ranks"] == [entry.rank for entry in plan.layers]
        for k, entry in enumerate(plan.layers):
            share = entry.parameters / entry.layer.dense_cost
            assert found["kept"][k] == pytest.approx(share, rel=1e-3)
            assert found["retained"][k] == pytest.approx(entry.retained, rel=1e-4)
            assert found["margins"][k] == pytest.approx(entry.margin, rel=1e-2)
    cells = ranks_data(content, 0)["cells"]
    assert len(cells) == 16
    head = next(cell for cell in cells if cell["name"] == "lm_head")
    assert (head["block"], head["kind"]) == ("none", "lm_head")


def test_curves_are_the_profile_s_and_marks_lie_on_them() -> None:
    profile = made.transformer(shapes=((200, 150), (8, 24), (60, 24), (24, 60)))
    content = content_of(profile, made.plans(profile), None)
    factors = profile.backend().find_scale().factors
    for k, each in enumerate(profile.info.layers):
        curve = profile.loss_curve("fwsvd", each.name)
        drawn = content["views"][0]["curves"][k]
        assert 2 <= len(drawn["rank"]) <= CURVE_POINTS
        exact = curve.at(np.array(drawn["rank"])) * factors[k]
        np.testing.assert_allclose(drawn["loss"], exact, rtol=1e-3)
        for mark in layer_data(content, 0, k)["marks"]:
            lost = factors[k] * curve.lost(mark["rank"])
            assert mark["loss"] == pytest.approx(lost, rel=1e-3)


def test_thinning_keeps_the_ends_and_follows_what_is_steep() -> None:
    ranks = np.arange(2000.0)
    losses = np.where(ranks < 1500, np.exp(-ranks / 400), 1e-9 * np.exp(-ranks / 20))
    kept = thinned(ranks, losses, 40)
    assert kept[0] == 0 and kept[-1] == 1999 and len(kept) <= 40
    between = np.interp(ranks, ranks[kept], np.log(losses[kept]))
    away = np.abs(between - np.log(losses)) / np.ptp(np.log(losses))
    assert np.quantile(away, 0.98) < 0.02 < away.max() + 0.02


def test_other_backends_have_views_and_plans_of_theirs() -> None:
    profile = full_profile()
    plans = {
        "own": make_plan(profile, keep=0.7, scale="sum"),
        "other": make_plan(profile, keep=0.6, backend="svd"),
    }
    content = content_of(profile, plans, None)
    names = [view["name"] for view in content["views"]]
    assert names == ["fwsvd, scale sum", "svd, scale frobenius", "fwsvd, scale nats"]
    own, other = content["plans"]
    assert [each is None for each in own["losses"]] == [False, True, False]
    assert [each is None for each in other["losses"]] == [True, False, True]
    tied = profile.info.layers[1]
    assert content["layers"][1]["members"] == [tied.name, "partner.1"]
    rank = plans["own"].ranks[tied.name]
    assert own["kept"][1] == pytest.approx(tied.cost(rank) / tied.dense_cost, rel=1e-3)


@pytest.mark.parametrize("objective", ["layerwise", "maxmin"])
def test_plans_for_other_objectives_are_seen_in_the_unit_of_the_backend(objective: str) -> None:
    profile = made.transformer()
    plan = make_plan(profile, keep=0.7, objective=objective)  # type: ignore[arg-type]
    data = content_of(profile, {"p": plan}, None)["views"][0]["frontier"]
    factors = profile.backend().find_scale().factors
    lost = math.fsum(
        factor * profile.loss_curve("fwsvd", entry.layer.name).lost(entry.rank)
        for factor, entry in zip(factors, plan.layers, strict=True)
    )
    assert data["plans"][0]["loss"] == pytest.approx(lost)


def test_a_layer_that_loses_nothing_has_no_curve() -> None:
    profile = synthetic_profile(silent=(1,))
    content = content_of(profile, made.plans(profile), None)
    assert content["views"][0]["curves"][1] == {"rank": [], "loss": []}


def test_results_are_summarised_and_compared_with_predictions() -> None:
    profile = made.transformer()
    found = made.results(profile)
    against = found.plans[1].strategy
    content = content_of(profile, {}, found, against=against)
    lines = summarise(found, against)
    assert found.dense.loss is not None
    for point, line in zip(content["points"], lines, strict=True):
        assert point["measured"] == pytest.approx(1.5 * point["predicted"])
        assert point["predicted"] == line.predicted
    its = prediction(lines, found.dense.loss)["fwsvd"]
    interval = f"{its.low:.2f} to {its.high:.2f}"
    assert content["correlations"]["rows"] == [
        ["fwsvd", f"{its.rho:.2f}", interval, str(its.count)]
    ]
    table = content["measured"]
    assert table["columns"][:4] == ["strategy", "keep", "kept", "loss"]
    assert "loss of code" in table["columns"] and "corrected p" in table["columns"]
    assert [row[0] for row in table["rows"]] == ["dense", *(line.strategy for line in lines)]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert {plan["given"] for plan in content["plans"]} == {False}
    assert len({plan["name"] for plan in content["plans"]}) == len(found.plans)
    assert len(content["views"][0]["frontier"]["measured"]) == len(found.plans)


def test_results_of_several_backends_are_told_apart_and_seen_by_their_own() -> None:
    profile = made.transformer()
    found = made.results(
        profile, strategies=(Strategy("exact"), Strategy("exact", backend="svd"))
    ).model_copy()
    plans = tuple(row.model_copy(update={"strategy": "exact"}) for row in found.plans)
    content = content_of(profile, {}, found.model_copy(update={"plans": plans}))
    names = [plan["name"] for plan in content["plans"]]
    assert names[:2] == ["exact at 0.9, fwsvd", "exact at 0.9, svd"] and len(set(names)) == 6
    assert content["measured"]["columns"][:2] == ["strategy", "backend"]
    assert [len(view["frontier"]["measured"]) for view in content["views"]] == [3, 3]
    assert [row[0] for row in content["correlations"]["rows"]] == ["fwsvd"]


def test_what_is_of_another_model_or_profile_is_refused() -> None:
    profile, again = made.transformer(), made.transformer(layers=12)
    elsewhere = {"fingerprint": "e" * 64}
    foreign = make_plan(profile, keep=0.7).model_copy(update=elsewhere)
    with pytest.raises(PlanError, match="p is a plan of another model"):
        content_of(profile, {"p": foreign}, None)
    with pytest.raises(PlanError, match="p was made from another profile of this model"):
        content_of(profile, {"p": make_plan(again, keep=0.7)}, None)
    with pytest.raises(ResultsError, match="results are of another model"):
        content_of(profile, {}, made.results(profile).model_copy(update=elsewhere))
    with pytest.raises(ResultsError, match="results are of another model"):
        content_of(profile, {}, made.results(again))
    with pytest.raises(ResultsError, match="no strategy 'magic'"):
        content_of(profile, {}, made.results(profile), against="magic")
    with pytest.raises(OptionError, match="give results, too"):
        content_of(profile, {}, None, against="exact")
    with pytest.raises(OptionError, match="no layer 'nosuch' is planned"):
        content_of(profile, {}, None, layer="nosuch")


def test_places_of_layers_in_blocks_stems_and_nowhere() -> None:
    layers = [
        layer("shared", "shared"),
        layer("encoder.block.0.attn.q", "attn.q"),
        layer("decoder.block.0.attn.q", "attn.q"),
        layer("decoder.block.11.mlp.experts.3.up", "up"),
        layer("decoder.block.11.mlp.experts.4.up", "up"),
        layer(f"x.{'9' * 5000}.up", "down"),
    ]
    places = places_of(layers)
    assert blocks_of(places) == ["none", "0", "11"]
    assert kinds_of(places) == [
        "shared",
        "encoder.block: attn.q",
        "decoder.block: attn.q",
        "up",
        "down",
    ]
    assert places[3] == places[4]


def test_layers_in_one_cell_are_counted_together() -> None:
    names = ["b.0.experts.0.up", "b.0.experts.1.up", "b.1.experts.0.up", "head"]
    profile = made.renamed(synthetic_profile(), names)
    plan = make_plan(profile, keep=0.6)
    cells = ranks_data(content_of(profile, {"p": plan}, None), 0)["cells"]
    first, second = plan.layers[:2]
    share = (first.parameters + second.parameters) / (
        first.layer.dense_cost + second.layer.dense_cost
    )
    assert cells[0]["name"] == "2 layers"
    assert cells[0]["kept"] == pytest.approx(share, rel=1e-3)
    assert len(cells) == 3
