"""The search on a model: its losses are the model's own, and the model is left as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rankopt import Plan, profile_model
from rankopt.apply.apply import applied
from rankopt.cli.workers import copies, with_workers
from rankopt.errors import BudgetError, InfeasibleBudgetError, OptionError, RankoptError
from rankopt.evaluation.evaluation import evaluate
from rankopt.evaluation.search import PLANS, search_plan
from rankopt.model.loading import load_model
from rankopt.plan.allocation import allocation
from rankopt.plan.budget import find_budget
from rankopt.plan.planner import choose, make_plan
from tests import tiny

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def made() -> Any:
    model = tiny.llama()
    profile = profile_model(model, tiny.batches(model))
    return model, profile, tiny.batches(model, count=3, size=4)


def loss_of(made: Any, plan: Plan) -> float:
    model, profile, batches = made
    with applied(model, plan, profile) as compressed:
        return evaluate(compressed, batches).loss


@pytest.mark.parametrize("objective", ["total", "layerwise"])
def test_measured_loss_is_the_models_and_no_worse_than_any_plan(made: Any, objective: Any) -> None:
    model, profile, batches = made
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    searched = search_plan(
        model, profile, batches, trials=16, keep=0.6, objective=objective, progress=False
    )
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    assert searched.dense.loss == evaluate(model, batches).loss
    plan, found = searched.plan, searched.found
    assert loss_of(made, plan) == pytest.approx(found.loss, rel=1e-6)
    by_name = {name: t.loss for t in found.trials for name in t.source.split(" = ")}
    for text in PLANS:
        solver, _, of = text.partition("/")
        other = make_plan(profile, keep=0.6, solver=solver, objective=of or "total")
        assert loss_of(made, other) == pytest.approx(by_name[text], rel=1e-6)
        assert found.loss <= by_name[text]
    assert found.plan_loss == min(t.loss for t in found.trials if t.source != "cmaes")
    assert (plan.solver, plan.objective) == ("search", objective)
    assert plan.size.planned <= plan.budget.parameters
    assert Plan.from_json(plan.to_json()) == plan
    assert f"{found.improvement:.6g} less than the best of the other plans" in str(searched)
    assert "16 trials" in str(searched)


def test_search_goes_on_in_its_file_and_not_on_other_data(made: Any, tmp_path: Path) -> None:
    model, profile, batches = made
    settings = {"keep": 0.6, "plans": ("uniform", "greedy"), "storage": tmp_path / "s.journal"}
    first = search_plan(model, profile, batches, trials=4, **settings)
    more = search_plan(model, profile, batches, trials=7, **settings)
    assert (first.found.measured_now, more.found.measured_now) == (4, 3)
    assert more.found.trials[:4] == first.found.trials
    for other in (batches[:2], [batches[1], batches[0], batches[2]]):
        with pytest.raises(RankoptError, match="search with another data set"):
            search_plan(model, profile, other, trials=8, **settings)
    with pytest.raises(RankoptError, match=r"another budget \(keep=0.6, now keep=0.61\)"):
        search_plan(model, profile, batches, trials=8, **{**settings, "keep": 0.61})


@pytest.mark.parametrize("objective", ["total", "layerwise"])
def test_what_is_chosen_are_the_plans_ranks_whatever_the_objective(
    made: Any, objective: Any
) -> None:
    """A choice under one objective is an option list's index under every other."""
    profile = made[1]
    offered = allocation(profile, "kronecker", "nats", "total", 2)
    plan = make_plan(profile, keep=0.6, rank_multiple=2, objective=objective)
    budget = find_budget(profile.info, keep=0.6)
    _, chosen = choose(profile, budget, rank_multiple=2, objective=objective)
    assert offered.ranks_of(chosen.choice) == tuple(plan.ranks.values())


def test_pinned_layers_are_the_same_in_every_trial(made: Any, tmp_path: Path) -> None:
    model, profile, batches = made
    first = profile.info.layers[0].name
    settings = {"keep": 0.6, "plans": ("uniform", "exact"), "storage": tmp_path / "s.journal"}
    searched = search_plan(model, profile, batches, trials=5, pins={first: 2}, **settings)
    assert searched.plan.pinned == (first,) and searched.plan.ranks[first] == 2
    assert len({trial.choice[0] for trial in searched.found.trials}) == 1
    with pytest.raises(RankoptError, match="search with"):
        search_plan(model, profile, batches, trials=5, pins={first: 3}, **settings)


def test_what_cannot_be_searched_is_refused(made: Any, tmp_path: Path) -> None:
    model, profile, batches = made
    with pytest.raises(BudgetError, match="a budget is needed"):
        search_plan(model, profile, batches)
    with pytest.raises(OptionError, match="objective total or layerwise, not maxmin"):
        search_plan(model, profile, batches, keep=0.6, objective="maxmin")
    with pytest.raises(RankoptError, match="1 trials are too few"):
        search_plan(model, profile, batches, keep=0.6, trials=1)
    with pytest.raises(InfeasibleBudgetError, match="smallest reachable"):
        search_plan(model, profile, batches, keep=0.001)
    with pytest.raises(OptionError, match="unknown sampler 'tea'"):
        search_plan(model, profile, batches, keep=0.6, sampler="tea")
    with pytest.raises(OptionError, match="unknown solver 'magic'; known: exact"):
        search_plan(model, profile, batches, keep=0.6, solver="magic")
    (tmp_path / "s").write_text("no journal\n")
    with pytest.raises(RankoptError, match=r"s is not the journal of a search"):
        search_plan(model, profile, batches, keep=0.6, storage=tmp_path / "s")


def test_copies_are_waited_for_and_their_failure_is_told(tmp_path: Path) -> None:
    with copies(["sh", "-c", f"sleep 0.2; touch {tmp_path}/$$"], 2):
        assert not list(tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(RankoptError, match="2 of 2 workers failed"), copies(["false"], 2):
        pass
    with pytest.raises(KeyError), copies(["sleep", "100"], 1):
        raise KeyError


@pytest.mark.parametrize(("count", "storage"), [(0, "s"), (2, None)])
def test_workers_that_cannot_share_a_search_are_refused(count: int, storage: str | None) -> None:
    with pytest.raises(OptionError, match="worker"), with_workers(count, storage):
        pass


def test_an_unknown_dtype_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(OptionError, match="unknown dtype 'int4'; known: auto"):
        load_model("nowhere", "int4")
