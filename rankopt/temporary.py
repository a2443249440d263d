"""Temporary folders that nobody is left with.

They are called ``.rankopt.HOST.*`` and lie beside what is written. A process holds a lock (flock)
on its own, which the system takes back when the process dies: whoever writes beside it later
removes the folders of this host and user whose lock is free. A folder that was being replaced at
that moment gets its name back first.
"""

import errno
import functools
import hashlib
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # no leftovers are swept on Windows
    fcntl = None  # type: ignore[assignment]

#: In the name of every one.
MARK = ".rankopt."


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder in a folder, removed at the end or by who comes after a kill."""
    folder, remove = make_temporary_folder(parent)
    try:
        yield folder
    finally:
        remove()


def make_temporary_folder(parent: Path) -> tuple[Path, Callable[[], None]]:
    """A temporary folder in a folder, and what removes it; dead processes' are swept before."""
    _sweep(parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(), dir=parent))
        try:
            lock = hold(folder)
        except OSError:
            return folder, functools.partial(_remove, folder, None)  # no locks: nobody sweeps
        except BaseException:
            _remove(folder, None)
            raise
        if lock is not None:
            return folder, functools.partial(_remove, folder, lock)


def _prefix() -> str:
    """The beginning of this host's temporary names: a lock says nothing about another's."""
    return f"{MARK}{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}."


def hold(folder: Path) -> int | None:
    """The lock of a temporary folder; None if a process has it, or if the folder is gone.

    Raises:
        OSError: there are no locks here.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who sweeps takes the lock, too: what was swept in between is no place to write.
        if os.path.samestat(os.fstat(handle), folder.lstat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _remove(folder: Path, lock: int | None) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        # Ctrl-C, or SIGTERM, half way through it.
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _sweep(parent: Path) -> None:
    """Remove this user's temporary folders in a folder whose processes are dead."""
    for folder in sorted(parent.glob(f"{_prefix()}*")):
        try:
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            lock = hold(folder)
        except (OSError, AttributeError):  # swept by another, or not on this system
            continue
        if lock is None:
            continue
        for replaced in (folder / "old").glob("*"):
            if not os.path.lexists(parent / replaced.name):
                os.replace(replaced, parent / replaced.name)
        _remove(folder, lock)
