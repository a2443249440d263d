"""Several processes share a search, and what one had in hand when it died is taken up by others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rankopt_solvers.search import Choice
from tests.solvers.search.test_search import Truth, cheapest, instance, run

pytest.importorskip("optuna")

WORKER = """
import json, os, sys, time
sys.path[:0] = json.loads(sys.argv[1])
import test_search as t
problem, weights = t.instance()
truth = t.Truth(problem, weights)
log, storage, sampler, trials, pause, together = sys.argv[2:]

def measuring():
    with open(log) as file:
        return len({json.loads(line)[0] for line in file if line.endswith("\\n")})

def evaluate(choice):
    with open(log, "a") as file:
        file.write(json.dumps([os.getpid(), choice]) + "\\n")
    deadline = time.monotonic() + 30.0
    while measuring() < int(together) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(float(pause))
    return truth(choice)

found = t.run(sampler, evaluate=evaluate, storage=storage, trials=int(trials),
              plans={"low": t.cheapest(problem)})
print(json.dumps([found.measured_now, found.loss, len(found.trials)]))
"""


def worker(
    tmp_path: Path, storage: str, sampler: str, trials: int, pause: float, together: int = 1
) -> Any:
    """A process of a search; so many of them wait for each other at their first trials."""
    import rankopt_solvers

    paths = [str(Path(__file__).parent), str(Path(rankopt_solvers.__file__).parents[1])]
    arguments = [
        json.dumps(paths),
        str(tmp_path / "log"),
        storage,
        sampler,
        trials,
        pause,
        together,
    ]
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def logged(tmp_path: Path) -> list[tuple[int, Choice]]:
    path = tmp_path / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(pid, tuple(choice)) for pid, choice in map(json.loads, lines)]


@pytest.mark.parametrize("kind", ["journal", pytest.param("sqlite", marks=pytest.mark.slow)])
def test_killed_search_is_resumed_without_measuring_anything_again(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "study"
    storage = str(path) if kind == "journal" else f"sqlite:///{path}"
    process = worker(tmp_path, storage, "thompson", 8, 0.2)
    deadline = time.monotonic() + 60.0
    while len(logged(tmp_path)) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = [choice for _, choice in logged(tmp_path)]
    assert len(before) == 5
    problem, weights = instance()
    truth = Truth(problem, weights)
    found = run(evaluate=truth, storage=storage, trials=8, plans={"low": cheapest(problem)})
    # Four had been measured; the fifth was being measured and is tried again.
    assert found.measured_now == 4 and len(found.trials) == 8
    assert before[4] in truth.asked and not set(before[:4]) & set(truth.asked)
    assert len(truth.asked) == len(set(truth.asked)) == 4
    assert found.improvement >= 0.0


@pytest.mark.parametrize(
    ("sampler", "url", "trials"),
    [
        ("thompson", "{}", 16),
        ("tpe", "{}", 16),
        pytest.param("thompson", "sqlite:///{}", 6, marks=pytest.mark.slow),
    ],
)
def test_processes_share_the_trials_and_agree(
    tmp_path: Path, sampler: str, url: str, trials: int
) -> None:
    """Both start at once, and neither finds a study: one creates it, the other joins."""
    storage = url.format(tmp_path / "study")
    workers = [worker(tmp_path, storage, sampler, trials, 0.0, 2) for _ in range(2)]
    results = [json.loads(process.communicate(timeout=60)[0]) for process in workers]
    asked = logged(tmp_path)
    assert len(asked) == len({choice for _, choice in asked}) == trials
    assert sum(measured for measured, _, _ in results) == trials
    assert len({pid for pid, _ in asked}) == 2
    assert {(loss, count) for _, loss, count in results} == {(results[0][1], trials)}


def test_worker_whose_heart_stopped_on_another_host_is_replaced(tmp_path: Path) -> None:
    """Its trial was not measured, is queued again, and its choice is measured by who is left."""
    from optuna.storages import RDBStorage

    from rankopt_solvers.search.studies import quiet
    from rankopt_solvers.search.workers import queue_again

    with quiet():
        storage = RDBStorage(
            f"sqlite:///{tmp_path / 'study'}",
            heartbeat_interval=1,
            grace_period=1,
            heartbeat_stale_trial_callback=queue_again,
        )
    taken: list[Choice] = []

    def die(choice: Choice) -> float:
        taken.append(choice)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        # What a process leaves that is killed elsewhere: a RUNNING trial with one heartbeat.
        patch.setattr("rankopt_solvers.search.workers.socket.gethostname", lambda: "elsewhere")
        patch.setattr("optuna.study.Study.tell", lambda *args, **more: None)
        with pytest.raises(SystemExit):
            run(evaluate=die, storage=storage, trials=3)
    problem, weights = instance()
    truth = Truth(problem, weights)
    found = run(evaluate=truth, storage=storage, trials=3)
    assert len(taken) == 1 and taken[0] in truth.asked
    assert found.measured_now == len(set(truth.asked)) == len(truth.asked) == 3


def test_trial_of_another_host_in_a_journal_is_given_up_in_time(tmp_path: Path) -> None:
    from rankopt_solvers.search.ledger import Ledger
    from rankopt_solvers.search.storages import open_storage
    from rankopt_solvers.search.workers import requeue_dead

    storage = open_storage(tmp_path / "s.journal")
    ledger = Ledger(instance()[0], storage, "rankopt", {})
    ledger.queue({(0,) * 24: "low"}, None)
    ledger.plans.ask().set_user_attr("owner", ["elsewhere", 1, ""])
    requeue_dead(ledger.plans, storage, 60.0)
    assert not ledger.waiting() and ledger.taken() == 1
    requeue_dead(ledger.plans, storage, 0.0)
    assert ledger.waiting() and ledger.taken() == 1


def test_trial_that_kills_its_process_is_left_alone_in_the_end(tmp_path: Path) -> None:
    """After three retries."""
    from rankopt_solvers.search.ledger import Ledger
    from rankopt_solvers.search.storages import open_storage
    from rankopt_solvers.search.workers import RETRIES, owner, requeue_dead

    storage = open_storage(tmp_path / "s.journal")
    ledger = Ledger(instance()[0], storage, "rankopt", {})
    ledger.queue({(0,) * 24: "low"}, None)
    host, pid, _ = owner()
    for _ in range(RETRIES + 1):
        assert ledger.waiting()
        # This process, as it would be if it had begun at another time.
        ledger.plans.ask().set_user_attr("owner", [host, pid, "another start"])
        requeue_dead(ledger.plans, storage, 60.0)
    assert not ledger.waiting() and ledger.taken() == 0
