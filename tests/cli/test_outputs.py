"""Outputs of the command line: what it replaces, refuses and escapes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rankopt import Plan, Profile, make_plan
from rankopt.apply.apply import apply_plan
from rankopt.apply.saving import save_model
from rankopt.cli.tables import profile_summary
from rankopt.cli.workers import worker_arguments
from rankopt.layers import LeftAlone
from rankopt.model.loading import load_model
from tests import tiny
from tests.cli.test_cli import Run, done
from tests.cli.test_cli import files as files
from tests.cli.test_cli import profile_file as profile_file
from tests.cli.test_cli import run as run
from tests.synthetic import synthetic_profile
from tests.test_replacing import at_most, contents


@pytest.fixture
def project(
    files: Path, profile_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a model, data, a profile, a plan and notes; the current one."""
    shutil.copytree(files / "model", tmp_path / "dense")
    shutil.copy(files / "train.txt", tmp_path / "train.txt")
    shutil.copy(profile_file, tmp_path / "p.st")
    make_plan(Profile.load(profile_file), keep=0.6).save(tmp_path / "plan.json")
    (tmp_path / "notes.txt").write_text("a week of notes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


APPLY = "apply dense plan.json --profile p.st --force -o"
PROFILE = "profile dense --data train.txt --force -o"
SEARCH = "plan p.st --keep 0.6 --solver search --model dense --data train.txt"


@pytest.mark.parametrize(
    "command",
    [
        f"{APPLY} .",
        f"{APPLY} ..",
        f"{APPLY} dense",
        f"{APPLY} dense/small",
        f"{APPLY} notes.txt",
        f"{APPLY} link",
        f"{PROFILE} dense/model.safetensors",
        f"{PROFILE} dense/config.json",
        f"{PROFILE} notes.txt",
        f"{PROFILE} train.txt",
        f"{PROFILE} plan.json",
        f"{PROFILE} q",  # q.partial is somebody's
        "plan p.st --keep 0.5 --force -o p.st",
        "plan p.st --keep 0.5 --force -o notes.txt",
        "plan p.st --keep 0.5 --force -o dense/config.json",
        f"{SEARCH} --storage p.st",
        f"{SEARCH} --storage notes.txt",
        f"{SEARCH} --storage plan.json",
        f"{SEARCH} --storage s --workers 2",  # s.lock is somebody's
        f"{SEARCH} --storage sqlite:///p.st",
        f"{SEARCH} --storage new -o new",
        f"{SEARCH} -o j",  # j.journal is somebody's
        f"{SEARCH} -o notes.txt --force",
        "demo -o .",
        "demo -o dense",
        "demo -o notes.txt",
    ],
)
def test_nothing_of_somebody_elses_is_touched(project: Path, run: Run, command: str) -> None:
    (project / "real").mkdir()
    (project / "link").symlink_to("real")
    (project / "q.partial").write_text("half a letter")
    (project / "s.lock").write_text("version = 1")
    (project / "j.journal").write_text("Dear diary")
    before = contents(project)
    code, out, err = run(*command.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "belongs to" not in err
    assert contents(project) == before
    assert not [name for name in os.listdir(project) if name.startswith(".")]


def test_force_replaces_what_rankopt_wrote(project: Path, run: Run) -> None:
    done(run(*f"{APPLY} small".split()))
    first = contents(project / "small")
    (project / "small" / "thesis.txt").write_text("the only copy")
    code, _, err = run(*f"{APPLY} small".split())
    assert code == 2 and "thesis.txt" in err
    (project / "small" / "thesis.txt").unlink()
    done(run(*f"{APPLY} small".split()))
    assert contents(project / "small") == first
    done(run("plan", "p.st", "--keep", 0.5, "--force", "-o", "plan.json"))
    # The plan in the folder is what it is made from.
    shutil.copy("small/rankopt_plan.json", "old.json")
    code, _, err = run("apply", "dense", "small/rankopt_plan.json", "--profile", "p.st", "--force",
                       "-o", "small")  # fmt: skip
    assert code == 2 and "rankopt_plan.json is read" in err
    # In Python, too.
    model = load_model("dense")
    apply_plan(model, Plan.load("old.json"), Profile.load("p.st"))
    before = contents(project / "dense")
    with pytest.raises(Exception, match="dense was not written by rankopt"):
        save_model(model, "dense", overwrite=True)
    assert contents(project / "dense") == before


def test_a_partial_of_somebody_elses_stays(project: Path, run: Run) -> None:
    (project / "q.partial").write_text("half a letter")
    done(run(*PROFILE.split(), "q", "--max-length", 16, "--checkpoint-every", 0))
    assert (project / "q.partial").read_text() == "half a letter"


@pytest.mark.parametrize(
    ("command", "room"),
    [
        (f"{PROFILE} q --max-length 16", 8000),
        (f"{APPLY} small", 8000),
        ("plan p.st --keep 0.5 -o q.json", 500),
    ],
)
def test_a_full_disk_is_one_line(project: Path, run: Run, command: str, room: int) -> None:
    before = contents(project)
    with at_most(room):
        code, out, err = run(*command.split())
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: cannot write ")
    assert err.endswith(": File too large\n") and "Traceback" not in err
    assert contents(project) == before


def test_what_cannot_be_written_is_known_before_the_model_is_loaded(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankopt.model.loading.load_model", None)
    long = "x" * 300
    for command in (f"{APPLY} {long}", f"{PROFILE} {long}", f"{SEARCH} -o {long}",
                    f"{SEARCH} --storage {long}", f"{APPLY} notes.txt/x", f"demo -o {long}",
                    "demo -o notes.txt/x", f"{PROFILE} {'y' * 250}"):  # fmt: skip
        code, _, err = run(*command.split())
        assert code == 2, command
        assert "File name too long" in err or "Not a directory" in err, command
        assert err.count("\n") == 1


def test_a_profile_that_may_not_be_read_is_one_line(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, *_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", denied)
    monkeypatch.setattr("rankopt.data.formats.open", denied, raising=False)
    for command in (
        "apply dense plan.json --profile p.st -o small",
        "evaluate dense --data train.txt",
    ):
        code, _, err = run(*command.split())
        assert code == 2 and "Permission denied" in err and err.count("\n") == 1
        assert "Traceback" not in err


def test_json_is_json_and_the_reason_is_said(project: Path, run: Run) -> None:
    model = load_model("dense")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    model.save_pretrained("spoilt")
    tiny.tokenizer(Path("spoilt"))
    code, out, err = run("evaluate", "spoilt", "--data", "train.txt", "--max-length", 16, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and found["loss"] is None and found["metrics"] == {"perplexity": None}
    for name in ("train.txt", "python-help"):
        assert f"\n{name}: loss is NaN (batch 1, row 1: example 1)\n" in err
    text = done(run("evaluate", "spoilt", "--data", "train.txt", "--max-length", 16))
    assert "| nan |" in text.replace("  ", "") or "nan" in text
    for command in (
        "compare p.st --keep 0.6 --strategy uniform",
        "plan p.st --keep 0.6 --solver search",
    ):
        code, out, err = run(*command.split(), "--model", "spoilt", "--data", "train.txt")
        assert code == 2 and out == ""
        assert "train.txt: the dense model's loss is NaN (batch 1, row 1: example 1)" in err


def test_names_from_files_are_escaped(tmp_path: Path, run: Run) -> None:
    evil = "blocks.0.[red]a\x1b[31m\nerror: b"
    escaped = r"blocks.0.[red]a\u001b[31m\u000aerror: b"
    profile = synthetic_profile()
    made = make_plan(profile, keep=0.5)
    shown = str(made.model_copy(update={"worst_layer": evil, "solver": "x\x1b]0;title\x07"}))
    assert "\x1b" not in shown and "\x07" not in shown and f"({escaped})" in shown
    assert len(shown.splitlines()) == len(str(made).splitlines())
    left = LeftAlone(name=evil, module="M\x9b", parameters=3, reason="r\x1bc")
    info = profile.info.model_copy(update={"left_alone": (left,)})
    summary = profile_summary(dataclasses.replace(profile, info=info))
    assert f"{escaped} (M\\u009b, 3): r\\u001bc" in summary
    code, out, err = run("plan", tmp_path / "p\x1b[31m", "--keep", 0.5)
    assert code == 2 and r"p\u001b[31m" in err and "\x1b" not in err + out


def command_line(*arguments: object, **how: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "rankopt", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=60, check=False, **how)


def test_a_reader_who_has_seen_enough_and_a_full_stdout(project: Path) -> None:
    arguments = ("compare", "p.st", "--keep", 0.6, "--strategy", "uniform")
    for given in (arguments, ("plan", "p.st", "--keep", 0.5, "--json")):
        reading, writing = os.pipe()
        os.close(reading)
        found = command_line(*given, stdout=writing)
        os.close(writing)
        assert (found.returncode, found.stderr) == (0, b"")
        with open("/dev/full", "wb") as full:
            found = command_line(*given, stdout=full)
        assert found.returncode == 2
        assert found.stderr == b"error: cannot write the output: No space left on device\n"


def test_workers_have_no_output_of_their_own() -> None:
    given = [
        "plan",
        "p",
        "-oout",
        "--force",
        "-o",
        "x",
        "--output=y",
        "--workers",
        "2",
        "--keep",
        "1",
    ]
    assert worker_arguments(given, "s") == ["plan", "p", "--keep", "1", "--storage", "s"]


def test_workers_are_this_command_without_output_and_workers() -> None:
    given = ["plan", "p.st", "--keep", "0.8", "-o", "plan.json", "--workers=2", "--storage", "x"]
    assert worker_arguments(given, "s.journal") == [
        "plan", "p.st", "--keep", "0.8", "--storage", "s.journal",
    ]  # fmt: skip
