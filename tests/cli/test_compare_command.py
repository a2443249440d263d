"""``rankopt compare``: several calibrations, a file that it goes on with, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rankopt import Profile, profile_model
from rankopt.data.batches import load_batches
from rankopt.model.loading import load_model
from rankopt.results import Results
from tests import tiny
from tests.cli.test_cli import Run, done, files, run
from tests.synthetic import synthetic_profile

__all__ = ["files", "run"]


@pytest.fixture(scope="module")
def samples(files: Path) -> list[Path]:
    """Profiles of two samples of the same text."""
    model, tokenizer = load_model(str(files / "model")), tiny.tokenizer()
    found = []
    for seed in (1, 2):
        batches = load_batches(
            str(files / "train.txt"), tokenizer, "causal-lm", max_length=16, resample=seed
        )
        found.append(files / f"sample-{seed}.st")
        profile_model(model, batches, backends=("kronecker", "fwsvd")).save(found[-1])
    return found


def arguments(files: Path, *profiles: object) -> list[object]:
    return ["compare", *profiles, "--keep", 0.7, 0.5, "--strategy", "uniform", "exact",
            "--model", files / "model", "--data", files / "heldout.txt", "--max-length", 16,
            "--no-also"]  # fmt: skip


def test_samples_differ_and_are_the_same_again(
    run: Run, files: Path, samples: list[Path], tmp_path: Path
) -> None:
    first, second = map(Profile.load, samples)
    assert first.info.data_digest != second.info.data_digest
    assert first.info.examples == second.info.examples
    done(run("profile", files / "model", "--data", files / "train.txt", "--max-length", 16,
             "--resample", 1, "-o", tmp_path / "p"))  # fmt: skip
    assert Profile.load(tmp_path / "p").info.data_digest == first.info.data_digest
    code, _, err = run("profile", files / "model", "--data", files / "train.txt",
                       "--resample", -3, "-o", tmp_path / "q")  # fmt: skip
    assert code == 2 and "--resample must be a seed from 0, got -3" in err


@pytest.mark.slow
def test_backends_forms_and_calibrations_in_one_table(
    run: Run, files: Path, samples: list[Path]
) -> None:
    given = [*arguments(files, *samples), "--backend", "kronecker", "fwsvd", "--form", "pairs",
             "pivoted"]  # fmt: skip
    found = json.loads(done(run(*given, "--json")))
    names = {f"{who}/{form}@{name}" for who in ("uniform", "exact") for form in ("pairs", "pivoted")
             for name in ("kronecker", "fwsvd")}  # fmt: skip
    assert {row["strategy"] for row in found["rows"]} == names
    assert {row["calibration"] for row in found["rows"]} == {str(path) for path in samples}
    assert len(found["rows"]) == 2 * 2 * 8 and len(found["lines"]) == 2 * 8
    for line in found["lines"]:
        which = line["strategy"], line["keep"]
        losses = [row["loss"] for row in found["rows"] if (row["strategy"], row["keep"]) == which]
        assert line["loss"] == pytest.approx(sum(losses) / 2) and len(losses) == 2
    # Compared with the first exact one.
    bare = {line["strategy"] for line in found["lines"] if line["against"] is None}
    assert bare == {"exact/pairs@kronecker"}
    table = done(run(*given))
    assert all(name in table for name in ("+-", "stability", "difference", "predicted"))
    assert "predicted against measured increase over dense, Spearman: kronecker " in table


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on(
    run: Run, files: Path, samples: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "r.json"
    whole = json.loads(done(run(*arguments(files, *samples), "--json")))
    given = [str(word) for word in arguments(files, *samples)]
    child = subprocess.Popen(
        [sys.executable, "-m", "rankopt", *given, "-o", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not file.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = len(Results.load(file).plans)
    found = json.loads(done(run(*given, "-o", file, "--json")))
    assert before <= len(whole["rows"]) == len(Results.load(file).plans)
    assert [row["loss"] for row in found["rows"]] == pytest.approx(
        [row["loss"] for row in whole["rows"]]
    )
    again: Any = done(run(*given, "-o", file))
    assert "uniform" in again


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--against greedy", "--against 'greedy' is none of the strategies: uniform, exact"),
        ("--against magic", "unknown solver 'magic'"),
        ("--form cubes", "unknown form 'cubes'"),
        ("--backend pca", "no losses for backend 'pca'"),
        ("-o {profile}", "is read, too"),
        ("-o {data}", "is read, too"),
        ("-o {folder}/none/r.json", "does not exist"),
        ("-o {folder}/mine.json", "no such file of rankopt"),
    ],
)
def test_mistakes_are_told_before_the_long_work(
    run: Run, files: Path, samples: list[Path], tmp_path: Path, words: str, said: str
) -> None:
    (tmp_path / "mine.json").write_text('{"a": 1}')
    places = {"profile": samples[0], "data": files / "heldout.txt", "folder": tmp_path}
    code, out, err = run(*arguments(files, samples[0]), *words.format(**places).split())
    assert (code, out) == (2, "") and said in err and "Traceback" not in err
    assert (tmp_path / "mine.json").read_text() == '{"a": 1}'


def test_profiles_that_do_not_belong_together_are_refused(
    run: Run, files: Path, samples: list[Path], tmp_path: Path
) -> None:
    synthetic_profile().save(tmp_path / "other.st")
    code, _, err = run(*arguments(files, samples[0], tmp_path / "other.st"))
    assert code == 2 and "profiles of different models" in err
    code, _, err = run(*arguments(files, samples[0], samples[0]))
    assert code == 2 and "a profile is given twice: " in err
    code, _, err = run("compare", *samples, "--keep", 0.5)
    assert code == 2 and "2 profiles are compared by what their plans measure: add --model" in err
    for option in ("--against", "-o"):
        code, _, err = run("compare", samples[0], "--keep", 0.5, option, "exact")
        assert code == 2 and "belongs to --model and --data" in err


def test_unequal_budgets_are_told(run: Run, tmp_path: Path) -> None:
    synthetic_profile().save(tmp_path / "p.st")
    code, _, err = run("compare", tmp_path / "p.st", "--keep", 0.9, "--strategy", "uniform",
                       "exact", "--rank-multiple", 5)  # fmt: skip
    assert code == 0 and "at 0.9 the plans do not spend alike: exact keeps 84.84%, uniform" in err
