"""A checkpoint whose compression was stopped is gone on with, and only what is ours."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rankopt import Plan, Profile, RankoptError, make_plan
from rankopt.apply.apply import Planned
from rankopt.apply.shards import JOURNAL, Shards
from rankopt.apply.streaming import apply_streamed
from rankopt.model.loading import leaves_on_disk
from rankopt.temporary import make_temporary_folder
from tests.apply.test_streaming import APPLY, files_of, loaded, streamed
from tests.apply.test_streaming import llama as llama
from tests.apply.test_streaming import made as made
from tests.apply.test_streaming import project as project
from tests.apply.test_streaming import wanted as wanted

pytestmark = pytest.mark.skipif(
    not leaves_on_disk(), reason="this transformers or accelerate does not leave all on disk"
)


class Killed(BaseException):
    pass


def stopped(folder: Path, plan: Plan, profile: Profile, after: int) -> int:
    """Stop after so many layers have been factorised; how many pieces are written."""
    calls, compute = 0, Planned.low_rank

    def some(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed
        return compute(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planned, "low_rank", some)
        with pytest.raises(Killed):
            streamed(folder, plan, profile)
    return (folder / "small.partial" / JOURNAL).read_text().count("\n")


def test_what_is_whole_is_not_made_again(
    llama: tuple[Path, Plan, Profile],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wanted: dict[str, bytes],
) -> None:
    folder, plan, _ = llama
    pieces = stopped(*llama, after=3)
    assert pieces >= 3 and not (folder / "small").exists()
    low = [name for name, rank in plan.ranks.items() if rank is not None]
    made, compute = [], Planned.low_rank
    monkeypatch.setattr(Planned, "low_rank", lambda *a: (made.append(a[1]), compute(*a))[1])
    assert streamed(*llama) == wanted
    assert len(low) > 4 and len(made) == len(set(made)) == len(low) - 3
    assert f"going on after {pieces} pieces" in capsys.readouterr().err
    assert not (folder / "small.partial").exists()


def test_what_was_damaged_meanwhile_is_made_again(
    llama: tuple[Path, Plan, Profile], wanted: dict[str, bytes]
) -> None:
    folder, plan, _ = llama
    stopped(*llama, after=3)
    partial = folder / "small.partial"
    first = next(name for name, rank in plan.ranks.items() if rank is not None)
    with safe_open(partial / "model.safetensors", framework="pt") as file:
        up = file.get_tensor(f"{first}.up.weight")
    content = (partial / "model.safetensors").read_bytes()
    place = content.index(up.contiguous().numpy().tobytes())
    (partial / "model.safetensors").write_bytes(content[:place] + b"\x42" + content[place + 1 :])
    journal = (partial / JOURNAL).read_text()
    (partial / JOURNAL).write_text(journal + '\n{"piece": "model.no')
    assert streamed(*llama) == wanted


@pytest.mark.parametrize("when", ["before the journal", "after it"])
def test_a_kill_at_either_end_is_gone_on_from(
    when: str, llama: tuple[Path, Plan, Profile], wanted: dict[str, bytes], made: Any
) -> None:
    partial = llama[0] / "small.partial"
    if when == "after it":
        shutil.copytree(made[0] / "whole", partial)
    else:
        partial.mkdir()
        left, remove = make_temporary_folder(partial)
        remove()
        left.mkdir()
    assert streamed(*llama) == wanted


@pytest.mark.parametrize("what", ["plan", "model", "allow_other_weights"])
def test_a_partial_folder_of_something_else_is_not_gone_on_with(
    what: str, llama: tuple[Path, Plan, Profile]
) -> None:
    folder, plan, profile = llama
    stopped(*llama, after=2)
    before = files_of(folder / "small.partial")
    how: dict[str, Any] = {}
    if what == "plan":
        plan = make_plan(profile, keep=0.5)
    elif what == "model":
        os.utime(next((folder / "dense").glob("*.safetensors")))
    else:
        how[what] = True
    with pytest.raises(RankoptError, match=rf"small\.partial was begun with another {what}"):
        apply_streamed(loaded(folder), plan, profile, folder / "small", **how)
    assert files_of(folder / "small.partial") == before


@pytest.mark.parametrize("what", ["file", "folder", "link", "begun"])
def test_a_partial_of_somebody_elses_stays(what: str, llama: tuple[Path, Plan, Profile]) -> None:
    folder, plan, profile = llama
    partial = folder / "small.partial"
    if what == "file":
        partial.write_text("half a letter")
    elif what == "link":
        partial.symlink_to(folder / "dense")
    else:
        partial.mkdir()
        name = JOURNAL if what == "begun" else "letter.txt"
        (partial / name).write_text('{"format": "other", "settings": {}}')
    with pytest.raises(RankoptError, match=r"small\.partial exists and is no model that rankopt"):
        apply_streamed(loaded(folder), plan, profile, folder / "small")
    left = partial if what == "file" else folder / "dense" if what == "link" else partial
    assert left.exists() and not (folder / "small").exists()


def test_two_at_a_time_are_refused(llama: tuple[Path, Plan, Profile]) -> None:
    folder, plan, profile = llama
    tensors = {"a": torch.zeros(2)}
    with (
        Shards(folder / "small.partial", tensors, {}),
        pytest.raises(RankoptError, match="is being written by another process"),
    ):
        Shards(folder / "small.partial", tensors, {}).__enter__()
    shutil.rmtree(folder / "small.partial")
    streamed(folder, plan, profile)


@pytest.mark.slow
def test_a_killed_command_goes_on(project: Path) -> None:
    command = [sys.executable, "-m", "rankopt", *f"{APPLY} small".split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    journal = project / "small.partial" / JOURNAL
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if journal.exists() and journal.read_text().count("\n") >= 2:
            process.kill()
        time.sleep(0.001)
    if process.wait() == 0:
        pytest.skip("it was done before it could be killed")
    assert not (project / "small").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "going on after" in again.stderr
    files = json.loads((project / "small" / "rankopt_files.json").read_text())["files"]
    assert {name: (project / "small" / name).stat().st_size for name in files} == files
    assert not list(project.glob("*.partial")) and not list(project.glob(".rankopt*"))
