"""``--dry-run``: what is refused at once is refused, what would be done is said, and no more."""

import os
import re
from pathlib import Path

import pytest

from rankopt import Profile, make_plan
from rankopt.model.loading import load_model
from tests import tiny
from tests.cli.test_cli import Run, done
from tests.cli.test_cli import files as files
from tests.cli.test_cli import run as run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def profiling(files: Path, *more: object) -> list[object]:
    data = ("--data", files / "train.txt", "--max-length", 16)
    return ["profile", files / "model", *data, "-o", "p.st", *more]


def test_a_profile_is_foretold_and_nothing_is_written(run: Run, files: Path, here: Path) -> None:
    told = done(run(*profiling(files, "--backend", "kronecker", "fwsvd", "--dry-run")))
    assert os.listdir(here) == []
    assert "backends    kronecker, fwsvd\n" in told and "gone through twice\n" in told
    once = done(run(*profiling(files, "--layers-at-a-time", 3, "--dry-run")))
    # 14 layers, three at a time.
    assert "gone through 5 times\n" in once and os.listdir(here) == []
    done(run(*profiling(files, "--rounds", 1, "--no-cross-fit")))
    planned = re.compile(r"  planned .*", re.DOTALL)
    measured = planned.search(told)
    assert measured is not None
    found = Profile.load("p.st").info
    assert f"{len(found.layers)} layers, {found.planned_parameters:,} of" in measured[0]
    assert f"{found.task}: {found.estimator} Fisher per {found.unit}" in told


def test_the_memory_is_that_of_what_is_kept(run: Run, files: Path, here: Path) -> None:
    def memory(*more: object) -> float:
        told = done(run(*profiling(files, *more, "--dry-run")))
        found = re.search(r"up to (\S+) GB of sums", told)
        assert found is not None
        return float(found[1])

    plain = memory("--rounds", 1, "--no-cross-fit")
    assert memory("--rounds", 1) == pytest.approx(2 * plain, rel=0.01)
    assert memory() == pytest.approx(4 * plain, rel=0.01)
    assert memory("--backend", "fwsvd", "--no-moments", "--rounds", 1) < plain / 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--form", "square"), "unknown form 'square'"),
        (("--layers-at-a-time", 0), "--layers-at-a-time must be at least 1"),
        (("--backend", "none"), "unknown backend"),
        (("--include", "nothing.*"), "nothing.*"),
        (("--cross-fit", "--no-moments"), "--cross-fit"),
        (("--estimator", "expected"), "sampled"),
        (("--json",), "--json does not go with --dry-run"),
    ],
)
def test_what_fails_at_once_fails_before(
    run: Run, files: Path, here: Path, more: tuple[object, ...], said: str
) -> None:
    code, out, err = run(*profiling(files, "--dry-run", *more))
    assert (code, out, os.listdir(here)) == (2, "", []) and said in err


def test_an_output_that_is_no_profile_is_refused(run: Run, files: Path, here: Path) -> None:
    (here / "p.st").write_text("notes")
    code, _, err = run(*profiling(files, "--dry-run", "--force"))
    assert code == 2 and "p.st" in err and (here / "p.st").read_text() == "notes"


def test_a_refinement_is_foretold_and_nothing_is_written(run: Run, files: Path, here: Path) -> None:
    done(run(*profiling(files, "--rounds", 1, "--no-cross-fit")))
    make_plan(Profile.load("p.st"), keep=0.6).save("plan.json")
    done(run("apply", files / "model", "plan.json", "--profile", "p.st", "-o", "smaller"))
    before = sorted(os.listdir(here))
    data = ("--data", files / "train.txt", "--max-length", 16, "--batch-size", 2)
    command = ("refine", "smaller", "--dense", files / "model", *data, "-o", "refined")
    told = done(run(*command, "--passes", 3, "--dry-run"))
    # 300 words are 18 windows, 9 batches; the eighth batch is held out.
    assert "240 tokens in 8 batches, 24 steps\n" in told
    assert "30 tokens in 1 batches" in told and sorted(os.listdir(here)) == before
    model = load_model("smaller")
    learns = int(told.partition(": ")[2].split(" of ")[0].replace(",", ""))
    assert 0 < learns < sum(parameter.numel() for parameter in model.parameters())
    code, _, err = run(*command, "--passes", 0, "--dry-run")
    assert code == 2 and "passes must be at least 1" in err
    code, _, err = run("refine", files / "model", *command[2:], "--dry-run")
    assert code == 2 and "low" in err and sorted(os.listdir(here)) == before


def test_an_application_is_foretold_and_nothing_is_written(
    run: Run, files: Path, here: Path
) -> None:
    done(run(*profiling(files, "--rounds", 1, "--no-cross-fit")))
    plan = make_plan(Profile.load("p.st"), keep=0.6)
    plan.save("plan.json")
    before = sorted(os.listdir(here))
    command = ("apply", files / "model", "plan.json", "--profile", "p.st", "-o", "smaller")
    told = done(run(*command, "--dry-run"))
    low = sum(rank is not None for rank in plan.ranks.values())
    assert f": {low} of {len(plan.ranks)} planned modules would be low rank" in told
    assert f"{plan.size.model:,} of {plan.size.model_dense:,} parameters left" in told
    assert f"factors     {low} from the profile, 0 decomposed again" in told
    assert sorted(os.listdir(here)) == before
    other = tiny.saved(tiny.llama(hidden_size=48), here / "other")
    code, out, err = run("apply", other, *command[2:], "--dry-run")
    assert (code, out) == (2, "") and "smaller" not in os.listdir(here) and err.count("\n") <= 2
