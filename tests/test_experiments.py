"""Experiments: tables that are measured row by row, and what is said of how they were made."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.parent for path in (ROOT / "experiments").glob("*/results.json"))


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The modules beside the folders of the experiments."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import published
    import resumable

    yield {"published": published, "resumable": resumable}
    for name in ("published", "resumable"):
        del sys.modules[name]


@dataclasses.dataclass(frozen=True)
class Row:
    keep: float


def measuring(
    shared: dict[str, Any], here: Path, folder: Path, dense: float = 1.0
) -> tuple[Callable[..., dict[str, Any]], list[float]]:
    """Measure these rows, and which of them were measured."""
    here.mkdir(exist_ok=True)
    asked: list[float] = []

    def measure(row: Row) -> dict[str, float]:
        asked.append(row.keep)
        return {"loss": dense + row.keep}

    def run(*keeps: float, **settings: Any) -> dict[str, Any]:
        found: dict[str, Any] = shared["resumable"].measure_rows(
            here,
            folder,
            map(Row, keeps),
            lambda: {"loss": dense},
            measure,
            lambda found: " ".join(str(row["loss"]) for row in found["rows"]),
            **settings,
        )
        assert found == json.loads((here / "results.json").read_text(encoding="utf-8"))
        return found

    return run, asked


def losses(found: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in found["rows"]]


def test_a_row_is_measured_once_in_a_folder(tmp_path: Path, shared: dict[str, Any]) -> None:
    run, asked = measuring(shared, tmp_path / "one", tmp_path / "kept")
    run(0.5, 0.9)
    assert losses(run(0.9, 0.7, 0.5)) == [1.5, 1.9, 1.7]
    assert asked == [0.5, 0.9, 0.7]


def test_a_new_folder_measures_again_and_leaves_other_rows(
    tmp_path: Path, shared: dict[str, Any]
) -> None:
    here = tmp_path / "one"
    measuring(shared, here, tmp_path / "kept")[0](0.5, 0.9)
    results = json.loads((here / "results.json").read_text(encoding="utf-8"))
    results["rows"][0]["loss"] = results["rows"][1]["loss"] = 7.0
    results["made"]["commits"] = ["earlier"]
    (here / "results.json").write_text(json.dumps(results), encoding="utf-8")
    run, asked = measuring(shared, here, tmp_path / "new")
    some = run(0.9)
    assert (losses(some), asked) == ([7.0, 1.9], [0.9])
    assert some["made"]["commits"][0] == "earlier", "a row of it is still there"
    every = run(0.5, 0.9)
    assert losses(every) == [1.5, 1.9]
    assert "earlier" not in every["made"]["commits"], "none of its rows is there any more"


def test_rows_of_another_text_are_not_mixed_in(tmp_path: Path, shared: dict[str, Any]) -> None:
    here = tmp_path / "one"
    measuring(shared, here, tmp_path / "kept")[0](0.5, 0.9)
    assert losses(measuring(shared, here, tmp_path / "new", dense=2.0)[0](0.9)) == [2.9]


def test_a_folder_of_other_settings_is_refused(tmp_path: Path, shared: dict[str, Any]) -> None:
    run, _ = measuring(shared, tmp_path / "one", tmp_path / "kept")
    run(0.5, texts=["raw"])
    before = (tmp_path / "one" / "results.json").read_bytes()
    with pytest.raises(SystemExit, match=r"raw.*tokens.*another --folder"):
        run(0.5, texts=["tokens"])
    assert (tmp_path / "one" / "results.json").read_bytes() == before


def test_what_a_killed_run_measured_is_there(tmp_path: Path, shared: dict[str, Any]) -> None:
    run, asked = measuring(shared, tmp_path / "one", tmp_path / "kept")

    def stopped() -> Iterator[float]:
        yield 0.5
        raise KeyboardInterrupt

    def stopping(row: Row) -> dict[str, float]:
        if row.keep != 0.5:
            raise KeyboardInterrupt
        asked.append(row.keep)
        return {"loss": 1.0 + row.keep}

    with pytest.raises(KeyboardInterrupt):
        shared["resumable"].measure_rows(
            tmp_path / "one",
            tmp_path / "kept",
            map(Row, (0.5, 0.9)),
            lambda: {"loss": 1.0},
            stopping,
            lambda found: "",
        )
    with pytest.raises(KeyboardInterrupt):
        shared["resumable"].measure_rows(
            tmp_path / "one",
            tmp_path / "kept",
            map(Row, stopped()),
            lambda: pytest.fail("the dense model is measured twice"),
            lambda row: pytest.fail(f"{row} is measured twice"),
            lambda found: "",
        )
    assert asked == [0.5]
    assert losses(run(0.5)) == [1.5]


def test_commits_of_a_folder_are_those_of_all_its_runs(
    tmp_path: Path, shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = shared["published"]
    repository = tmp_path / "repository"
    (repository / "rankopt").mkdir(parents=True)
    file = repository / "rankopt" / "code.py"
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(published, "ROOT", repository)

    def commits() -> list[str]:
        found: list[str] = published.provenance(tmp_path / "one", folder=tmp_path / "kept")[
            "commits"
        ]
        return found

    subprocess.run([*git, "init", "--quiet"], check=True)
    for text in ("1", "2"):
        file.write_text(text, encoding="utf-8")
        subprocess.run([*git, "add", "--all"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--message", text], check=True)
        commits()
    file.write_text("3", encoding="utf-8")
    first, second, changed = commits()
    assert first != second
    assert changed == second + "+"
    (repository / "results.json").write_text("{}", encoding="utf-8")
    assert commits() == [first, second, changed], "results are not code"


def test_without_a_repository_the_version_is_named(
    tmp_path: Path, shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared["published"], "ROOT", tmp_path / "nowhere")
    made = shared["published"].provenance(tmp_path / "one", "no-such-package")
    assert made["commits"] == [f"no commit, rankopt {made['versions']['rankopt']}"]
    assert made["versions"]["no-such-package"] == "not installed"


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: str(folder.name))
def test_every_table_says_how_it_was_made(folder: Path, shared: dict[str, Any]) -> None:
    made = json.loads((folder / "results.json").read_text(encoding="utf-8"))["made"]
    assert made["commits"]
    assert made["command"].startswith(f"python experiments/{folder.name}/run.py")
    table = folder / "table.md"
    if table.is_file():
        last = table.read_text(encoding="utf-8").rstrip().rsplit("\n\n", 1)[1]
        assert last == shared["published"].footer(made)
