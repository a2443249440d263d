"""``rankopt export`` and ``rankopt import``."""

import json
from pathlib import Path

import pytest

from rankopt.plan.exchange import KINDS
from rankopt.plan.lora import LoraPlan
from rankopt.plan.plan import Plan
from rankopt.plan.planner import make_plan
from tests.cli.test_cli import Run, done, run
from tests.synthetic import synthetic_profile

__all__ = ["run"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    profile = synthetic_profile()
    profile.save(tmp_path / "profile.st")
    make_plan(profile, keep=0.6, form="pairs").save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "palu"])
def test_there_and_back(run: Run, here: Path, kind: str) -> None:
    done(run("export", "plan.json", "--to", kind, "-o", "theirs"))
    code, out, err = run("import", "profile.st", "theirs", "-o", "again.json")
    assert code == 0 and "form pairs" in out
    # The plan was the exact one: none of the same size is expected to lose less.
    assert "the exact plan is expected to lose 100.0% of that" in err
    assert Plan.load(here / "again.json").ranks == Plan.load(here / "plan.json").ranks
    printed = done(run("export", "plan.json", "--to", kind))
    assert printed == (here / "theirs").read_text(encoding="utf-8")


def test_ranks_of_ones_own_are_compared(run: Run, here: Path) -> None:
    ranks = dict.fromkeys(Plan.load(here / "plan.json").ranks, 2)
    (here / "mine.json").write_text(json.dumps(ranks), encoding="utf-8")
    code, out, err = run("import", "profile.st", "mine.json", "--json")
    assert code == 0 and set(Plan.from_json(out).ranks.values()) == {2}
    share = float(err.split("lose ")[1].split("%")[0])
    assert 0.0 < share < 100.0


def test_mistakes_exit_with_2_and_replace_nothing(run: Run, here: Path) -> None:
    (here / "letter").write_text("Dear diary", encoding="utf-8")
    (here / "raw").write_bytes(b"\xff\xfe\x00")
    for arguments, said in (
        (("export", "plan.json", "--to", "xml"), "unknown format 'xml'"),
        (("export", "plan.json", "--to", "palu"), "Palu makes keys and values"),
        (("export", "plan.json", "--to", "csv", "-o", "letter"), "letter"),
        (("export", "plan.json", "--to", "csv", "-o", "plan.json"), "plan.json"),
        (("export", "profile.st", "--to", "csv"), "profile.st"),
        (("export", "plan.json", "--to", "csv", "-o", "no/where"), "no"),
        (("import", "profile.st", "letter"), "letter: the file is neither JSON nor CSV"),
        (("import", "profile.st", "raw"), "raw is not text in UTF-8"),
        (("import", "profile.st", "missing"), "cannot read missing: No such file"),
        (("import", "profile.st", "."), "cannot read ."),
        (("import", "plan.json", "plan.json"), "plan.json"),
        (("import", "profile.st", "plan.json", "--form", "x"), "unknown form 'x'"),
        (("import", "profile.st", "plan.json", "-o", "letter"), "letter"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: ") and said in err and err.count("\n") == 1, err
    assert (here / "letter").read_text(encoding="utf-8") == "Dear diary"
    assert Plan.load(here / "plan.json").solver == "exact"


def test_from_a_profile_to_adapters(run: Run, here: Path) -> None:
    asked = ("plan", "profile.st", "--for", "lora", "--max-params", "2e2", "-o", "lora.json")
    out = done(run(*asked))
    plan = LoraPlan.load(here / "lora.json")
    assert plan.budget == 200 and f"{plan.parameters} trainable parameters" in out
    config = json.loads(done(run("export", "lora.json", "--to", "peft")))
    assert set(config["target_modules"]) == {name for name, rank in plan.ranks.items() if rank}
    assert config["rank_pattern"] == config["alpha_pattern"]
    printed = done(run("plan", "profile.st", "--for", "lora", "--like-rank", "2", "--json"))
    assert LoraPlan.from_json(printed).objective == "total"
    before = (here / "lora.json").read_bytes()
    for arguments, said in (
        (("--for", "lora"), "give one budget of adapters, --max-params or --like-rank, not none"),
        (("--for", "lora", "--keep", "0.5"), "--keep belongs to --for compress"),
        (("--for", "lora", "--like-rank", "2", "--pin", "*=2"), "--pin belongs to --for compress"),
        (("--for", "lora", "--like-rank", "2", "--solver", "uniform"), "--solver uniform is for"),
        (("--for", "lora", "--max-params", "1"), "the smallest adapter has"),
        (("--for", "glue", "--keep", "0.5"), "--for is compress or lora, not 'glue'"),
        (("--keep", "0.5", "--max-rank", "3"), "--max-rank belongs to --for lora"),
        (("--keep", "0.5", "-o", "lora.json"), "lora.json exists"),
        (("--keep", "0.5", "-o", "lora.json", "--force"), "is no such file of rankopt"),
        (("--for", "lora", "--like-rank", "2", "-o", "plan.json", "--force"), "no such file"),
    ):
        code, out, err = run("plan", "profile.st", *arguments)
        assert (code, out) == (2, "") and said in err, (arguments, err)
    assert (here / "lora.json").read_bytes() == before
    for arguments in (("export", "lora.json", "--to", "asvd"), ("apply", ".", "lora.json")):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and "Traceback" not in err
