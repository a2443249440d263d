"""Our side of the comparison: CPU time, peak memory, and the frontier against exact optima.

CPU time is ``time.process_time`` around ``solve`` alone: the Problem is built (its arrays are in
memory), but nothing is prepared. Peak memory is what tracemalloc sees, NumPy's arrays included, of
the input arrays, the Problem made of them, and the solve, over the bytes of the input arrays
(cost int64 and loss float64 of every option); the interpreter and imported modules do not count.
"""

import statistics
import time
import tracemalloc
from typing import Any

import numpy as np
from cases import Case

from rankopt_solvers import Solution, frontier, solve, verify

#: A solve that takes longer (CPU seconds) is timed once.
SHORT = 2.0
REPEATS = 5
#: Seconds that a layer-wise problem may take before its gap counts.
LAYERWISE_LIMIT = 10.0


def exact(case: Case) -> tuple[Solution, float]:
    """The verified solution and the median CPU seconds of a few solves on new Problems."""
    options = {} if case.objective == "sum" else {"time_limit": LAYERWISE_LIMIT}
    seconds: list[float] = []
    while not seconds or (len(seconds) < REPEATS and seconds[0] < SHORT):
        problem = case.problem()
        started = time.process_time()
        solution = solve(problem, "exact", **options)
        seconds.append(time.process_time() - started)
    verify(problem, solution)
    return solution, statistics.median(seconds)


def build(case: Case) -> float:
    """The median CPU seconds of making the Problem of arrays that are read-only."""
    seconds = []
    for array in (*case.costs, *case.losses):
        array.flags.writeable = False
    for _ in range(REPEATS):
        started = time.process_time()
        case.problem()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def memory_ratio(case: Case, writable: bool = False) -> float:
    """Peak bytes of inputs, Problem and exact solve over the bytes of the inputs.

    Arrays that are writable are copied by Group, so that nobody can change them later: that is one
    time the inputs more.
    """
    tracemalloc.start()
    try:
        costs = tuple(cost.copy() for cost in case.costs)
        losses = tuple(loss.copy() for loss in case.losses)
        for array in (*costs, *losses):
            array.flags.writeable = writable
        copied = Case(
            case.instance, case.multiple, case.keep, case.objective, case.ranks, costs, losses,
            case.budget, case.total,
        )  # fmt: skip
        solve(copied.problem(), "exact")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak / sum(array.nbytes for array in (*costs, *losses))


def bracket(case: Case, budgets: int) -> dict[str, Any]:
    """Build the frontier once and compare it with the exact optimum at many budgets.

    The budgets lie at equal distances between the cheapest choice and everything dense.

    Returns:
        ``cpu``: seconds of building; ``budgets``; ``proven``: how many optima were proven;
        ``violations``: budgets where bound <= optimum <= value does not hold; ``widest``: the
        widest bracket, as a part of the whole information.
    """
    problem = case.problem()
    started = time.process_time()
    curve = frontier(problem)
    seconds = time.process_time() - started
    ends = np.linspace(problem.smallest_cost, case.instance.dense, budgets + 2)[1:-1]
    violations, proven, widest = 0, 0, 0.0
    for budget in ends.astype(np.int64).tolist():
        best = solve(problem.with_budget(budget), "exact")
        bound, value = curve.bound(budget), curve.value(budget)
        proven += best.status == "optimal"
        # An unproven optimum lies between its own bound and loss.
        violations += not (bound <= best.loss and best.bound <= value)
        widest = max(widest, (value - bound) / case.total)
    return {
        "cpu": seconds,
        "budgets": budgets,
        "proven": proven,
        "violations": violations,
        "widest": widest,
    }
