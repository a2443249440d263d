"""What a profile costs: the pass over the data, its memory, the spectra.

    python experiments/02_profile_cost/run.py          everything: 40 minutes of one idle core
    python experiments/02_profile_cost/run.py --quick  tiny models: do all ways still agree?

Peers that are not installed are left out; the README has the command that installs them. Parts can
be run alone with --only; what the others wrote before is kept. Writes results.json and table.md
beside this file, or to --results (not with --quick). Fails if ways to one figure disagree; a goal
that is missed is a line in the table.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch: all times are one thread's

import argparse
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import goals
import iterations
import models
import peers
import spectra
import torch
from models import Case
from peers import MissingError, Way
from timing import interleaved, ratio

from rankopt.measure.collector import Collector

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from published import provenance, publish  # noqa: E402 (beside the folders of the experiments)

PARTS = ("cost", "memory", "spectra", "iterations")
ROUNDS, QUICK_ROUNDS = 3, 2
#: Relative to the largest row of a layer.
AGREEMENT = 1e-5

Row = dict[str, Any]


def ours(needs: frozenset[str]) -> Callable[[torch.nn.Module, Case], Way]:
    """Our pass, as a way: the one place that knows the product's interface."""

    def prepare(model: torch.nn.Module, case: Case) -> Way:
        collector = Collector(model, models.planned(model), needs)
        # Held open, as over the batches of a profile; the twin is used for nothing else.
        collector.__enter__()
        batch, passes = case.batch(), [0]

        def run() -> None:
            collector.begin(case.examples, case.tokens)
            collector.backward(models.summed_loss(model, *batch))
            passes[0] += 1

        return Way(
            run, lambda: {name: sums.rows / passes[0] for name, sums in collector.sums.items()}
        )

    return prepare


def all_ways() -> dict[str, Callable[[torch.nn.Module, Case], Way]]:
    """Peers and ours; the plain pass first."""
    return {**peers.PEERS, **{name: ours(needs) for name, needs in goals.OURS.items()}}


def cost(case: Case, rounds: int) -> Row:
    """Ratios of all ways to a plain pass, and how far the exact ones are from the loop."""
    model = case.model()
    ways: dict[str, Way] = {}
    missing: dict[str, str] = {}
    for name, prepare in all_ways().items():
        try:
            ways[name] = prepare(models.twin(model), case)
        except MissingError as error:
            missing[name] = str(error)
    seconds = interleaved({name: way.run for name, way in ways.items()}, rounds)
    exact = {name: way.rows() for name, way in ways.items() if way.rows is not None}
    errors = {name: _difference(exact[name], exact[goals.LOOP]) for name in exact}
    for name, error in errors.items():
        assert error <= AGREEMENT, f"{case.name}, {name}: rows differ by {error:.1e}"
    return {
        "case": case.name,
        "plain_seconds": min(seconds[goals.PLAIN]),
        "ratios": {name: ratio(seconds, name, goals.PLAIN) for name in seconds},
        "errors": errors,
        "missing": missing,
    }


def _difference(rows: peers.Rows, reference: peers.Rows) -> float:
    assert set(rows) == set(reference)
    return max(
        float((rows[name] - right).abs().max() / right.abs().max())
        for name, right in reference.items()
    )


def memory(number: int, ways: Sequence[str]) -> Row:
    """Peak memory of a pass above the loaded model; every way in a process of its own."""
    case = models.memory()[number]
    peaks = {}
    # Freed memory goes back at once: what a pass needs, and not what glibc held on to, which
    # differs by a quarter from run to run.
    frugal = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in ways:
        command = [sys.executable, str(HERE / "run.py"), "--peak", str(number), name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=frugal)
        if done.returncode:
            print(f"{case.name}, {name}: left out: {done.stderr.strip().splitlines()[-1]}")
            continue
        peaks[name] = int(done.stdout.splitlines()[-1])
    return {
        "case": case.name,
        "plain_bytes": peaks[goals.PLAIN],
        "parts": {name: peak / peaks[goals.PLAIN] for name, peak in peaks.items()},
    }


