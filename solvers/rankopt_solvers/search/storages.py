"""The places where studies are kept: a journal file (any path), a database (a URL), or memory."""

import contextlib
import errno
import json
import os
import re
import sqlite3
import stat
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file

from rankopt_solvers.search.records import StudyError, without_password
from rankopt_solvers.search.studies import patiently, quiet
from rankopt_solvers.search.workers import queue_again

HEARTBEAT_SECONDS, GRACE_SECONDS = 30, 120
#: How long a process waits for its turn on an SQLite database.
SQLITE_SECONDS = 60


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
        return patiently(f"open the study storage {shown}", lambda: _database(str(where)))


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
    try:
        storage = RDBStorage(
            url,
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=queue_again,
        )
    except ImportError as error:
        wanted = getattr(error.__cause__, "name", None) or "a driver"
        raise StudyError(
            f"cannot open the study storage {without_password(url)}: {wanted} is not installed; "
            "install it, or name another driver in the URL, as postgresql+psycopg://"
        ) from error
    if storage.engine.name == "sqlite":
        _one_at_a_time(storage.engine)
    return storage


def _one_at_a_time(engine: Any) -> None:
    """Lock an SQLite database from the first read of a transaction on, not from the first write.

    Optuna takes a queued trial by reading its state FOR UPDATE and writing another. SQLite has no
    such reads: two processes could read the same state, and both take the trial. (The events are
    SQLAlchemy's own recipe, dialect page "SQLite", "Enabling Non-Legacy SQLite Transactional
    Modes".)
    """
    from sqlalchemy import event

    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        connection.execute(f"PRAGMA busy_timeout = {SQLITE_SECONDS * 1000}")

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begin)
    engine.dispose()  # what is open already has heard of neither


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
