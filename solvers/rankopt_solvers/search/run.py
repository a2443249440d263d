"""Search for the choice with the smallest *measured* loss, when losses do not add up.

``evaluate(choice)`` is any number that a whole choice has: the validation loss of a compressed
model. Optuna never picks options: a trial proposes positive weights for the groups, the problem
with the reweighted losses is solved exactly, and that choice is measured. So every trial is within
the budget and optimal for *some* importance of the groups. Two parametrisations:

multipliers
    a log-multiplier for each kind of group and two coefficients over depth (see multipliers.py),
    with any Optuna sampler. The first trial is all zeros: the unweighted optimum.
``thompson``
    one weight for each group, drawn from a linear model of the loss (see thompson.py): the best
    one where losses do add up, but not on the real loss it was tried on (experiments/04_search).

Plans that are handed in, and the optimum of the problem as given (``unweighted``), are measured
first: the result is never worse than the best of them. No choice is measured twice: a proposal that
repeats one is told the known loss and does not count as a trial.

The same call in another process, with the same storage, joins in; a call after a crash goes on. All
return when ``trials`` choices have been measured by all together, with the best of them all.
"""

import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rankopt_solvers.problem import Problem, ProblemError
from rankopt_solvers.registry import Solver, solve
from rankopt_solvers.search.multipliers import (
    LARGEST,
    check_labels,
    multiplier_names,
    multiplier_weights,
    reweighted,
)
from rankopt_solvers.search.records import Choice, Measured, SearchError, SearchResult
from rankopt_solvers.solution import certify

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import Trial

    from rankopt_solvers.search.ledger import Ledger


SAMPLERS = ("cmaes", "tpe", "thompson", "gp", "random")
#: So many proposals in a row without a new choice, and there seem to be no new ones.
MOST_REPEATS = 50
POLL_SECONDS = 0.1


def search(
    problem: Problem,
    evaluate: Callable[[Choice], float],
    *,
    trials: int,
    kinds: Sequence[str] | None = None,
    depths: Sequence[float] | None = None,
    sampler: "str | BaseSampler" = "cmaes",
    plans: Mapping[str, Sequence[int]] | None = None,
    origin: float | None = None,
    storage: "str | os.PathLike[str] | BaseStorage | None" = None,
    study_name: str = "rankopt",
    label: str | Mapping[str, str] = "",
    seed: int = 0,
    solver: str | Solver = "exact",
    solver_options: Mapping[str, Any] | None = None,
    progress: Callable[[Measured, int], None] | None = None,
) -> SearchResult:
    """Measure ``trials`` choices within the budget, and return the best.

    With one process and one seed, an uninterrupted search repeats exactly. A resumed one makes new
    draws, from what was measured before.

    Args:
        problem: a sum problem.
        evaluate: the loss of a choice (one option index for each group); smaller is better.
        trials: choices to measure in all: the plans count, and what earlier or other processes
            measured in the same storage.
        kinds: a label for each group; groups of a kind share a multiplier. By default every group
            is its own kind.
        depths: a number in [0, 1] for each group.
        sampler: ``cmaes``, ``tpe``, ``gp``, ``random``, or a sampler of Optuna's for the
            multipliers; ``thompson``. On the real loss that was tried CMA-ES came first.
        plans: choices to measure first, by name.
        origin: the measured loss of discarding nothing, if known: it helps ``thompson``.
        storage: a journal file, the URL of a database, a storage of Optuna's; None for memory.
        study_name: name in the storage.
        label: what ``evaluate`` measures (a digest of model and data), or several such by name: a
            study is only resumed with the same label, problem and parametrisation. What differs is
            named, in this order.
        seed: of the sampler.
        solver: solves the reweighted problems.
        solver_options: passed to it.
        progress: called after each measured choice, with the number of measured choices so far.

    Raises:
        ProblemError: the objective is not the sum, or kinds or depths do not fit the groups.
        SolutionError: one of the plans does not fit the problem.
        InfeasibleError: even the cheapest choice is over the budget.
        SearchError: unknown sampler, fewer trials than plans, or no finite loss at all.
        StudyError: the storage is damaged or its study is about something else.
        ImportError: Optuna, or what the sampler needs, is not installed.
    """
    if problem.objective != "sum":
        raise ProblemError("search reweights the losses of a sum: give objective 'sum'")
    check_labels(problem, kinds, depths)
    if isinstance(sampler, str) and sampler not in SAMPLERS:
        raise SearchError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    options = dict(solver_options or {})
    optimum = solve(problem, solver, **options)
    named = _by_choice(problem, [*(plans or {}).items(), ("unweighted", optimum.choice)])
    if trials < len(named):
        raise SearchError(f"{trials} trials are too few: {len(named)} plans are measured first")
    weights_drawn = sampler == "thompson"
    ledger = _open(problem, storage, study_name, label, "weights" if weights_drawn else "kinds")
    names = multiplier_names(problem, kinds, depths)
    ledger.search.sampler = _sampler(ledger, sampler, kinds, depths, origin, seed)
    ledger.queue(named, None if weights_drawn else dict.fromkeys(names, 0.0))

    def propose(trial: "Trial") -> Choice:
        if weights_drawn:
            weights = np.array([trial.relative_params[f"weight:{g.name}"] for g in problem.groups])
        else:
            values = {name: trial.suggest_float(name, -LARGEST, LARGEST) for name in names}
            weights = multiplier_weights(problem, kinds, depths, values)
        return solve(reweighted(problem, weights), solver, **options).choice

    source = sampler if isinstance(sampler, str) else type(sampler).__name__
    measured_now = repeats = 0
    while repeats < MOST_REPEATS:
        ledger.requeue_dead()
        known = ledger.known()
        if len(known) >= trials:
            break
        if len(known) + ledger.taken() >= trials and not ledger.waiting():
            time.sleep(POLL_SECONDS)  # the rest is in other hands; they may die
            continue
        found = ledger.measure_one(propose, evaluate, trials, source)
        if isinstance(found, Measured):
            measured_now, repeats = measured_now + 1, 0
            if progress is not None:
                progress(found, len(ledger.known()))
        elif found == "repeat":
            repeats += 1
    return _result(problem, ledger, named, measured_now, repeats >= MOST_REPEATS)


