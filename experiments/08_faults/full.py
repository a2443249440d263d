"""A disk that is full at a random size: one line, an exit code, and everything as it was.

In two ways: a limit on the size of files (RLIMIT_FSIZE; the write fails with EFBIG), and, where the
system lets us, a small file system of its own (tmpfs; ENOSPC).
"""

import contextlib
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import Given, command, fork, jobs, leftovers, listing, make_profile, sha256, timed, wait

#: Exit code of what the system refuses.
REFUSED = 2
#: File systems of so many bytes at least hold nothing but a few pages.
SMALLEST = 16 * 1024


def _plan(given: Given, folder: Path) -> None:
    command("plan", given.profile, "--keep", 0.6, "-o", folder / "plan.json", "--force")


def works(given: Given) -> dict[str, Callable[[Path], None]]:
    """Name -> what writes into a folder of its own."""
    known = jobs(given)
    return {
        "profile": lambda folder: make_profile(given, folder / "p.st", every=0),
        "checkpoint": known["profile"],
        "plan": lambda folder: _plan(given, folder),
        "search": known["search"],
        "apply": known["apply"],
    }


def full(given: Given, folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Each job at ``count`` sizes in each of the two ways.

    Args:
        given: from prepare.
        folder: for what the jobs write.
        count: of sizes.
        seed: of the sizes.
    """
    found = {}
    for name, work in works(given).items():
        place = folder / name
        place.mkdir()
        found[name] = _one_job(name, work, place, count, random.Random(seed))
    return found


def _one_job(
    name: str, work: Callable[[Path], None], folder: Path, count: int, sizes: random.Random
) -> dict[str, Any]:
    clean, said = folder / "clean", folder / "said"
    clean.mkdir()
    timed(lambda: work(clean), said)
    contents = [path.stat().st_size for path in clean.rglob("*") if path.is_file()]
    found: dict[str, Any] = {"limits": 0, "file_systems": 0, "refused": 0, "faults": {}}
    for number in range(count):
        place = folder / f"limit{number}"
        # With what an earlier run has made: it must stay.
        shutil.copytree(clean, place) if number % 2 and name != "search" else place.mkdir()
        limit = sizes.randrange(1, max(contents))
        found["limits"] += 1
        _run(lambda: _limited(limit, work, place), place, said, found)  # noqa: B023
        shutil.rmtree(place)
        place = folder / f"system{number}"
        place.mkdir()
        size = sizes.randrange(SMALLEST, SMALLEST + sum(contents))
        with _file_system(place, size) as there:
            if there:
                found["file_systems"] += 1
                _run(lambda: work(place), place, said, found)  # noqa: B023
    return found


def _limited(limit: int, work: Callable[[Path], None], place: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        work(place)
    finally:
        # What is said of it goes to a file, too.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@contextlib.contextmanager
def _file_system(place: Path, size: int) -> Any:
    """A file system of so many bytes; whether there is one."""
    order = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        there = subprocess.run(order, capture_output=True, check=False).returncode == 0
    except OSError:
        there = False
    try:
        yield there
    finally:
        if there:
            subprocess.run(["umount", str(place)], check=True)


def _run(work: Callable[[], None], place: Path, said: Path, found: dict[str, Any]) -> None:
    def note(fault: str) -> None:
        found["faults"][fault] = found["faults"].get(fault, 0) + 1

    before = {name: sha256(place / name) for name in listing(place)}
    code = wait(fork(work, said))
    text = said.read_text(encoding="utf-8", errors="replace")
    if code == 0:
        return
    found["refused"] += 1
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if code != REFUSED or len(errors) != 1 or "Traceback" in text:
        note(f"exit code {code}: {text.strip().splitlines()[-1][:120] if text.strip() else ''}")
    after = {name: sha256(place / name) for name in listing(place)}
    lost = [name for name in before if after.get(name) != before[name]]
    if lost:
        note(f"changed: {lost[:2]}")
    # What was measured before the disk was full is kept, to go on with.
    kept = ("plan.json.journal", "p.st.partial", "out.partial")
    new = [n for n in after if n not in before and n.split("/")[0] not in kept]
    left = [name for name in leftovers(place) if name.split("/")[0] not in kept]
    if new or left:
        note(f"left: {(new + left)[:2]}")