def peak(number: int, name: str) -> int:
    """Bytes of resident memory that two passes add at most, in this process."""
    case = models.memory()[number]
    model = case.model()
    way = all_ways()[name](model, case)
    gc.collect()
    # 5 sets the high-water mark back to what is resident now (proc_pid_clear_refs(5)).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    for _ in range(2):
        way.run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def full(folder: Path, parts: Sequence[str]) -> None:
    """Run parts and keep the others; both files are written after each."""
    results = folder / "results.json"
    before: Row = json.loads(results.read_text("utf-8")) if results.is_file() else {}
    found = dict(before)
    for part in parts:
        print(part, flush=True)
        found[part] = measured(part)
        write(folder, found, None if set(parts) == {*PARTS} else before)
    print(goals.goals_table(found["goals"]))


def measured(part: str) -> list[Row] | Row:
    """One part of the results."""
    if part == "memory":
        return [memory(k, list(all_ways())) for k in range(len(models.memory()))]
    if part == "spectra":
        return spectra.study(spectra.FULL)
    if part == "iterations":
        return iterations.study()
    rows = []
    for case in models.full():
        print(f"  {case.name}", flush=True)
        rows.append(cost(case, ROUNDS))
        gc.collect()
    return rows


def write(folder: Path, found: Row, earlier: Row | None) -> None:
    """Both files, of the parts that there are."""
    found["rounds"] = ROUNDS
    promised: list[goals.Goal] = []
    tables: list[str] = []
    if "cost" in found:
        promised += goals.of_cost(models.full(), found["cost"])
        tables += ["CPU time, parts of the plain pass:", goals.parts_table(found["cost"], "ratios")]
    if "memory" in found:
        promised += goals.of_memory(found["memory"])
        tables += ["Peak memory above the model, likewise:"]
        tables += [goals.parts_table(found["memory"], "parts")]
    if "spectra" in found:
        promised += goals.of_spectra(found["spectra"])
        tables += ["Spectra, factors, layers:", goals.spectra_tables(found["spectra"])]
    if "iterations" in found:
        tables += ["TFWSVD, errors as parts of the start's:"]
        # As they are after a round trip through JSON, whichever part was run now.
        tables += [goals.iterations_table(json.loads(json.dumps(found["iterations"])))]
    found["goals"] = [goal.row() for goal in promised]
    if promised:
        tables.insert(0, goals.goals_table(found["goals"]))
    how = provenance(HERE, "opacus", "backpack-for-pytorch")
    publish(folder, how, found, "\n".join(tables), earlier)


def quick() -> None:
    """All ways agree; nobody is absurdly slow; spectra are exact."""
    cases = models.quick()
    rows = [cost(case, QUICK_ROUNDS) for case in cases]
    for row in rows:
        for name, why in row["missing"].items():
            print(f"{row['case']}, {name}: left out: {why}")
        compared = set(row["errors"]) & {*goals.OURS, goals.LOOP, "torch.func vmap"}
        assert len(compared) == len(goals.OURS) + 2, f"compared only {sorted(compared)}"
        # Hooks cost more than the arithmetic of models as small as these.
        assert row["ratios"][goals.ROWS] < 20, f"{row['case']}: {row['ratios']}"
    found = spectra.study(spectra.QUICK)
    exact = [goal for goal in goals.of_spectra(found) if goal.name == "G11"]
    assert len(exact) == 2 and all(goal.met for goal in exact), [goal.row() for goal in exact]
    for row in rows:
        print(
            f"{row['case']}: {len(row['errors'])} ways agree to {max(row['errors'].values()):.0e}"
        )


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=PARTS, action="append", help="may be repeated")
    parser.add_argument("--results", type=Path, default=HERE, help="where they go")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Of peers, about their own insides.
    warnings.filterwarnings("ignore", category=UserWarning)
    if arguments.peak:
        print(peak(int(arguments.peak[0]), arguments.peak[1]))
        return
    if arguments.quick:
        quick()
    else:
        full(arguments.results, arguments.only or PARTS)
    print("ok")


if __name__ == "__main__":
    main()
