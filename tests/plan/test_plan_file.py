"""The plan file: strict, consistent, and readable for ever."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rankopt
from rankopt import Plan, make_plan
from rankopt.errors import PlanError
from tests.synthetic import synthetic_profile

GOLDEN = Path(__file__).parents[1] / "golden" / "plan_v1.json"
SCHEMA = Path(rankopt.plan.__file__).with_name("plan.schema.json")


@pytest.fixture
def content() -> dict[str, Any]:
    """A valid plan as JSON values."""
    made = make_plan(synthetic_profile(), keep=0.6, rank_multiple=2)
    values: dict[str, Any] = json.loads(made.to_json())
    assert values["layers"][0]["rank"] is not None
    return values


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep": 0.6},
        {"keep_total": 0.8, "solver": "uniform", "rank_multiple": 4},
        {"max_params": 2000, "objective": "maxmin", "backend": "svd"},
        {"share": 0.9, "solver": "threshold", "scale": "sum"},
    ],
)
def test_everything_survives_saving_and_loading(tmp_path: Path, arguments: dict[str, Any]) -> None:
    made = make_plan(synthetic_profile(), **arguments)
    made.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == made
    assert (tmp_path / "plan.json").read_text() == read.to_json()
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_plans_of_the_first_format_load_for_ever() -> None:
    """Never write this file again: a change that cannot read it needs a format_version 2."""
    plan = Plan.load(GOLDEN)
    assert plan.format_version == 1
    assert plan.ranks == {
        "block.0.proj": 4,
        "block.1.proj": 3,
        "block.2.proj": None,
        "block.3.proj": 3,
    }
    assert (plan.solver, plan.objective, plan.backend, plan.scale) == (
        "greedy",
        "total",
        "fwsvd",
        "nats",
    )
    assert says_all_of(json.loads(plan.to_json()), json.loads(GOLDEN.read_text(encoding="utf-8")))


def says_all_of(now: Any, then: Any) -> bool:
    """Whatever the file says is still there; fields that came later are null."""
    if isinstance(then, dict):
        later = [now[key] for key in now.keys() - then.keys()]
        return all(says_all_of(now[key], then[key]) for key in then) and not any(later)
    if isinstance(then, list):
        return len(now) == len(then) and all(map(says_all_of, now, then))
    return bool(now == then)


def test_published_schema_is_the_one_that_is_enforced() -> None:
    published = SCHEMA.read_text(encoding="utf-8")
    assert published == json.dumps(Plan.model_json_schema(), indent=1) + "\n"


def test_partners_survive_and_are_paid_for(tmp_path: Path) -> None:
    made = make_plan(synthetic_profile(tied=(1, 2)), keep=0.6)
    made.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == made
    assert read.layers[1].layer.partners == ("partner.1",)
    content = json.loads(made.to_json())
    assert content["layers"][1]["layer"]["partners"] == ["partner.1"]
    content["layers"][1]["layer"]["partners"] = []
    with pytest.raises(PlanError, match=r"layers\.1: .*block\.1\.proj.*parameters"):
        Plan.from_json(json.dumps(content))


def dropped(content: dict[str, Any], *place: Any) -> None:
    *path, last = place
    for step in path:
        content = content[step]
    del content[last]


def put(content: dict[str, Any], value: Any, *place: Any) -> None:
    *path, last = place
    for step in path:
        content = content[step]
    content[last] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: put(c, 1, "extra"), "extra: "),
        (lambda c: put(c, 1, "layers", 1, "extra"), r"layers\.1\.extra: "),
        (lambda c: put(c, 1, "layers", 1, "layer", "extra"), r"layers\.1\.layer\.extra: "),
        (lambda c: dropped(c, "solver"), "solver: "),
        (lambda c: dropped(c, "layers", 0, "rank"), r"layers\.0\.rank: "),
        (lambda c: dropped(c, "budget", "kind"), r"budget\.kind: "),
        (lambda c: put(c, 2.0, "layers", 0, "rank"), r"layers\.0\.rank: "),
        (lambda c: put(c, True, "layers", 0, "rank"), r"layers\.0\.rank: "),
        (lambda c: put(c, "2", "layers", 0, "rank"), r"layers\.0\.rank: "),
        (lambda c: put(c, 0, "layers", 0, "rank"), r"layers\.0\.rank: "),
        (lambda c: put(c, -1, "layers", 0, "rank"), r"layers\.0\.rank: "),
        (lambda c: put(c, 10, "layers", 0, "rank"), r"layers\.0: .*block\.0\.proj.*largest.*9"),
        (lambda c: put(c, 1, "layers", 0, "parameters"), r"layers\.0: .*block\.0\.proj.*not 1"),
        (lambda c: put(c, 1.5, "layers", 0, "retained"), r"layers\.0\.retained: "),
        (lambda c: put(c, -1, "layers", 2, "layer", "in_features"), r"layers\.2\.layer\.in_f"),
        (lambda c: put(c, 5, "size", "planned"), "the layers have .* not 5"),
        (lambda c: put(c, 5, "budget", "parameters"), "over the budget"),
        (lambda c: put(c, 0, "budget", "asked"), r"budget\.asked: "),
        (lambda c: put(c, "wish", "budget", "kind"), r"budget\.kind.*max_params"),
        (lambda c: put(c, 4, "rank_multiple"), "rank is not a multiple"),
        (lambda c: put(c, "best", "certificate", "status"), r"certificate\.status: "),
        (lambda c: put(c, -1.0, "certificate", "loss"), r"certificate\.loss: "),
        (lambda c: put(c, c["layers"] * 2, "layers"), "a layer is planned twice"),
        (
            lambda c: put(c, ["block.1.proj"], "layers", 2, "layer", "partners"),
            "a layer is planned twice",
        ),
        (lambda c: put(c, "ab", "layers", 2, "layer", "partners"), r"layers\.2\.layer\.partners"),
        (lambda c: put(c, [1], "layers", 2, "layer", "partners"), r"layers\.2\.layer\.partners"),
        (lambda c: put(c, [], "layers"), "layers: "),
        (lambda c: put(c, 5, "size", "planned_dense"), r"size\.planned_dense is 5; .* it is 2374"),
        (lambda c: put(c, 5, "size", "model"), r"size\.model is 5; by its layers"),
        (lambda c: put(c, 5, "size", "model_bytes"), r"size\.model_bytes is 5; by its layers"),
        (lambda c: put(c, "other", "worst_layer"), "the worst layer 'other' is not planned"),
        (lambda c: put(c, 1e300, "certificate", "bound"), r"certificate: .*above the loss"),
        (lambda c: put(c, 10**19, "layers", 0, "layer", "in_features"), "has 20 digits"),
        (lambda c: put(c, 10**3000, "budget", "parameters"), "1000000000000000000... has 3001"),
        (lambda c: put(c, 2, "format_version"), "plan format 2; this rankopt reads 1"),
        (lambda c: put(c, "1", "format_version"), "plan format '1'; this rankopt reads 1"),
        (lambda c: put(c, True, "format_version"), "plan format True"),
        (lambda c: put(c, 1.0, "format_version"), r"plan format 1\.0"),
        (lambda c: put(c, "other", "format"), "not a plan"),
        (lambda c: dropped(c, "format"), "not a plan"),
    ],
)
def test_anything_odd_is_refused_naming_the_file_and_the_place(
    tmp_path: Path,
    content: dict[str, Any],
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    before = copy.deepcopy(content)
    change(content)
    assert json.dumps(content) != json.dumps(before)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert str(caught.value).startswith(str(path))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_none_are_refused(content: dict[str, Any], constant: str) -> None:
    text = re.sub(r'"gap": [^,]+', f'"gap": {constant}', json.dumps(content))
    with pytest.raises(PlanError, match=f"here: not a plan: {constant} is not a number"):
        Plan.from_json(text, "here")


def test_number_too_large_for_a_float_is_refused(content: dict[str, Any]) -> None:
    text = re.sub(r'"loss": [^,]+', '"loss": 1e999', json.dumps(content))
    with pytest.raises(PlanError, match=r"here: certificate\.loss"):
        Plan.from_json(text, "here")


def test_repeated_key_is_refused(content: dict[str, Any]) -> None:
    text = json.dumps(content).replace('"rank": ', '"rank": 1, "rank": ', 1)
    with pytest.raises(PlanError, match="here: not a plan: the key 'rank' is repeated"):
        Plan.from_json(text, "here")


@pytest.mark.parametrize(
    "text",
    ["", "{", "rank", "[]", "null", "7", "[" * 200_000, '{"a":' * 200_000, '{"rank": 1} extra'],
)
def test_text_that_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=r"plan\.json: not a plan") as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)


def test_deeply_nested_value_inside_a_plan_is_refused(content: dict[str, Any]) -> None:
    text = json.dumps(content).replace('"exact"', "[" * 900 + "]" * 900)
    with pytest.raises(PlanError, match="here: "):
        Plan.from_json(text, "here")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b'{"format": "\xff\xfe"}')
    with pytest.raises(PlanError, match=r"plan\.json is not text"):
        Plan.load(path)


@pytest.mark.parametrize("place", ["none.json", "."])
def test_missing_file_says_how_to_make_one(tmp_path: Path, place: str) -> None:
    with pytest.raises(PlanError, match="make one with `rankopt plan`") as caught:
        Plan.load(tmp_path / place)
    assert str(tmp_path / place) in str(caught.value)


def test_enormous_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(65 * 2**20)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(PlanError, match="larger than 64 MiB"):
        Plan.load(path)


def test_summary_names_both_denominators(content: dict[str, Any]) -> None:
    plan, size = Plan.from_json(json.dumps(content)), content["size"]
    text = str(plan)
    assert f"{size['planned']:,} of {size['planned_dense']:,}" in text
    assert f"{size['model']:,} of {size['model_dense']:,}" in text
    assert content["worst_layer"] in text


def test_what_the_loss_rises_by_is_said_in_nats_whatever_was_maximised() -> None:
    """The same ranks are predicted alike; a backend without nats predicts nothing."""
    profile = synthetic_profile()
    info = profile.info
    factors = profile.backend("fwsvd").scales[0].factors
    total = make_plan(profile, keep=0.6)
    assert total.certificate.unit.startswith("nats")
    assert total.predicted == pytest.approx(total.certificate.loss * info.units / info.targets)
    for other in ({"objective": "layerwise"}, {"objective": "maxmin"}, {"scale": "sum"}):
        made = make_plan(profile, keep=0.6, **other)
        lost = sum(
            factor * profile.loss_curve("fwsvd", x.layer.name).full * (1.0 - x.retained)
            for factor, x in zip(factors, made.layers, strict=True)
        )
        assert made.predicted == pytest.approx(lost * info.units / info.targets)
        assert made.predicted >= total.predicted
        assert f"+{made.predicted:.4g} nats per target" in str(made)
    silent = make_plan(profile, keep=0.6, backend="svd")
    assert silent.predicted is None
    assert "nats per target" not in str(silent)
    assert "predicted" not in json.loads(silent.to_json())
