"""Optuna studies that survive kill -9 and are shared by several processes.

Storage is a journal file (any path), a database (a URL with ``://``) or memory (None). A process
that dies leaves its trial RUNNING. Every trial therefore says who runs it (host, process id and the
process's start, so that a reused id is not mistaken); whoever finds the trial of a process that is
gone fails it and queues it again. Across hosts a database's heartbeat does the same; a journal has
none, so there a trial of another host is given up after ten times what the longest one took.
"""

import contextlib
import datetime
import errno
import json
import os
import random
import re
import socket
import sqlite3
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from rankopt_solvers.search.records import OtherStudyError, StudyError, without_password

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
        StudyError: see require_storage; a journal with a line that is not JSON, or a database that
            cannot be reached.
    """
    if isinstance(where, BaseStorage):
        return where
    if where is None:
        return optuna.storages.InMemoryStorage()
    require_storage(where)
    if "://" not in str(where):
        return _journal(Path(where))
    with quiet():
        shown = without_password(str(where))
        return _patiently(f"open the study storage {shown}", lambda: _database(str(where)))


def require_storage(where: str | os.PathLike[str] | None) -> None:
    """Refuse what no study can be kept in; nothing is written or made.

    Raises:
        StudyError: a file that is no journal, an SQLite file of something else, or a place where
            the system refuses to write.
    """
    if where is None:
        return
    sqlite = re.match(r"sqlite(?:\+\w+)?:///([^?]*)", str(where))
    if sqlite is None and "://" in str(where):
        return
    if sqlite is not None and sqlite[1] in ("", ":memory:"):
        return
    path = Path(where if sqlite is None else sqlite[1])
    try:
        _require_place(path)
        if sqlite is not None:
            _require_database(path)
        else:
            _require_journal(path)
            lock = path.with_name(f"{path.name}.lock")
            if os.path.lexists(lock) and (not _is_file(lock) or lock.stat().st_size):
                raise StudyError(
                    f"{lock} is in the way: a lock of that name is made beside {path}; name "
                    "another file, or move it"
                )
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error.strerror or error}") from error


def _is_file(path: Path) -> bool:
    """Whether it is a file, and no link to one."""
    return stat.S_ISREG(path.lstat().st_mode)


def _require_place(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise StudyError(f"cannot keep a study in {path}: name a file in a folder that exists")
    if os.path.lexists(path) and not _is_file(path):
        raise StudyError(f"cannot keep a study in {path}: it is a link or no regular file")
    for needed in (path.absolute().parent, path):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _require_journal(path: Path) -> None:
    """Believe a file that it is a journal only if all of it is, but for its last line.

    Raises:
        StudyError: it is not.
    """
    content = path.read_bytes() if path.exists() else b""
    *whole, torn = content.split(b"\n")
    first = whole[0] if whole else torn
    if content and not first.startswith(b'{"op_code"'):
        raise StudyError(
            f"{path} is not the journal of a search, and is left as it is: name another file"
        )
    for number, line in enumerate(whole, 1):
        try:
            if not isinstance(json.loads(line), dict):
                raise ValueError("not an entry of a journal")
        except (ValueError, RecursionError) as error:
            raise StudyError(
                f"{path}, line {number}: the journal is damaged ({error}); remove the line to "
                "lose that entry only, or name another file to start again"
            ) from error


def _require_database(path: Path) -> None:
    """Believe an SQLite file that it is one of studies only if it has their tables, or none.

    Raises:
        StudyError: it is another file, or has tables of something else only.
    """
    if not path.exists() or not path.stat().st_size:
        return
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        ) as database:
            found = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    except sqlite3.OperationalError:
        return  # another process is writing: that it is a database is known by now
    except sqlite3.DatabaseError as error:
        raise StudyError(f"{path} is no SQLite database ({error}): name another file") from error
    if found and "studies" not in found:
        raise StudyError(
            f"{path} is a database of something else, and is left as it is: name another file"
        )


def _database(url: str) -> BaseStorage:
    return RDBStorage(
        url,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        heartbeat_stale_trial_callback=_queue_again,
    )


def _journal(path: Path) -> BaseStorage:
    lock = JournalFileOpenLock(str(path))
    try:
        if path.exists():
            lock.acquire()
            try:
                # Again: now nobody is writing.
                _require_journal(path)
                _cut_torn_tail(path)
            finally:
                lock.release()
        return JournalStorage(_Journal(str(path), lock_obj=lock))
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error.strerror or error}") from error
    except StudyError:
        raise
    except Exception as error:  # of whatever kind Optuna's replaying of strange entries ends in
        raise StudyError(
            f"{path}: the journal is damaged ({type(error).__name__}: {str(error)[:80]!r}); name "
            "another file to start again"
        ) from error


class _Journal(JournalFileBackend):
    """A journal that ends with a whole line whatever the system says, and tells what it said."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write all entries or none.

        Raises:
            StudyError: the system refuses.
        """
        lines = "".join(f"{json.dumps(log, separators=(',', ':'))}\n" for log in logs)
        try:
            # Without a buffer, or closing the file would write the rest of it where there is room.
            with get_lock_file(self._lock), open(self._file_path, "ab", buffering=0) as file:
                size, rest = file.seek(0, os.SEEK_END), memoryview(lines.encode())
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._file_path, size)
                    raise
        except OSError as error:
            raise StudyError(
                f"cannot write {self._file_path}: {error.strerror or error}; what was measured "
                "before is kept, and the same call goes on"
            ) from error


def _cut_torn_tail(path: Path) -> None:
    """Remove a last line that was not written to its end: the next one would be glued to it."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _patiently(what: str, attempt: Callable[[], Made]) -> Made:
    """Try again where two processes create the same at once: each database has its own error."""
    for delay in (*BACK_OFF_SECONDS, None):
        try:
            return attempt()
        except (ImportError, StudyError):
            raise
        except Exception as error:
            if delay is None:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise StudyError(f"cannot {what}: {without_password(first)}") from error
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
