"""What is read may be wrong, a process may be killed, a disk may be full: nothing breaks, or lies.

    python experiments/08_faults/run.py              all three, half an hour
    python experiments/08_faults/run.py --quick      a hundredth of it
    python experiments/08_faults/run.py --only fuzz  one of: fuzz, kill, full

Writes results.json beside this file (not with --quick). ``--kept FOLDER`` keeps the first file of
each fault that is found. Seeds are fixed; the moments at which processes are killed are not the
same on another machine.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# Before torch: children are forked, and that goes with one thread only.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from published import beside, provenance, write  # noqa: E402 (beside the folders of the experiments)

sys.path.insert(0, str(HERE.parents[1]))
sys.path.insert(0, str(HERE))


def interruptions(only: str | None, quick: bool) -> dict[str, Any]:
    """Kills and full disks, in children of this process."""
    import full
    import jobs
    import kill

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        given = jobs.prepare(folder)
        if only in (None, "kill"):
            (folder / "kill").mkdir()
            found["kill"] = kill.killed(given, folder / "kill", 2 if quick else 50)
            print("kill", found["kill"], flush=True)
        if only in (None, "full"):
            (folder / "full").mkdir()
            found["full"] = full.full(given, folder / "full", 2 if quick else 20)
            print("full", found["full"], flush=True)
    return found


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["fuzz", "kill", "full"])
    parser.add_argument("--kept", type=Path)
    parser.add_argument("--kinds", nargs="*", help="fuzz: these only")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import fuzz

    if arguments.kind:
        print(json.dumps(fuzz.one_kind(arguments.kind, arguments.count, arguments.kept)))
        return
    found: dict[str, Any] = {}
    if arguments.only in (None, "fuzz"):
        found["fuzz"] = fuzz.all_kinds(
            arguments.kinds, 0.01 if arguments.quick else 1.0, arguments.kept
        )
    if arguments.only != "fuzz":
        found |= interruptions(arguments.only, arguments.quick)
    if not arguments.quick:
        path = HERE / "results.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        whole = {part: {**before.get(part, {}), **rows} for part, rows in found.items()}
        merged = {name: part for name, part in {**before, **whole}.items() if name != "made"}
        how = beside(provenance(HERE), None if merged == found else before)
        write(path, json.dumps({"made": how, **merged}, indent=1) + "\n")
    faults = [x["faults"] for part in found.values() for x in part.values() if x["faults"]]
    assert not faults, faults
    print("ok")


if __name__ == "__main__":
    main()
