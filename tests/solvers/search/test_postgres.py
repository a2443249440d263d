"""A search that several workers share through PostgreSQL, one of whom is killed."""

import collections
import getpass
import glob
import io
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankopt_solvers.search import StudyError
from tests.solvers.search.test_search import cheapest, instance, run
from tests.solvers.search.test_workers import logged, worker

pytest.importorskip("optuna")
pytest.importorskip("psycopg")
pytestmark = pytest.mark.slow


def programs() -> Path | None:
    """Where initdb and pg_ctl are; Debian has them outside of the path."""
    found = shutil.which("initdb")
    places = [found] if found else sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    return Path(places[-1]).parent if places else None


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URL of a server of its own, which listens on a socket in its own folder and nowhere else."""
    where = programs()
    if where is None:
        pytest.skip("PostgreSQL is not installed")
    # The server refuses to run as root; the package makes a user for it.
    user = "postgres" if os.geteuid() == 0 else getpass.getuser()
    who = {"user": user, "group": user} if os.geteuid() == 0 else {}
    # A path of a socket has at most some hundred characters.
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    try:
        if who:
            shutil.chown(folder, user, user)

        def call(*command: object) -> None:
            subprocess.run(
                [*map(str, command)], check=True, cwd=folder, stdout=subprocess.DEVNULL, **who
            )  # type: ignore[call-overload]

        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        server = (where / "pg_ctl", "-D", folder / "data")
        try:
            call(where / "initdb", "-D", folder / "data", "-A", "trust", "-U", "rankopt", "-N")
            call(*server, "-w", "-l", folder / "log", "-o", options, "start")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"PostgreSQL cannot be started here: {error}")
        try:
            yield f"postgresql+psycopg://rankopt@/postgres?host={folder}"
        finally:
            call(*server, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def test_four_workers_one_of_whom_is_killed(database: str, tmp_path: Path) -> None:
    """Its trial is taken up again, no choice is measured twice, and all agree on the result."""
    trials = 16
    workers = [worker(tmp_path, database, "thompson", trials, 0.4) for _ in range(4)]
    dead, deadline = workers[0], time.monotonic() + 120.0
    while not any(pid == dead.pid for pid, _ in logged(tmp_path)):
        assert time.monotonic() < deadline and dead.poll() is None
        time.sleep(0.01)
    os.kill(dead.pid, signal.SIGKILL)
    dead.wait()
    of_dead = [choice for pid, choice in logged(tmp_path) if pid == dead.pid]
    results = [json.loads(process.communicate(timeout=120)[0]) for process in workers[1:]]
    asked = logged(tmp_path)
    times = collections.Counter(choice for _, choice in asked)
    # Only what it had in hand is measured once more, by one of the others.
    assert len(times) == trials and sum(times.values()) == trials + 1
    took = [pid for pid, choice in asked if choice == of_dead[-1]]
    assert took[0] == dead.pid and len(took) == len({*took}) == 2
    assert sum(measured for measured, _, _ in results) == trials - len(of_dead) + 1
    assert {(loss, count) for _, loss, count in results} == {(results[0][1], trials)}


def test_the_same_call_measures_nothing_again(database: str, tmp_path: Path) -> None:
    problem, _ = instance()
    plans = {"low": cheapest(problem)}
    found = run(storage=database, trials=5, plans=plans, study_name="again")
    again = run(storage=database, trials=5, plans=plans, study_name="again")
    assert (found.measured_now, again.measured_now) == (5, 0) and again.loss == found.loss
    with pytest.raises(StudyError, match="about another label"):
        run(storage=database, trials=5, plans=plans, study_name="again", label="other data")


def test_the_dashboard_opens_it(database: str, tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    run(storage=database, trials=4, study_name="shown")
    application = dashboard.wsgi(database)

    def get(path: str) -> object:
        said: list[str] = []
        asked = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "wsgi.input": io.BytesIO()}
        asked |= {"SERVER_NAME": "here", "SERVER_PORT": "80", "wsgi.url_scheme": "http"}
        body = b"".join(application(asked, lambda status, headers, *_: said.append(status)))
        assert said == ["200 OK"]
        return json.loads(body)

    studies = {each["study_name"]: each for each in get("/api/studies")["study_summaries"]}  # type: ignore[index]
    assert {"shown", "shown plans"} <= studies.keys()
    trials = [
        trial
        for name in ("shown", "shown plans")
        for trial in get(f"/api/studies/{studies[name]['study_id']}")["trials"]  # type: ignore[index]
    ]
    assert sum(trial["state"] == "Complete" for trial in trials) == 4
    assert all("source" in {a["key"] for a in trial["user_attrs"]} for trial in trials)


def test_a_server_that_is_not_there_is_said_without_the_password() -> None:
    with pytest.raises(StudyError, match="cannot open the study storage") as caught:
        run(storage="postgresql+psycopg://me:secret@127.0.0.1:9/none")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
