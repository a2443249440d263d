"""HiGHS through cvxpy, each program in a child process that can be killed.

``full`` is the plain integer program of a case: one binary per option in one vectorised variable,
one option per layer, the budget; no option is fixed beforehand. Losses enter as parts of the
largest one and costs as multiples of their common divisor, because HiGHS' tolerances are absolute.
It may stop at a relative gap of RELATIVE_GAP. ``grid`` is the same program on the ten ratios of
peers.RATIOS, at HiGHS' own default gap: the model of NVIDIA ModelOpt's ``auto_quantize`` (LPS in
modelopt.torch.opt.searcher, commit a2fbac7ba), with ranks in place of bits.

``knapsack`` solves a case with rankopt_solvers' ``exact`` and ``knapsack`` at each of SCALES.

HiGHS treats its time limit as advice, hence the children: one that overruns its hard limit is
killed.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RELATIVE_GAP = 1e-9
DEFAULT_GAP = 1e-4
SCALES = (1e-12, 1e-6, 1.0, 1e6)


@dataclasses.dataclass(frozen=True)
class Job:
    """One child: what to solve, from which file, and for how many seconds.

    Attributes:
        time_limit: the solver's own limit.
        hard_limit: of wall time, after which the child is killed.
    """

    mode: str
    file: Path
    budget: int
    time_limit: float
    hard_limit: float


def save(path: Path, costs: Sequence[np.ndarray], losses: Sequence[np.ndarray]) -> Path:
    """Write option tables for the children."""
    sizes = np.array([cost.size for cost in costs])
    np.savez(path, cost=np.concatenate(costs), loss=np.concatenate(losses), sizes=sizes)
    return path


def run(job: Job) -> dict[str, Any]:
    """Run a child and return what it found, or a status that says how it ended."""
    command = [sys.executable, __file__, job.mode, str(job.file), str(job.budget)]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, str(job.time_limit)],
            capture_output=True,
            text=True,
            timeout=job.hard_limit,
        )
    except subprocess.TimeoutExpired:
        found: dict[str, Any] = {"status": f"killed after {job.hard_limit:.0f} s"}
    else:
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            found = {"status": f"failed ({done.returncode}): {last[:200]}"}
        else:
            found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "wall": time.perf_counter() - started}


def run_all(jobs: Sequence[Job], workers: int) -> list[dict[str, Any]]:
    """Run all jobs, ``workers`` at a time, in order of the jobs."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, jobs))


def integer_program(
    cost: np.ndarray, loss: np.ndarray, sizes: np.ndarray, budget: int, limit: float, gap: float
) -> dict[str, Any]:
    """Solve one binary per option; shapes ``(N,)``, ``(N,)``, ``(G,)``.

    Returns:
        ``status``; ``choice`` (option of each layer) or None; ``bound`` on the loss, as HiGHS has
        it; ``cpu``: CPU seconds of stating and solving.
    """
    import cvxpy as cp
    from scipy.sparse import csr_array

    started = time.process_time()
    group = np.repeat(np.arange(sizes.size), sizes)
    divisor, unit = int(np.gcd.reduce(cost)), float(loss.max())
    one_each = csr_array(
        (np.ones(cost.size), (group, np.arange(cost.size))), shape=(sizes.size, cost.size)
    )
    take = cp.Variable(cost.size, boolean=True)
    program = cp.Problem(
        cp.Minimize((loss / unit) @ take),
        [one_each @ take == 1, (cost // divisor) @ take <= budget // divisor],
    )
    try:
        program.solve(
            solver=cp.HIGHS, time_limit=limit, mip_rel_gap=gap, mip_abs_gap=0.0, threads=1
        )
    except cp.SolverError as error:
        return {"status": f"failed: {str(error)[:200]}"}
    info = program.solver_stats.extra_stats
    found: dict[str, Any] = {
        "status": "limit" if "limit" in program.status else program.status,
        "bound": float(info.mip_dual_bound) * unit,
        "cpu": time.process_time() - started,
        "choice": None,
    }
    # Without an incumbent cvxpy reports zeros (or nothing), which take no option of any layer.
    values = take.value
    if values is not None and np.array_equal(one_each @ np.round(values), np.ones(sizes.size)):
        first = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        found["choice"] = (np.flatnonzero(np.round(values) == 1) - first).tolist()
    if not math.isfinite(found["bound"]):
        found["bound"] = None
    return found


def compare_scales(
    cost: np.ndarray, loss: np.ndarray, sizes: np.ndarray, budget: int, limit: float
) -> list[dict[str, Any]]:
    """``exact`` and ``knapsack`` on the losses times each of SCALES."""
    from rankopt_solvers import Group, Problem, solve

    cuts = np.cumsum(sizes)[:-1]
    costs, losses = np.split(cost, cuts), np.split(loss, cuts)
    rows = []
    for scale in SCALES:
        groups = tuple(
            Group(f"g{g}", c, v * scale) for g, (c, v) in enumerate(zip(costs, losses, strict=True))
        )
        problem = Problem(groups, budget)
        exact = solve(problem, "exact")
        knapsack = solve(problem, "knapsack", time_limit=limit)
        rows.append(
            {
                "scale": scale,
                "exact": exact.loss,
                "exact_status": exact.status,
                "knapsack": knapsack.loss,
                "knapsack_status": knapsack.status,
                "highs": str(knapsack.stats.get("highs_status", "not needed")),
                "kept_greedy": bool(knapsack.stats.get("kept_greedy", False)),
            }
        )
    return rows


def main() -> None:
    """The child: solve one job and print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["full", "grid", "knapsack"])
    parser.add_argument("file", type=Path)
    parser.add_argument("budget", type=int)
    parser.add_argument("time_limit", type=float)
    given = parser.parse_args()
    with np.load(given.file) as tables:
        cost, loss, sizes = tables["cost"], tables["loss"], tables["sizes"]
    found: dict[str, Any]
    if given.mode == "knapsack":
        rows = compare_scales(cost, loss, sizes, given.budget, given.time_limit)
        found = {"status": "ended", "rows": rows}
    else:
        gap = RELATIVE_GAP if given.mode == "full" else DEFAULT_GAP
        found = integer_program(cost, loss, sizes, given.budget, given.time_limit, gap)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
