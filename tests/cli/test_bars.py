"""One progress bar at a time, one line for each when it is done, and none of other libraries."""

import sys
from pathlib import Path

import pytest

from rankopt.cli.workers import copies
from rankopt.errors import RankoptError
from tests.cli.terminal import ESCAPES, in_terminal, screen
from tests.cli.test_cli import Run, files, profile_file, run

__all__ = ["files", "profile_file", "run"]
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
    assert ever == {"Weights"} and len(left) == 1


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


def test_quiet_shows_results_only(run: Run, files: Path, tmp_path: Path) -> None:
    data = ("--data", files / "train.txt", "--max-length", 16)
    path = tmp_path / "p.st"
    code, out, err = run("-q", "profile", files / "model", *data, "-o", path)
    assert (code, err) == (0, "") and "planned " in out
    code, out, err = run("profile", files / "model", *data, "-o", path, "--force")
    assert code == 0 and "profile written to" in err, "the next call is not quiet"
    code, out, err = run("profile", files / "model", "-q", *data, "-o", path, "--force")
    assert (code, err) == (0, "") and "planned " in out
    code, out, err = run("--quiet", "plan", path, "--keep", 7)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_verbose_shows_where_an_error_comes_from(run: Run, tmp_path: Path) -> None:
    code, _, err = run("-v", "plan", tmp_path / "missing", "--keep", 0.5)
    assert code == 2 and err.startswith("Traceback") and err.splitlines()[-1].startswith("error: ")
    assert run("plan", tmp_path / "missing", "--keep", 0.5, "--verbose") == (code, "", err)
    code, _, err = run("plan", tmp_path / "missing", "--keep", 0.5)
    assert code == 2 and "Traceback" not in err


@pytest.mark.slow
def test_quiet_shows_no_bar_in_a_terminal(files: Path, tmp_path: Path) -> None:
    data = ("--data", "train.txt", "--max-length", 16)
    code, written = in_terminal(100, files, "-q", "profile", "model", *data, "-o", tmp_path / "p")
    ever, left = bars(written)
    assert code == 0, written
    assert not ever and not left and "profile written" not in written
