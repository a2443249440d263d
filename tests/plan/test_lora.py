"""Plans of adapters: optimal, within the budget, and strict files."""

import copy
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rankopt
from rankopt import LoraPlan, Plan, make_lora_plan, make_plan
from rankopt.errors import BudgetError, OptionError, PlanError
from rankopt.plan.exchange import export_ranks, import_ranks
from rankopt.profile.profile import Profile
from tests.synthetic import synthetic_profile

SCHEMA = Path(rankopt.plan.__file__).with_name("lora.schema.json")
PROFILE = synthetic_profile()


def gains(profile: Profile, objective: str) -> dict[str, Any]:
    """Layer -> what each rank from 0 on gains."""
    found = {}
    info = profile.backend()
    for layer, factor in zip(profile.info.layers, info.scales[0].factors, strict=True):
        curve = profile.loss_curve(info.name, layer.name, info.scales[0].name)
        lost = curve.losses * factor if objective == "total" else curve.losses / curve.full
        found[layer.name] = lost[0] - lost
    return found


@pytest.mark.parametrize("objective", ["total", "layerwise"])
def test_no_other_ranks_gain_more(objective: Any) -> None:
    """Against every choice there is."""
    profile = synthetic_profile(((6, 5), (7, 6), (5, 8)))
    layers, gained = profile.info.layers, gains(profile, objective)
    for budget in (11, 40, 57, 1000):
        plan = make_lora_plan(profile, max_params=budget, objective=objective)
        best = max(
            sum(gained[layer.name][r] for layer, r in zip(layers, ranks, strict=True))
            for ranks in itertools.product(*(range(x.largest_rank() + 1) for x in layers))
            if sum(x.cost(r) for x, r in zip(layers, ranks, strict=True)) <= budget
        )
        found = sum(gained[name][rank] for name, rank in plan.ranks.items())
        assert found == pytest.approx(best, rel=1e-9)
        assert plan.certificate.status == "optimal"


@settings(max_examples=30, deadline=None)
@given(
    budget=st.integers(40, 4000),
    multiple=st.integers(1, 4),
    most=st.integers(4, 20),
    solver=st.sampled_from(["exact", "greedy"]),
)
def test_budget_multiples_and_the_largest_rank_are_kept(
    budget: int, multiple: int, most: int, solver: str
) -> None:
    asked: Any = {"rank_multiple": multiple, "max_rank": most, "solver": solver}
    if budget < multiple * min(layer.cost(1) for layer in PROFILE.info.layers):
        with pytest.raises(OptionError, match="no layer can be given an adapter"):
            make_lora_plan(PROFILE, max_params=budget, **asked)
        return
    plan = make_lora_plan(PROFILE, max_params=budget, **asked)
    assert plan.parameters <= budget
    assert plan.parameters == sum(
        layer.cost(plan.ranks[layer.name]) for layer in PROFILE.info.layers
    )
    assert all(rank <= most and rank % multiple == 0 for rank in plan.ranks.values())
    assert plan.certificate.bound <= plan.certificate.loss


def test_like_rank_is_what_the_rank_costs_everywhere() -> None:
    plan = make_lora_plan(PROFILE, like_rank=2, objective="layerwise")
    assert plan.budget == sum(layer.cost(2) for layer in PROFILE.info.layers)
    alike = sum(gain[2] for gain in gains(PROFILE, "layerwise").values())
    chosen = gains(PROFILE, "layerwise")
    assert sum(chosen[name][rank] for name, rank in plan.ranks.items()) >= alike
    assert len(set(plan.ranks.values())) > 1


def test_a_layer_may_get_none() -> None:
    plan = make_lora_plan(PROFILE, max_params=min(x.cost(1) for x in PROFILE.info.layers))
    assert sorted(plan.ranks.values())[-2:] == [0, 1]


