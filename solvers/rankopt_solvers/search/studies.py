"""Optuna studies that survive kill -9 and are shared by several processes.

Storage is a journal file (any path), a database (a URL with ``://``) or memory (None). A process
that dies leaves its trial RUNNING. Every trial therefore says who runs it (host, process id and the
process's start, so that a reused id is not mistaken); whoever finds the trial of a process that is
gone fails it and queues it again. Across hosts a database's heartbeat does the same; a journal has
none, so there a trial of another host is given up after ten times what the longest one took.
"""

import contextlib
import datetime
import json
import os
import random
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from rankopt_solvers.search.records import OtherStudyError, StudyError

HEARTBEAT_SECONDS, GRACE_SECONDS, RETRIES = 30, 120, 3
#: A trial that does not say whose it is, since its process died in the moment of taking it, is
#: taken for dead after so long.
NOBODY_SECONDS = 10.0
BACK_OFF_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8)

Made = TypeVar("Made")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's notes: new studies, experimental arguments, heartbeats made elsewhere."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")
            yield
    finally:
        optuna.logging.set_verbosity(level)


def open_storage(where: str | os.PathLike[str] | BaseStorage | None) -> BaseStorage:
    """The storage behind None, a path, a URL, or Optuna's own object.

    Raises:
        StudyError: a journal with a line that is not JSON, or a database that cannot be reached.
    """
    if isinstance(where, BaseStorage):
        return where
    if where is None:
        return optuna.storages.InMemoryStorage()
    if "://" not in str(where):
        return _journal(Path(where))
    with quiet():
        return _patiently(f"open the study storage {where}", lambda: _database(str(where)))


def _database(url: str) -> BaseStorage:
    return RDBStorage(
        url,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        heartbeat_stale_trial_callback=_queue_again,
    )


def _journal(path: Path) -> BaseStorage:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise StudyError(f"cannot keep a study in {path}: name a file in a folder that exists")
    lock = JournalFileOpenLock(str(path))
    if path.exists():
        lock.acquire()
        try:
            _cut_torn_tail(path)
        finally:
            lock.release()
        _require_json(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _cut_torn_tail(path: Path) -> None:
    """Remove a last line that was not written to its end: the next one would be glued to it."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _require_json(path: Path) -> None:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if not isinstance(json.loads(line), dict):
                raise ValueError("not an entry of a journal")
        except ValueError as error:
            raise StudyError(
                f"{path}, line {number}: the journal is damaged ({error}); remove the line to "
                "lose that entry only, or name another file to start again"
            ) from error


def _patiently(what: str, attempt: Callable[[], Made]) -> Made:
    """Try again where two processes create the same at once: each database has its own error."""
    for delay in (*BACK_OFF_SECONDS, None):
        try:
            return attempt()
        except ImportError:
            raise
        except Exception as error:
            if delay is None:
                raise StudyError(f"cannot {what}: {error}") from error
            time.sleep(delay * random.uniform(0.5, 1.5))
    raise AssertionError


def open_study(storage: BaseStorage, name: str, identity: dict[str, Any]) -> Study:
    """Create the study, or join the one of this name; safe with several creators at once.

    Args:
        storage: from open_storage.
        name: of the study.
        identity: what the study is about, kept in its attributes; JSON values.

    Raises:
        StudyError: the study of this name is about something else.
    """
    with quiet():
        study = _patiently(
            f"create the study {name!r}",
            lambda: optuna.create_study(
                storage=storage, study_name=name, direction="minimize", load_if_exists=True
            ),
        )
    # Whoever creates it writes all attributes before the first trial, so look in this order.
    new = not study.get_trials(deepcopy=False)
    for key, wanted in identity.items():
        found = study.user_attrs.get(key)
        if found is None and new:
            study.set_user_attr(key, wanted)
        elif found != wanted:
            raise OtherStudyError(name, f"another {key} ({found!s:.60}, now {wanted!s:.60})")
    return study


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


def _queue_again(study: Study, trial: FrozenTrial) -> None:
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


def requeue_dead(study: Study, storage: BaseStorage, patience: float) -> None:
    """Fail the trials whose process is gone, and queue them again with what they were to try.

    Args:
        study: whose trials to look at.
        storage: that it lies in.
        patience: seconds after which a trial of another host is given up, without heartbeats.
    """
    with quiet():
        optuna.storages.fail_stale_trials(study)
        heartbeats = beats(storage)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            foreign = trial.user_attrs.get("owner", [None])[0] != socket.gethostname()
            if (heartbeats and foreign) or not _gone(trial, patience):
                continue
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except ValueError:  # another process was quicker
                continue
            _queue_again(study, trial)


def beats(storage: BaseStorage) -> bool:
    """Whether the storage keeps heartbeats."""
    interval = getattr(storage, "get_heartbeat_interval", None)
    return interval is not None and interval() is not None


@contextlib.contextmanager
def heartbeat(study: Study, storage: BaseStorage, trial: Trial) -> Iterator[None]:
    """Record the trial's heartbeat inside the ``with``; Optuna does so only in ``optimize``."""
    if not beats(storage):
        yield
        return
    study_id = storage.get_study_id_from_name(study.study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
    done = threading.Event()

    def beat() -> None:
        while True:
            storage.record_heartbeat(trial_id)  # type: ignore[attr-defined]
            if done.wait(HEARTBEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
