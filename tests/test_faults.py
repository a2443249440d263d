"""Files that are wrong in any way end in a documented error: some of each kind.

``experiments/08_faults`` reads more than 50,000.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import fuzz
from tests.readers import READERS

#: Kinds whose reader is cheap, and how many files of each.
FEW = {"plan": 60, "profile": 60, "checkpoint": 40, "causal-lm.txt": 20}


@pytest.mark.parametrize("kind", FEW)
def test_wrong_files_end_in_documented_errors(kind: str, tmp_path: Path) -> None:
    found = fuzz(READERS[kind](), tmp_path, FEW[kind], start=1)
    assert not found.counts, found.counts
    assert found.files == sum(found.outcomes.values()) >= FEW[kind] // 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_many_wrong_files_end_in_documented_errors(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setattr("rankopt_solvers.search.workers.NOBODY_SECONDS", 0.05)
    found = fuzz(READERS[kind](), tmp_path, 40 if kind == "journal" else 200, start=2)
    assert not found.counts, found.counts


@pytest.mark.slow
@pytest.mark.parametrize("part", ["kill", "full"])
def test_what_is_interrupted_goes_on_and_leaves_nothing(part: str) -> None:
    run = Path(__file__).parents[1] / "experiments" / "08_faults" / "run.py"
    command = [sys.executable, str(run), "--only", part, "--quick"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (ended.returncode, ended.stdout.splitlines()[-1:]) == (0, ["ok"]), ended.stderr