def test_thousands_of_layers_take_seconds() -> None:
    rng = np.random.default_rng(0)
    shapes = [tuple(rng.choice([64, 96, 128, 256], 2).tolist()) for _ in range(3000)]
    profile = synthetic_profile(tuple(shapes))
    start = time.perf_counter()
    plan = make_lora_plan(profile, like_rank=8)
    text = export_ranks(plan, "peft")
    assert time.perf_counter() - start < 5.0
    assert plan.certificate.gap < 1e-3 and plan.parameters <= plan.budget
    assert len(json.loads(text)["target_modules"]) == sum(r > 0 for r in plan.ranks.values())


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({}, BudgetError, "max_params or like_rank, not none"),
        ({"max_params": 100, "like_rank": 2}, BudgetError, "not both"),
        ({"max_params": 0}, BudgetError, "above 0"),
        ({"max_params": 10.5}, BudgetError, "whole number"),
        ({"like_rank": -1}, BudgetError, "like_rank"),
        ({"max_params": 3}, OptionError, "the smallest adapter has"),
        ({"like_rank": 2, "max_rank": 1, "rank_multiple": 2}, OptionError, "max_rank=1"),
        ({"like_rank": 2, "max_rank": 0}, OptionError, "max_rank"),
        ({"like_rank": 2, "objective": "maxmin"}, OptionError, "layerwise"),
        ({"like_rank": 2, "solver": "uniform"}, OptionError, "uniform"),
        ({"like_rank": 2, "solver": "greedy", "time_limit": 3}, OptionError, "time_limit"),
        ({"like_rank": 2, "scale": "furlongs"}, OptionError, "furlongs"),
    ],
)
def test_mistakes_are_named(asked: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make_lora_plan(PROFILE, **asked)


def test_files_are_strict_and_survive(tmp_path: Path) -> None:
    plan = make_lora_plan(PROFILE, like_rank=3, rank_multiple=2, max_rank=8)
    plan.save(tmp_path / "lora.json")
    assert LoraPlan.load(tmp_path / "lora.json") == plan
    content = json.loads(plan.to_json())
    place = next(k for k, entry in enumerate(content["layers"]) if entry["rank"])

    def spoilt(change: Any) -> str:
        other = copy.deepcopy(content)
        change(other)
        return json.dumps(other)

    for change, said in (
        (lambda x: x.update(parameters=x["parameters"] + 1), "the layers have"),
        (lambda x: x.update(budget=x["parameters"] - 1), "over the budget"),
        (lambda x: x.update(rank_multiple=5), "not a multiple"),
        (lambda x: x.update(max_rank=1), "larger than is offered"),
        (lambda x: x.update(more=1), "more"),
        (lambda x: x["layers"][place].update(parameters=1), "parameters, not 1"),
        (lambda x: x["layers"].append(x["layers"][0]), "planned twice"),
        (lambda x: x.update(format_version=2), "LoRA plan|plan format 2"),
    ):
        with pytest.raises(PlanError, match=said):
            LoraPlan.from_json(spoilt(change))
    with pytest.raises(PlanError, match="no LoRA plan at"):
        LoraPlan.load(tmp_path / "other.json")


def test_the_two_kinds_of_plans_are_not_taken_for_each_other() -> None:
    adapters, smaller = make_lora_plan(PROFILE, like_rank=2), make_plan(PROFILE, keep=0.6)
    with pytest.raises(PlanError, match=r"not a plan: .* but rankopt-lora-plan"):
        Plan.from_json(adapters.to_json())
    with pytest.raises(PlanError, match=r"not a LoRA plan: .* but rankopt-plan"):
        LoraPlan.from_json(smaller.to_json())
    with pytest.raises(OptionError, match="asvd has ranks of compressed layers"):
        export_ranks(adapters, "asvd")
    read = import_ranks(adapters.to_json(), PROFILE.info.layers)
    assert read == {name: rank or None for name, rank in adapters.ranks.items()}
    table = export_ranks(adapters, "csv").splitlines()
    assert table[0] == "layer,rank,parameters,reached" and len(table) == 1 + len(adapters.layers)


def test_the_published_schema_is_that_of_the_code() -> None:
    published = SCHEMA.read_text(encoding="utf-8")
    assert published == json.dumps(LoraPlan.model_json_schema(), indent=1) + "\n"
