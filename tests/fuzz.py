"""Wrong files, one by one: nothing but documented errors, nothing written, nothing slow."""

import dataclasses
import hashlib
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.readers import Reader

#: Seconds for one file, and bytes of address space for all of them beside what is there already.
LONGEST, MOST_MEMORY = 20, 2**30
_WRITES = {
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.link",
    "os.symlink", "shutil.rmtree", "shutil.move", "subprocess.Popen", "os.system", "os.exec",
}  # fmt: skip


class TooSlowError(BaseException):
    """One file took longer than LONGEST."""


@dataclasses.dataclass
class Tally:
    """What came of the files of one kind.

    Attributes:
        files: how many were tried, no two of them alike.
        outcomes: "read", or the class of a documented error -> how often.
        faults: what should not be -> the first file with which it was.
        slowest: seconds that one file took at most.
        memory_mib: by which the process grew.
    """

    files: int = 0
    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: dict[str, bytes] = dataclasses.field(default_factory=dict)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    slowest: float = 0.0
    memory_mib: float = 0.0

    def note(self, fault: str, content: bytes) -> None:
        """Keep the first file of each kind of fault, and count."""
        self.counts[fault] += 1
        self.faults.setdefault(fault, content)


_watched: list[Any] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    path, flags = (arguments[0], arguments[2]) if event == "open" else (arguments[:1], 0)
    if isinstance(path, int):
        # It was seen when it was opened under its name.
        return
    writes = event in _WRITES or bool(
        event == "open" and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    )
    if writes:
        _watched[0](event, str(path))


@contextmanager
def watched(folder: Path, own: Path) -> Iterator[list[str]]:
    """What is written, by Python or in ``folder``, but to files whose names begin as ``own``."""
    found: list[str] = []
    before = _listing(folder, own)

    def see(event: str, path: str) -> None:
        # A folder is opened to see whether it may be written to; temporaries are gone at the end.
        if (
            own.name not in path
            and "/.rankopt." not in path
            and not os.path.isdir(path)
            and "__pycache__" not in path
            and path != "/dev/null"
        ):
            found.append(f"{event} {path}")

    _watched[:] = [see]
    try:
        yield found
    finally:
        _watched.clear()
        if _listing(folder, own) != before:
            found.append("a file of the folder was changed")


def _listing(folder: Path, own: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if not path.name.startswith(own.name)
    }


_hooked = False


def fuzz(reader: Reader, folder: Path, count: int, start: int = 0) -> Tally:
    """Read ``count`` wrong files, or as many as hypothesis finds in four times as many draws.

    Args:
        reader: of a kind of files.
        folder: empty; for the file, and for others that must stay what they are.
        count: of files.
        start: seed.
    """
    global _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    tally, seen = Tally(), set[bytes]()
    own = folder / f"given{reader.suffix}"
    beside = folder / "beside"
    beside.mkdir()
    (beside / "kept").write_text("as it was", encoding="utf-8")
    own.write_bytes(reader.content)
    reader.use(own)  # a sound file is read, and what is imported late is there
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @seed(start)
    @settings(
        max_examples=4 * count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.wrong)
    def one(content: bytes) -> None:
        digest = hashlib.sha256(content).digest()
        if tally.files == count or digest in seen:
            return
        tally.files += 1
        seen.add(digest)
        for left in folder.glob(f"{own.name}*"):
            left.unlink()
        own.write_bytes(content)
        began = time.perf_counter()
        with watched(folder, own) as written:
            try:
                with limited():
                    reader.use(own)
                tally.outcomes["read"] += 1
            except reader.errors as error:
                tally.outcomes[type(error).__name__] += 1
                if "\n" in str(error).strip():
                    tally.note(f"{type(error).__name__} of several lines", content)
            except (Exception, TooSlowError) as error:
                tally.note(_where(error), content)
        if written:
            tally.note(f"written: {written[0]}", content)
        tally.slowest = max(tally.slowest, time.perf_counter() - began)

    one()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most
    tally.memory_mib = round(grown / 1024, 1)
    return tally


@contextmanager
def limited() -> Iterator[None]:
    """Within LONGEST seconds and MOST_MEMORY more bytes."""

    def late(*_: object) -> None:
        raise TooSlowError

    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used * os.sysconf("SC_PAGE_SIZE") + MOST_MEMORY, hard))
    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _where(error: BaseException) -> str:
    """Class of an error and the last line of ours that it came through."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/rankopt" in frame.filename or "readers.py" in frame.filename
    ]
    last = frames[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.name}"
