"""Wrong files of every kind, each kind in a process of its own."""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.fuzz import fuzz
from tests.readers import READERS

#: Files of each kind; data files of the other kinds.
COUNTS = {"plan": 10_000, "profile": 10_000, "journal": 2_000, "checkpoint": 6_000}
OTHERS = 1_700


def count_of(name: str) -> int:
    """How many files of a kind a full run reads."""
    return COUNTS.get(name, OTHERS)


def one_kind(name: str, count: int, kept: Path | None) -> dict[str, Any]:
    """Read wrong files of one kind, in this process.

    Args:
        name: in READERS.
        count: of files.
        kept: folder for the first file of each fault.
    """
    from rankopt_solvers.search import workers

    # A trial without an owner is waited for so long.
    workers.NOBODY_SECONDS = 0.05
    began, said = time.perf_counter(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(said):
        found = fuzz(READERS[name](), Path(folder).resolve(), count)
    for number, (fault, content) in enumerate(found.faults.items()):
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
            (kept / f"{name}.{number}").write_bytes(content)
            (kept / f"{name}.{number}.txt").write_text(fault + "\n", encoding="utf-8")
    return {
        "files": found.files,
        "outcomes": dict(found.outcomes),
        "faults": dict(found.counts),
        "slowest_seconds": round(found.slowest, 3),
        "memory_mib": found.memory_mib,
        "seconds": round(time.perf_counter() - began, 1),
    }


def all_kinds(names: list[str] | None, scale: float, kept: Path | None) -> dict[str, Any]:
    """Every kind, or those named, in a new process: so that memory is its own."""
    found = {}
    for name in names or READERS:
        count = max(1, round(count_of(name) * scale))
        command = [sys.executable, str(Path(__file__).with_name("run.py")), "--kind", name]
        command += ["--count", str(count), *(["--kept", str(kept)] if kept else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
    return found
