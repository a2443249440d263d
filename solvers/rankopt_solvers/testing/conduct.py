"""Promises about conduct, one function each: repeatable, polite, in time."""

import inspect
import pickle
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import SkipTest

import numpy as np

from rankopt_solvers.registry import Solver
from rankopt_solvers.testing.claims import require, same, solved
from rankopt_solvers.testing.instances import hard_problem, million_options, random_problem
from rankopt_solvers.verify import verify

#: Seconds by which a solver may overrun a time limit, or be late to hear that it should stop.
GRACE = 5.0
#: Seconds for a million options.
MINUTE = 60.0


def check_deterministic(solver: Solver) -> None:
    """The same problem gets the same answer, whatever the state of the global generators."""
    before: Any = np.random.get_state()  # noqa: NPY002
    python_before = random.getstate()
    runs = []
    try:
        for seed in range(4):
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            runs.append(solver(random_problem("generic", 0)))
    finally:
        np.random.set_state(before)  # noqa: NPY002
        random.setstate(python_before)
    for run in runs[1:]:
        same(runs[0], run)


def check_random_state_untouched(solver: Solver) -> None:
    """The caller's random numbers, numpy's and Python's, go on as if nothing had happened."""
    before: Any = np.random.get_state()  # noqa: NPY002
    python_before = random.getstate()
    solver(random_problem("generic", 1))
    after: Any = np.random.get_state()  # noqa: NPY002
    equal = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    require(equal, "numpy's global random state has changed")
    require(random.getstate() == python_before, "Python's global random state has changed")


def check_inputs_untouched(solver: Solver) -> None:
    """The problem is the same afterwards, bit by bit."""
    for problem in (random_problem("generic", 2), random_problem("unordered", 2)):
        groups, digest = problem.groups, problem.digest()
        copies = [(g.name, g.cost.copy(), g.loss.copy()) for g in groups]
        solver(problem)
        require(problem.groups is groups, "problem.groups was replaced")
        for group, (name, cost, loss) in zip(groups, copies, strict=True):
            require(np.array_equal(group.cost, cost), f"{name}: costs changed to {group.cost}")
            require(np.array_equal(group.loss, loss), f"{name}: losses changed to {group.loss}")
        require(problem.digest() == digest, "the digest changed: a name, or the budget")


def check_unknown_option_refused(solver: Solver) -> None:
    """A misspelt option raises TypeError instead of being ignored."""
    try:
        solver(random_problem("falling", 0), tiem_limit=1.0)
    except TypeError:
        return
    raise AssertionError("the option tiem_limit=1.0 was accepted")


def check_picklable(solver: Solver) -> None:
    """The solution survives pickle, so that it can come back from another process."""
    problem = random_problem("generic", 3)
    found = solver(problem)
    copy = pickle.loads(pickle.dumps(found))
    same(found, copy)
    verify(problem, copy)


def check_threads(solver: Solver) -> None:
    """Four threads that solve one problem get the answer that one gets."""
    alone, problem = solver(random_problem("generic", 4)), random_problem("generic", 4)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(solver, [problem] * 4):
            same(alone, found)


def _has(solver: Solver, option: str) -> bool:
    return option in inspect.signature(solver).parameters


def _in_time(solver: Solver, seconds: float, **options: Any) -> str:
    """Solve a problem that is hard to finish; the status."""
    problem = hard_problem()
    solver(random_problem("falling", 0))  # Loads what is loaded once.
    start = time.perf_counter()
    found = solver(problem, **options)
    taken = time.perf_counter() - start
    require(taken <= seconds, f"returned after {taken:.1f} s, {seconds:.1f} s allowed")
    return solved(lambda _: found, problem).status


def check_time_limit(solver: Solver) -> None:
    """``time_limit=0.05`` with 40,000 options that are hard to tell apart: a choice, soon."""
    if not _has(solver, "time_limit"):
        raise SkipTest("the solver has no option time_limit")
    _in_time(solver, 0.05 + GRACE, time_limit=0.05)


def check_should_stop(solver: Solver) -> None:
    """``should_stop`` is asked, and a solver told to stop returns a choice, soon."""
    if not _has(solver, "should_stop"):
        raise SkipTest("the solver has no option should_stop")
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return True

    status = _in_time(solver, GRACE, should_stop=stop)
    require(asked or status == "optimal", "should_stop was never asked")


def check_million_options(solver: Solver) -> None:
    """A thousand groups of a thousand options: within a minute, with a finite gap."""
    problem = million_options()
    options = {"time_limit": 10.0} if _has(solver, "time_limit") else {}
    start = time.perf_counter()
    found = solver(problem, **options)
    taken = time.perf_counter() - start
    require(taken <= MINUTE, f"returned after {taken:.0f} s, {MINUTE:.0f} s allowed")
    solved(lambda _: found, problem)
