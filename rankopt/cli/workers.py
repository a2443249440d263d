"""More processes that join a search."""

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from rankopt.errors import MissingExtraError, OptionError, RankoptError
from rankopt_solvers.search import SearchError


@contextlib.contextmanager
def copies(command: Sequence[str], count: int) -> Iterator[None]:
    """Run a command ``count`` times beside what is inside the ``with``; wait for all of them.

    For workers of one search: each is the same command with the same storage. The terminal is this
    process's alone: what they say is told if they fail.

    Raises:
        RankoptError: one of them failed.
    """
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        started = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file) for file in said
        ]
        try:
            yield
            codes = [process.wait() for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        failed = [file for file, code in zip(said, codes, strict=True) if code]
        if failed:
            failed[0].seek(0)
            last = failed[0].read().decode(errors="replace").strip().rpartition("\n")[2]
            raise RankoptError(
                f"{len(failed)} of {count} workers failed; what they measured is kept"
                + (f" ({last.removeprefix('error: ')})" if last else "")
            )


def require_storage(storage: str | None) -> None:
    """Refuse before the long work what no search can be kept in; nothing is written or made.

    Raises:
        RankoptError: the file is no journal, or the system refuses to write it.
        MissingExtraError: Optuna is not installed.
    """
    with _asking() as storages:
        storages.require_storage(storage)


@contextlib.contextmanager
def _asking() -> Iterator[Any]:
    try:
        from rankopt_solvers.search import storages

        yield storages
    except ImportError as error:
        raise MissingExtraError("search", error.name or "optuna", "search") from error
    except SearchError as error:
        raise RankoptError(str(error)) from error


@contextlib.contextmanager
def with_workers(count: int, storage: str | None) -> Iterator[None]:
    """Run this very command line in ``count - 1`` more processes that join the search.

    Raises:
        OptionError: fewer than one worker, or more than one without a storage to share.
        RankoptError: the storage cannot be opened, or a worker failed.
    """
    if count < 1:
        raise OptionError(f"workers must be at least 1, got {count}")
    if count == 1:
        yield
        return
    if storage is None:
        raise OptionError("several workers need a storage to share: give --storage or --output")
    with _asking() as storages:
        # Here, so that the workers find a storage and do not all create it.
        storages.open_storage(storage)
    with copies(
        [sys.executable, "-m", "rankopt", *worker_arguments(sys.argv[1:], storage)], count - 1
    ):
        yield


def worker_arguments(given: Sequence[str], storage: str) -> list[str]:
    """The launcher's arguments for a worker: no output, no workers of its own, its storage."""
    kept: list[str] = []
    skip = False
    for argument in given:
        name, equals, _ = argument.partition("=")
        if skip:
            skip = False
        elif name in ("--workers", "--output", "-o", "--storage"):
            skip = not equals
        elif name == "--force" or re.match("-o.", argument):
            pass  # belongs to the output
        else:
            kept.append(argument)
    return [*kept, "--storage", storage]
