"""``kill -9`` at random moments; then the same again, which must equal an undisturbed run."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from jobs import Given, fork, jobs, leftovers, outcome, timed, wait


def killed(given: Given, folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Each job killed ``count`` times.

    Args:
        given: from prepare.
        folder: for what the jobs write.
        count: of kills of each job.
        seed: of the moments.
    """
    return {
        name: _one_job(name, given, folder / name, count, random.Random(seed))
        for name in jobs(given)
    }


def _one_job(
    name: str, given: Given, folder: Path, count: int, moments: random.Random
) -> dict[str, Any]:
    work = jobs(given)[name]
    folder.mkdir()
    clean, said = folder / "clean", folder / "said"
    clean.mkdir()
    seconds = timed(lambda: work(clean), said)
    wanted = outcome(name, clean)
    before = _before(name, given, folder)
    found: dict[str, Any] = {"kills": 0, "ended_first": 0, "left_something": 0, "faults": {}}
    number = 0
    while found["kills"] < count and number < 4 * count:
        number += 1
        place = folder / str(number)
        shutil.copytree(before, place) if before else place.mkdir()
        child = fork(lambda: work(place), said)  # noqa: B023 (it is called at once)
        time.sleep(moments.uniform(0, 1.05 * seconds))
        os.kill(child, signal.SIGKILL)
        found["kills" if wait(child) == -signal.SIGKILL else "ended_first"] += 1
        found["left_something"] += bool(leftovers(place))
        _check(name, work, place, said, wanted, found["faults"])
        shutil.rmtree(place)
    return {**found, "seconds_undisturbed": round(seconds, 2)}


def _before(name: str, given: Given, folder: Path) -> Path | None:
    """What is there already when a model folder is written: another model of ours."""
    if name not in ("apply", "save"):
        return None
    before = folder / "before"
    before.mkdir()
    from jobs import apply

    timed(lambda: apply(given, before / "out", given.other), folder / "said")
    return before


def _check(
    name: str, work: Any, place: Path, said: Path, wanted: Any, faults: dict[str, int]
) -> None:
    def note(fault: str) -> None:
        faults[fault] = faults.get(fault, 0) + 1

    code = wait(fork(lambda: work(place), said))
    if code:
        text = said.read_text(encoding="utf-8").strip()
        note(f"the same again ends with {code}: {text.splitlines()[-1] if text else ''}")
        return
    try:
        if outcome(name, place) != wanted:
            note("the outcome is another")
    except Exception as error:
        note(f"{type(error).__name__}: {error}")
    if leftovers(place):
        note(f"left: {leftovers(place)[:2]}")
