"""``--bits`` as it is typed: from data to a folder of rounded weights."""

import json
from pathlib import Path

import pytest

from rankopt import Plan, Profile
from tests import tiny
from tests.cli.test_cli import Run, done, run

__all__ = ["run"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.saved(tiny.llama(hidden_size=64, intermediate_size=96), tmp_path / "model")
    (tmp_path / "train.txt").write_text(tiny.text(n % 12 for n in range(700)))
    return tmp_path


def test_bits_from_the_data_to_the_folder(folder: Path, run: Run) -> None:
    pytest.importorskip("torchao", exc_type=ImportError)
    data = ("--data", "train.txt", "--max-length", 16, "--batch-size", 4)
    out = done(run("profile", "model", *data, "--bits", 8, 4, "-o", "p.st"))
    assert "rounding    to 8 and 4 bits" in out
    profile = Profile.load("p.st")
    assert profile.info.bits == (8, 4)
    budget = profile.info.planned_bytes // 6
    asked = ("plan", "p.st", "--max-bytes", budget)
    out = done(run(*asked, "--bits", 4, 8, "-o", "plan.json"))
    assert "in 8 bits" in out or "in 4 bits" in out
    plan = Plan.load("plan.json")
    assert json.loads(done(run(*asked, "--bits", 8, 4, "--json"))) == json.loads(plan.to_json())
    done(run("apply", "model", "plan.json", "--profile", "p.st", "-o", "small"))
    small, dense = (
        sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        for name in ("small", "model")
    )
    saved = profile.info.planned_bytes - plan.limits[0].spent
    assert abs((dense - small) - saved) < 0.02 * dense + 4000  # headers differ
    done(run("evaluate", "small", *data))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--keep", 0.5, "--bits", 8), "bits need --max-bytes"),
        (("--max-bytes", "9kB", "--bits", 3), "bits are 8 or 4"),
        (("--max-bytes", "9kB", "--bits", 8), "profile again with --bits 8"),
        (("--for", "lora", "--max-params", 99, "--bits", 8), "--bits"),
        (("--keep", 0.5, "--bits", 8, "--solver", "search"), "--bits"),
    ],
)
def test_mistakes(folder: Path, run: Run, arguments: tuple[object, ...], says: str) -> None:
    from tests.synthetic import synthetic_profile

    synthetic_profile().save("p.st")
    code, _, err = run("plan", "p.st", *arguments)
    assert code == 2 and says in err and "Traceback" not in err


def test_other_bits_are_refused_before_the_model_is_measured(folder: Path, run: Run) -> None:
    code, _, err = run("profile", "model", "--data", "train.txt", "--bits", 5, "-o", "p.st")
    assert code == 2 and "rounded to 8 or 4 bits, not to 5" in err
    assert not Path("p.st").exists()
