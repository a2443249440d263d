"""``rankopt schema``: what every command prints with ``--json`` is what it says, and stays that."""

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest
from jsonschema import Draft202012Validator

from rankopt.cli.outputs import OUTPUTS
from tests.cli.test_cli import COMMANDS, Run, done
from tests.cli.test_cli import files as files
from tests.cli.test_cli import profile_file as profile_file
from tests.cli.test_cli import run as run

PUBLISHED = Path(__file__).parents[2] / "docs" / "reference" / "output.schema.json"


@pytest.fixture(scope="module")
def validators() -> dict[str, Draft202012Validator]:
    published = json.loads(PUBLISHED.read_text("utf-8"))
    for schema in published.values():
        Draft202012Validator.check_schema(schema)
    return {name: Draft202012Validator(schema) for name, schema in published.items()}


def fields(schema: Any) -> Any:
    """A schema without what earlier versions of pydantic do not say of dataclasses."""
    if isinstance(schema, list):
        return [fields(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    unsaid = {"additionalProperties", "description"}
    return {
        key: fields(value)
        for key, value in schema.items()
        if key not in unsaid or isinstance(value, dict)
    }


def test_the_published_schema_is_what_the_command_prints(run: Run) -> None:
    """After a change that is meant: rankopt schema > docs/reference/output.schema.json."""
    printed, published = json.loads(done(run("schema"))), json.loads(PUBLISHED.read_text("utf-8"))
    if tuple(map(int, pydantic.VERSION.split(".")[:2])) < (2, 14):
        printed, published = fields(printed), fields(published)
    assert printed == published
    assert json.loads(done(run("schema", "refine")))["title"] == "rankopt refine --json"
    code, out, err = run("schema", "apply")
    assert (code, out) == (2, "") and "'apply' prints no JSON" in err


def test_every_command_that_takes_json_has_one(run: Run) -> None:
    takes = {name for name in COMMANDS if "Print JSON." in done(run(name, "--help"))}
    assert takes == set(OUTPUTS)


@pytest.mark.slow
def test_what_is_printed_is_what_the_schema_says(
    run: Run,
    files: Path,
    profile_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    validators: dict[str, Draft202012Validator],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("--data", files / "train.txt", "--max-length", 16, "--batch-size", 2)

    def printed(name: str, *more: object) -> Any:
        found = json.loads(done(run(name, *more, "--json")))
        validators[name].validate(found)
        return found

    dense = files / "model"
    printed("profile", dense, *data, "-o", "p.st", "--rounds", 1, "--examples", 8)
    printed("plan", profile_file, "--keep", 0.6, "-o", "plan.json")
    printed("plan", profile_file, "--for", "lora", "--like-rank", 1)
    printed("plan", profile_file, "--keep", 0.6, "--max-bytes", 10**6)
    done(run("export", "plan.json", "--to", "json", "-o", "ranks.json"))
    printed("import", profile_file, "ranks.json", "--form", "pivoted")
    done(run("apply", dense, "plan.json", "--profile", profile_file, "-o", "smaller"))
    found = printed("refine", "smaller", "--dense", dense, *data, "-o", "refined",
                    "--learning-rate", 3e-3, "--passes", 3)  # fmt: skip
    assert set(found) == set(validators["refine"].schema["properties"])
    assert printed("evaluate", "refined", *data)["refined"]
    assert "refined" not in printed("evaluate", dense, *data)
    assert "lines" not in printed("compare", profile_file, "--keep", 0.6, 0.5)
    measured = printed("compare", profile_file, "--keep", 0.6, "--model", dense, *data)
    assert measured["lines"] and "perplexity" in measured["dense"]
    small = ("--calibration", 4, "--held-out", 2, "--max-length", 16, "--keep", 0.7)
    printed("demo", "--model", dense, "--output", "demo", *small)
    examined = json.loads(run("doctor", "--json")[1])
    validators["doctor"].validate(examined)


def test_what_is_wrong_is_told(validators: dict[str, Draft202012Validator]) -> None:
    right = {"settings": {}, "dense": {"loss": 1.0}, "rows": []}
    wrong = right | {"dense": {"loss": "much"}}
    for schema, bad in (("compare", {"rows": [{}]}), ("compare", {}), ("demo", wrong)):
        assert not validators[schema].is_valid(bad)
    assert validators["compare"].is_valid({"rows": [], "dense": {"loss": None, "f1": None}})
    assert not validators["compare"].is_valid({"rows": [], "dense": {"loss": 1.0, "f1": "high"}})
