"""A storage that is not one is left as it is; what the system refuses is said in one line."""

import os
import resource
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rankopt_solvers.search import Choice, SearchError, StudyError
from tests.solvers.search.test_search import Truth, cheapest, instance, run

pytest.importorskip("optuna")


def _table(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE mine (x)")


def _bytes(content: bytes) -> object:
    return lambda path: path.write_bytes(content)


OTHERS = {
    "text with a torn tail": _bytes(b"one\ntwo\nthree"),
    "one line": _bytes(b"a week of notes"),
    "binary": _bytes(bytes(range(256)) * 9),
    "a plan": _bytes(b'{\n "format": "rankopt-plan"\n}\n'),
    "lines of JSON": _bytes(b'{"text": "a"}\n{"text": "b"}'),
    "a blank line": _bytes(b"\n\nx"),
    "a database": _table,
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("url", [False, True])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, other: str, url: bool) -> None:
    path = tmp_path / "other"
    OTHERS[other](path)  # type: ignore[operator]
    before = path.read_bytes()
    with pytest.raises(StudyError, match="name another file") as found:
        run(storage=f"sqlite:///{path}" if url else path, trials=6)
    assert "\n" not in str(found.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["other"]


def test_an_empty_file_and_a_torn_first_line_become_a_journal(tmp_path: Path) -> None:
    for content in (b"", b'{"op_code":0,"work'):
        path = tmp_path / "s.journal"
        path.write_bytes(content)
        found = run(storage=path, trials=6)
        assert len(found.trials) == 6
        assert path.read_bytes().startswith(b'{"op_code":0,')


def test_a_damaged_journal_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "s.journal"
    path.write_bytes(b'{"op_code":0}\nnonsense\n{"op')
    with pytest.raises(StudyError, match="line 2: the journal is damaged"):
        run(storage=path, trials=6)
    assert path.read_bytes() == b'{"op_code":0}\nnonsense\n{"op'


def test_links_pipes_and_a_lock_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "uv.lock").write_text("version = 1\n")
    for name, said in (
        ("link", "a link"),
        ("pipe", "no regular file"),
        ("uv", "uv.lock is in the"),
    ):
        with pytest.raises(StudyError, match=said):
            run(storage=tmp_path / name, trials=6)
    assert (tmp_path / "uv.lock").read_text() == "version = 1\n"
    with pytest.raises(StudyError, match="File name too long"):
        run(storage=tmp_path / ("x" * 300), trials=6)


def test_a_journal_on_a_full_disk_ends_with_a_whole_line_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "s.journal"
    run(storage=path, trials=6)
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 40, 300):
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
        try:
            with pytest.raises(StudyError, match=r"cannot write .*s\.journal: File too large"):
                run(storage=path, trials=9)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes().endswith(b"}\n") and path.stat().st_size >= size
    assert len(run(storage=path, trials=9).trials) == 9


@pytest.mark.slow
def test_a_password_is_not_shown() -> None:
    from rankopt_solvers.search.records import without_password

    assert without_password("mysql://me:secret@host/db") == "mysql://me:***@host/db"
    assert without_password("sqlite:///a.db") == "sqlite:///a.db"
    with pytest.raises(SearchError) as found:
        run(storage="nosuch://me:secret@host/db", trials=6)
    assert "secret" not in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"source"', '"sauce"'),
        ('"seconds"', '"minutes"'),
        ('{"choice":[', '{"choice":[99,'),
        ('{"choice":[', '{"choice":"no","x":['),
        ('"op_code":0', '"op_code":"x"'),
        ('"datetime_start":"2', '"datetime_start":"x'),
        ('"values":[', '"values":[NaN,'),
    ],
)
def test_strange_entries_of_a_journal_are_said_to_be_damaged(
    tmp_path: Path, old: str, new: str
) -> None:
    path = tmp_path / "s.journal"
    run(storage=path, trials=6)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(StudyError, match="damaged"):
        run(storage=path, trials=7)


def test_a_queued_trial_of_a_database_is_taken_once(tmp_path: Path) -> None:
    """Four takers at the same moment, each with a connection of its own."""
    from optuna.trial import TrialState

    from rankopt_solvers.search.storages import open_storage
    from rankopt_solvers.search.studies import open_study, quiet

    def study() -> Any:
        return open_study(open_storage(f"sqlite:///{tmp_path / 'study'}"), "plans", {})

    studies, gate = [study() for _ in range(4)], threading.Barrier(4)
    for _ in range(8):
        studies[0].enqueue_trial({})

    def take(of: Any) -> list[int]:
        gate.wait()
        taken = []
        while of.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            with quiet():
                trial = of.ask()
            # What is asked for when nothing is queued any more is a new trial.
            taken += [trial.number] if trial.number < 8 else []
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [number for each in pool.map(take, studies) for number in each]
    assert sorted(taken) == list(range(8))


@pytest.mark.parametrize("url", ["{}", "sqlite:///{}"])
@pytest.mark.parametrize("loss", [None, 1.0])
def test_what_another_process_ended_first_is_no_error(
    url: str, loss: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before ``tell`` looks at it, or in the moment between its look and the storage's."""
    from optuna.trial import TrialState

    from rankopt_solvers.search.storages import open_storage
    from rankopt_solvers.search.studies import open_study, quiet
    from rankopt_solvers.search.workers import finish

    storage = open_storage(url.format(tmp_path / "study"))
    study = open_study(storage, "plans", {})
    with quiet():
        before, during, owned = (study.ask().number for _ in range(3))
    assert finish(study, before, 2.0) and not finish(study, before, loss)
    write = storage.set_trial_state_values

    def beaten(trial_id: int, *args: Any, **more: Any) -> bool:
        write(trial_id, TrialState.FAIL)
        return write(trial_id, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "set_trial_state_values", beaten)
        assert not finish(study, during, loss)
    assert finish(study, owned, loss)
    assert [trial.value for trial in study.trials] == [2.0, None, loss]


@pytest.mark.parametrize("url", ["{}", "sqlite:///{}"])
def test_who_was_only_slow_goes_on(url: str, tmp_path: Path) -> None:
    """Its trial was taken for dead: what it measures is not counted, and is no error."""
    import optuna

    from rankopt_solvers.search.storages import open_storage
    from rankopt_solvers.search.studies import quiet
    from rankopt_solvers.search.workers import requeue_dead

    problem, weights = instance()
    truth, where = Truth(problem, weights), url.format(tmp_path / "study")

    def evaluate(choice: Choice) -> float:
        if not truth.asked:
            other = open_storage(where)
            (plans,) = (n for n in optuna.get_all_study_names(other) if n.endswith("plans"))
            with quiet(), pytest.MonkeyPatch.context() as patch:
                patch.setattr("rankopt_solvers.search.workers._gone", lambda *_: True)
                requeue_dead(optuna.load_study(storage=other, study_name=plans), other, 60.0)
        return truth(choice)

    found = run(evaluate=evaluate, storage=where, trials=5, plans={"low": cheapest(problem)})
    assert found.measured_now == len(found.trials) == 5
    assert truth.asked.count(truth.asked[0]) == 2 and len(truth.asked) == 6


def test_a_driver_that_is_not_installed_is_named() -> None:
    with pytest.raises(StudyError, match="MySQLdb is not installed") as caught:
        run(storage="mysql+mysqldb://me:secret@host/base")
    assert "secret" not in str(caught.value) and "postgresql+psycopg://" in str(caught.value)
