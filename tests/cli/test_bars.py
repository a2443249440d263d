"""One progress bar at a time, one line for each when it is done, and none of other libraries."""

import sys
from pathlib import Path

import pytest

from rankopt.cli.workers import copies
from rankopt.errors import RankoptError
from tests.cli.terminal import ESCAPES, in_terminal, screen
from tests.cli.test_cli import files, profile_file

__all__ = ["files", "profile_file"]
MEASURE = ("--model", "model", "--data", "heldout.txt", "--max-length", 16, "--examples", 4)
FOREIGN = ("Loading weights", "Writing model shards")


def bars(written: str) -> tuple[set[str], list[str]]:
    """Whatever had a bar at any time, and the lines of bars that are left on the screen."""
    ever = {
        part.partition(":")[0].strip()
        for part in ESCAPES.sub("\n", written).replace("\r", "\n").split("\n")
        if "%|" in part or "it/s" in part
    }
    return ever, [line for line in screen(written) if "%|" in line]


@pytest.mark.slow
def test_compare_leaves_one_line(files: Path, profile_file: Path) -> None:
    keeps = ("--keep", 0.9, 0.7, "--strategy", "uniform", "exact")
    code, written = in_terminal(100, files, "compare", profile_file, *keeps, *MEASURE)
    ever, left = bars(written)
    assert code == 0, written
    assert ever == {"Compare"}
    assert len(left) == 1
    assert not any(name in written for name in FOREIGN)


@pytest.mark.slow
def test_search_leaves_one_line(files: Path, profile_file: Path) -> None:
    pytest.importorskip("optuna")
    search = ("--keep", 0.6, "--solver", "search", "--trials", 9)
    code, written = in_terminal(100, files, "plan", profile_file, *search, *MEASURE)
    ever, left = bars(written)
    assert code == 0, written
    assert ever == {"Search"} and len(left) == 1
    assert "9/9" in left[0]
    assert not any(name in written for name in FOREIGN)


@pytest.mark.slow
def test_apply_shows_no_bar_of_other_libraries(files: Path, profile_file: Path) -> None:
    assert in_terminal(100, files, "plan", profile_file, "--keep", 0.7, "-o", "bars.json")[0] == 0
    given = ("apply", "model", "bars.json", "--profile", profile_file, "-o", "bars_smaller")
    code, written = in_terminal(100, files, *given)
    ever, left = bars(written)
    assert code == 0, written
    assert ever == {"Factors"} and len(left) == 1


def test_workers_are_silent_unless_they_fail(capfd: pytest.CaptureFixture[str]) -> None:
    said = "import sys; print('out'); print('here', file=sys.stderr); "
    with copies([sys.executable, "-c", said], 2):
        pass
    failing = [sys.executable, "-c", f"{said} sys.exit('error: no room')"]
    with (
        pytest.raises(RankoptError, match=r"2 of 2 workers failed.*\(no room\)"),
        copies(failing, 2),
    ):
        pass
    assert capfd.readouterr() == ("", "")