def _by_choice(problem: Problem, plans: Iterable[tuple[str, Sequence[int]]]) -> dict[Choice, str]:
    named: dict[Choice, str] = {}
    for name, given in plans:
        choice = certify(problem, given, name).choice
        named[choice] = f"{named[choice]} = {name}" if choice in named else name
    return named


def _require(what: str, *modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            install = f"pip install 'rankopt[search]' {module}"
            raise ImportError(
                f"{what} needs {module}, which is not installed: {install}", name=module
            )


def _open(
    problem: Problem,
    storage: "str | os.PathLike[str] | BaseStorage | None",
    name: str,
    label: str | Mapping[str, str],
    parameters: str,
) -> "Ledger":
    _require("search", "optuna")
    from rankopt_solvers.search.ledger import Ledger
    from rankopt_solvers.search.storages import open_storage

    labels = {"label": label} if isinstance(label, str) else dict(label)
    identity = {**labels, "problem": problem.digest(), "parameters": parameters}
    return Ledger(problem, open_storage(storage), name, identity)


def _sampler(
    ledger: "Ledger",
    sampler: "str | BaseSampler",
    kinds: Sequence[str] | None,
    depths: Sequence[float] | None,
    origin: float | None,
    seed: int,
) -> "BaseSampler":
    import optuna

    from rankopt_solvers.search.studies import quiet
    from rankopt_solvers.search.thompson import ThompsonSampler

    if not isinstance(sampler, str):
        return sampler
    if sampler == "thompson":
        groups = [group.name for group in ledger.problem.groups]
        return ThompsonSampler(
            groups, ledger.evidence, kinds=kinds, depths=depths, origin=origin, seed=seed
        )
    there = len(ledger.search.get_trials(deepcopy=False))
    if there:
        # Whoever joins or resumes must not draw the same as who began.
        seed = int(np.random.SeedSequence([seed, there, os.getpid()]).generate_state(1)[0])
    needed = {"cmaes": ("cmaes",), "gp": ("scipy", "torch")}
    _require(f"sampler {sampler!r}", *needed.get(sampler, ()))
    with quiet():
        if sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed)  # starts in the middle, at zeros
        if sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed)
        if sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        return optuna.samplers.RandomSampler(seed=seed)


def _result(
    problem: Problem, ledger: "Ledger", named: dict[Choice, str], measured_now: int, ended: bool
) -> SearchResult:
    known = ledger.known()
    losses = {c: math.inf if m.loss is None else m.loss for c, m in known.items()}
    plan = min(named, key=lambda choice: losses.get(choice, math.inf))
    # Ties go to the plan: what the search found must be better to be preferred.
    best = min([plan, *known], key=lambda choice: losses.get(choice, math.inf))
    if not math.isfinite(losses.get(best, math.inf)):
        raise SearchError(f"none of {len(known)} measured choices has a finite loss")
    return SearchResult(
        certify(problem, best, "search"),
        losses[best],
        named[plan],
        losses.get(plan, math.inf),
        tuple(known.values()),
        measured_now,
        ended,
    )
