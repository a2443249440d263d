"""Ranks go to other tools and come back as they were; files of theirs are read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rankopt.errors import OptionError, PlanError
from rankopt.plan.exchange import KINDS, export_ranks, import_ranks, imported_plan
from rankopt.plan.plan import Plan
from rankopt.plan.planner import make_plan
from rankopt.profile.profile import Profile
from tests.plan.test_forms import pivoted
from tests.synthetic import synthetic_profile


@pytest.fixture(scope="module")
def profile() -> Profile:
    return synthetic_profile()


@pytest.fixture(scope="module")
def plan(profile: Profile) -> Plan:
    """Of pairs, with a layer that stays dense."""
    first = profile.info.layers[0].name
    return make_plan(profile, keep=0.6, form="pairs", pins={first: "dense"})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "palu"])
def test_what_goes_out_comes_back(profile: Profile, plan: Plan, kind: str) -> None:
    text = export_ranks(plan, kind)
    assert text.endswith("\n")
    assert import_ranks(text, profile.info.layers) == plan.ranks
    again = imported_plan(profile, text)
    assert again.ranks == plan.ranks and again.size == plan.size
    assert again.budget.parameters == plan.size.planned
    assert again.certificate.loss == pytest.approx(plan.certificate.loss, rel=1e-12)
    assert set(again.pinned) == set(plan.ranks), "nothing was chosen"


def test_a_plan_is_read_as_its_ranks(profile: Profile, plan: Plan) -> None:
    assert import_ranks(plan.to_json(), profile.info.layers) == plan.ranks


def test_a_plan_keeps_its_form_unless_another_is_wanted() -> None:
    profile = pivoted()
    plan = make_plan(profile, keep=0.9)
    again = imported_plan(profile, plan.to_json())
    assert (again.form, again.ranks, again.size) == ("pivoted", plan.ranks, plan.size)
    with pytest.raises(OptionError, match="the largest that saves parameters in the form pairs is"):
        imported_plan(profile, plan.to_json(), form="pairs")


def test_what_is_written(profile: Profile, plan: Plan) -> None:
    low = {name: rank for name, rank in plan.ranks.items() if rank is not None}
    assert json.loads(export_ranks(plan, "asvd")) == {"truncation_ranks": low}
    shapes = {x.name: (x.out_features, x.in_features) for x in profile.info.layers}
    shares = json.loads(export_ranks(plan, "svdllm"))["ratio"]
    for name, share in shares.items():
        m, n = shapes[name]
        assert int(m * n * share / (m + n)) == low[name], "the line in SVD-LLM's script"
    rows = export_ranks(plan, "csv").splitlines()
    assert rows[0] == "layer,rank,parameters,retained" and len(rows) == len(plan.layers) + 1
    assert rows[1].split(",")[1] == "", "dense"
    lora = json.loads(export_ranks(plan, "peft"))
    assert sorted(lora["target_modules"]) == sorted(low)
    # One pattern a rank: PEFT compiles every pattern for every layer.
    assert len(lora["rank_pattern"]) == len(set(low.values())) - 1
    for name, rank in low.items():
        hits = [r for key, r in lora["rank_pattern"].items() if re.match(rf"(.*\.)?({key})$", name)]
        assert (hits or [lora["r"]]) == [rank]
    with pytest.raises(OptionError, match="unknown format 'xml'; known: json, csv, peft"):
        export_ranks(plan, "xml")
    with pytest.raises(OptionError, match="Palu makes keys and values of low rank only"):
        export_ranks(plan, "palu")
    dense = make_plan(profile, keep=1.0, pins={"*": "dense"})
    with pytest.raises(OptionError, match="no LoRA without ranks"):
        export_ranks(dense, "peft")


def of(profile: Profile, *suffixes: str) -> list[Any]:
    """Layers of a profile under other names."""
    layers = profile.info.layers[: len(suffixes)]
    return [
        layer.model_copy(update={"name": name})
        for layer, name in zip(layers, suffixes, strict=True)
    ]


def test_groups_of_heads_become_one_rank_of_no_more_parameters(profile: Profile) -> None:
    layers = of(profile, "0.k_proj", "0.v_proj")
    m, n = layers[0].out_features, layers[0].in_features
    text = json.dumps({"head_wise_ranks": {"0.k_proj": [1, 2], "0.v_proj": [2]}})
    found = import_ranks(text, layers)
    assert found["0.v_proj"] == 2
    rank, spent = found["0.k_proj"], 3 * n + 1 * m / 2 + 2 * m / 2
    assert rank is not None and rank * (m + n) <= spent < (rank + 1) * (m + n)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        # EVA writes names; AdaLoRA what it kept of each; LoRA patterns and ends of names.
        ({"r": 4, "target_modules": ["b.q", "b.v"], "rank_pattern": {"b.q": 7}}, (7, 4, None)),
        (
            {
                "r": 4,
                "target_modules": ["q", "v"],
                "rank_pattern": {
                    "base_model.model.b.q.lora_E": [True, False, True],
                    "b.v.lora_E": [False, False],
                },
            },
            (2, None, None),
        ),
        ({"r": 3, "target_modules": ["q", "x"], "rank_pattern": {r"^b\.x$": 5}}, (3, None, 5)),
        ({"r": 3, "target_modules": r".*\.[qv]", "rank_pattern": {}}, (3, 3, None)),
        ({"r": 2, "target_modules": "all-linear"}, (2, 2, 2)),
    ],
)
def test_adapters_are_read_as_peft_reads_them(
    profile: Profile, content: Any, wanted: tuple[int | None, ...]
) -> None:
    layers = of(profile, "b.q", "b.v", "b.x")
    text = json.dumps({"peft_type": "LORA", **content})
    assert tuple(import_ranks(text, layers).values()) == wanted


def test_one_share_for_all_is_svdllms(profile: Profile) -> None:
    found = import_ranks('{"ratio": 0.5}', profile.info.layers)
    for layer in profile.info.layers:
        m, n = layer.out_features, layer.in_features
        assert found[layer.name] == max(1, int(m * n * 0.5 / (m + n)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "neither JSON nor CSV"),
        ("dear diary\nit rained", "neither JSON nor CSV"),
        ("{", "not JSON"),
        ("{}", "the file has none"),
        ('{"FIRST": 0}', "layer FIRST: a rank of 1 or more"),
        ('{"FIRST": true}', "not True"),
        ('{"FIRST": 2.0}', "not 2.0"),
        ('{"FIRST": 2, "FIRST": 3}', "not JSON"),
        ('{"FIRST": 2, "other.q": 3}', "1 layers that are not planned (other.q)"),
        ("layer,rank\nFIRST,x\n", "layer FIRST: a rank of 1 or more, or none for dense, not 'x'"),
        ("layer,rank\nFIRST,1\nFIRST,2\n", "layer FIRST has two rows"),
        ('{"truncation_ranks": [1]}', "ranks are {layer: rank}, not [1]"),
        ('{"head_wise_ranks": {"FIRST": 3}}', "Palu has a list of ranks, not 3"),
        ('{"head_wise_ranks": 3}', "ranks are"),
        ('{"ratio": {"FIRST": 1.5}}', "a share between 0 and 1 is kept, not 1.5"),
        ('{"peft_type": "LORA", "target_modules": [], "r": 3}', "the file has none"),
        ('{"peft_type": "LORA", "target_modules": "(", "r": 3}', "no regular expression"),
        (
            '{"peft_type": "LORA", "target_modules": ["FIRST"], "rank_pattern": {"(": 2}}',
            "no regular expression",
        ),
        ('{"peft_type": "LORA", "target_modules": 3, "r": 3}', "target_modules"),
        ('{"peft_type": "LORA", "rank_pattern": [3], "r": 3}', "rank_pattern"),
    ],
)
def test_what_is_none_is_said(profile: Profile, text: str, said: str) -> None:
    first = profile.info.layers[0].name
    with pytest.raises(PlanError) as caught:
        import_ranks(text.replace("FIRST", first), profile.info.layers)
    assert said.replace("FIRST", first) in str(caught.value)


def test_tied_layers_have_one_rank(profile: Profile) -> None:
    layer = profile.info.layers[0].model_copy(update={"name": "head", "partners": ("table",)})
    assert import_ranks('{"head": 2, "table": 2}', [layer]) == {"head": 2}
    with pytest.raises(PlanError, match="head, table share their weight and have several ranks"):
        import_ranks('{"head": 2, "table": 3}', [layer])


def test_a_rank_that_saves_nothing_is_refused(profile: Profile, tmp_path: Path) -> None:
    first = profile.info.layers[0]
    text = json.dumps({first.name: min(first.out_features, first.in_features)})
    with pytest.raises(OptionError, match=f"layer {re.escape(first.name)} cannot have rank"):
        imported_plan(profile, text)
