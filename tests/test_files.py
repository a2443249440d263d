"""Files and folders are whole or not there."""

from pathlib import Path

import pytest

from rankopt.errors import RankoptError
from rankopt.files import require_free, whole_file, whole_folder


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("existing", [True, False])
def test_file_appears_whole_under_its_name_only_at_the_end(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "plan.json"
    if existing:
        path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.exists() == existing
        assert not existing or path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert names(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_interrupted_file_leaves_the_old_one(
    tmp_path: Path, existing: bool, failure: type[BaseException]
) -> None:
    path = tmp_path / "plan.json"
    if existing:
        path.write_text("old")

    def interrupted() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        interrupted()
    assert names(tmp_path) == (["plan.json"] if existing else [])
    assert not existing or path.read_text() == "old"


def test_file_that_was_never_written_is_an_error_and_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass
    assert path.read_text() == "old"


def test_file_and_folder_need_an_existing_parent(tmp_path: Path) -> None:
    with (
        pytest.raises(RankoptError, match=r"none/plan\.json: the folder .*none does not exist"),
        whole_file(tmp_path / "none" / "plan.json"),
    ):
        pass
    with (
        pytest.raises(RankoptError, match=r"none/model: the folder .*none does not exist"),
        whole_folder(tmp_path / "none" / "model"),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("state", ["absent", "empty", "full"])
def test_folder_appears_whole_and_replaces_everything(tmp_path: Path, state: str) -> None:
    path = tmp_path / "model"
    if state != "absent":
        path.mkdir()
    if state == "full":
        (path / "old").write_text("old")
    with whole_folder(path, overwrite=state == "full") as temporary:
        (temporary / "new").write_text("new")
        assert path.exists() == (state != "absent")
        assert not (path / "new").exists()
    assert names(path) == ["new"]
    assert names(tmp_path) == ["model"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("state", ["absent", "empty", "full"])
def test_interrupted_folder_leaves_the_old_one(tmp_path: Path, state: str) -> None:
    path = tmp_path / "model"
    if state != "absent":
        path.mkdir()
    if state == "full":
        (path / "old").write_text("old")

    def interrupted() -> None:
        with whole_folder(path, overwrite=True) as temporary:
            (temporary / "new").write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        interrupted()
    assert names(tmp_path) == ([] if state == "absent" else ["model"])
    assert state != "full" or names(path) == ["old"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_taken_place_is_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    if kind == "file":
        path.write_text("old")
    else:
        path.mkdir()
        (path / "old").write_text("old")
    entered = False
    with pytest.raises(RankoptError, match="model exists and is not empty"), whole_folder(path):
        entered = True
    assert not entered
    assert names(tmp_path) == ["model"]


def test_overwriting_replaces_a_file_by_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("old")
    with whole_folder(path, overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert names(path) == ["new"]
    assert names(tmp_path) == ["model"]


def test_free_places_are_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert require_free("model", False) == Path("model")
    with whole_file("plan.json") as temporary:
        temporary.write_text("{}")
    assert names(tmp_path) == ["plan.json"]
