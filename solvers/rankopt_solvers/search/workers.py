"""Who runs a trial, and what becomes of it when that process dies: searches survive kill -9.

A process that dies leaves its trial RUNNING. Every trial therefore says who runs it (host, process
id and the process's start, so that a reused id is not mistaken); whoever finds the trial of a
process that is gone fails it and queues it again. Across hosts a database's heartbeat does the
same; a journal has none, so there a trial of another host is given up after ten times what the
longest one took.
"""

import contextlib
import datetime
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from rankopt_solvers.search.studies import quiet

RETRIES = 3
#: A trial that does not say whose it is, since its process died in the moment of taking it, is
#: taken for dead after so long.
NOBODY_SECONDS = 10.0


def _started(pid: int) -> str:
    """When a process began, as the kernel counts; empty where that cannot be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    # A zombie has ended: only its parent has not noticed.
    return "" if fields[0] == "Z" else fields[19]


def owner() -> list[Any]:
    """Host, id and start of the process that asks."""
    return [socket.gethostname(), os.getpid(), _started(os.getpid())]


def _gone(trial: FrozenTrial, patience: float) -> bool:
    """Whether nobody is working on a RUNNING trial any more, as far as can be told."""
    began = trial.datetime_start or datetime.datetime.now()
    age = (datetime.datetime.now() - began).total_seconds()
    who = trial.user_attrs.get("owner")
    if who is None:
        return age > NOBODY_SECONDS
    host, pid, started = who
    if host != socket.gethostname():
        return age > patience
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, as somebody else's
        return False
    return bool(started != _started(pid))


def queue_again(study: Study, trial: FrozenTrial) -> None:
    """Let anybody try what a dead process was trying, unless it has killed several.

    Optuna's own callback for this would pass on the dead owner, too.
    """
    attributes = {key: value for key, value in trial.user_attrs.items() if key != "owner"}
    attributes["retries"] = attributes.get("retries", 0) + 1
    if attributes["retries"] > RETRIES:
        return
    fixed = {k: v for k, v in trial.system_attrs.items() if k == "fixed_params"}
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=attributes,
            system_attrs=fixed,
        )
    )


def finish(study: Study, number: int, loss: float | None = None) -> bool:
    """Finish a trial, with a loss or as failed; False if somebody else had finished it before.

    Optuna says so in two ways: its ``tell`` looks first, and the storage looks again.
    """
    state = TrialState.FAIL if loss is None else TrialState.COMPLETE
    try:
        study.tell(number, loss, state)
    except (UpdateFinishedTrialError, ValueError):
        if not finished(study, number):
            raise
        return False
    return True


def finished(study: Study, number: int) -> bool:
    """Whether somebody has finished the trial."""
    (found,) = study.get_trials(deepcopy=False)[number : number + 1]
    return bool(found.state.is_finished())


def requeue_dead(study: Study, storage: BaseStorage, patience: float) -> None:
    """Fail the trials whose process is gone, and queue them again with what they were to try.

    Args:
        study: whose trials to look at.
        storage: that it lies in.
        patience: seconds after which a trial of another host is given up, without heartbeats.
    """
    with quiet():
        optuna.storages.fail_stale_trials(study)
        heartbeats = _between_beats(storage) is not None
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            foreign = trial.user_attrs.get("owner", [None])[0] != socket.gethostname()
            if (heartbeats and foreign) or not _gone(trial, patience):
                continue
            if finish(study, trial.number):  # else another process was quicker
                queue_again(study, trial)


def _between_beats(storage: BaseStorage) -> float | None:
    """Seconds between two heartbeats; None if the storage keeps none."""
    interval = getattr(storage, "get_heartbeat_interval", None)
    return None if interval is None else interval()


@contextlib.contextmanager
def heartbeat(study: Study, storage: BaseStorage, trial: Trial) -> Iterator[None]:
    """Record the trial's heartbeat inside the ``with``; Optuna does so only in ``optimize``."""
    interval = _between_beats(storage)
    if interval is None:
        yield
        return
    study_id = storage.get_study_id_from_name(study.study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
    done = threading.Event()

    def beat() -> None:
        while True:
            storage.record_heartbeat(trial_id)  # type: ignore[attr-defined]
            if done.wait(interval):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
