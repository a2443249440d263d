"""What was measured, by whom, and what is still to be measured: two studies read as one.

Plans that are measured as they are have no parameters and lie in a study of their own, so that
samplers see only trials they can learn from. A trial's user attributes hold its ``choice``, its
``source``, the ``seconds`` and, where that applies, ``repeats`` (the choice was known already) or
``failed`` (its loss is not a finite number).
"""

import math
import time
from collections.abc import Callable, Mapping

import numpy as np
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from rankopt_solvers.problem import Problem
from rankopt_solvers.search.records import Choice, Measured, StudyError
from rankopt_solvers.search.studies import open_study, quiet
from rankopt_solvers.search.workers import finish, finished, heartbeat, owner, requeue_dead
from rankopt_solvers.table import FloatArray

_FINISHED = (TrialState.COMPLETE, TrialState.FAIL)


class Ledger:
    """The studies of one search.

    Args:
        problem: that is searched.
        storage: an open one.
        name: of the search's study; that of the plans is called "... plans".
        identity: see open_study.
    """

    def __init__(
        self, problem: Problem, storage: BaseStorage, name: str, identity: dict[str, str]
    ) -> None:
        self.problem, self.storage = problem, storage
        self.plans = open_study(storage, f"{name} plans", identity)
        self.search = open_study(storage, name, identity)

    def queue(self, plans: Mapping[Choice, str], first: dict[str, float] | None) -> None:
        """Line up what nobody has measured or is measuring; ``first`` are a trial's parameters."""
        there = {
            self.choice_of(trial)
            for trial in self.plans.get_trials(deepcopy=False)
            if trial.state != TrialState.FAIL or "failed" in trial.user_attrs
        }
        for choice, source in plans.items():
            if choice not in there:
                self.plans.enqueue_trial({}, {"choice": list(choice), "source": source})
        if first:
            with quiet():
                self.search.enqueue_trial(first, skip_if_exists=True)

    def requeue_dead(self) -> None:
        """Fail and queue again what a process that is gone had taken."""
        longest = max((measured.seconds for measured in self.known().values()), default=3600.0)
        for study in (self.plans, self.search):
            requeue_dead(study, self.storage, 60.0 + 10.0 * longest)

    def known(self) -> dict[Choice, Measured]:
        """Every measured choice, in the order in which measuring ended."""
        ended = [
            trial
            for study in (self.plans, self.search)
            for trial in study.get_trials(deepcopy=False, states=_FINISHED)
            if trial.state == TrialState.COMPLETE or "failed" in trial.user_attrs
        ]
        ended.sort(key=lambda trial: (str(trial.datetime_complete), trial.number))
        found: dict[Choice, Measured] = {}
        for trial in ended:
            choice = self.choice_of(trial)
            if choice is not None and "repeats" not in trial.user_attrs:
                found.setdefault(choice, _measured(trial, choice))
        return found

    def choice_of(self, trial: FrozenTrial | Trial) -> Choice | None:
        """The choice that a trial measures; None if it has not got that far.

        Raises:
            StudyError: what the storage holds is no choice of the problem.
        """
        given = trial.user_attrs.get("choice")
        if given is None:
            return None
        groups = self.problem.groups
        if not (
            isinstance(given, list)
            and len(given) == len(groups)
            and all(
                type(j) is int and 0 <= j < group.cost.size
                for j, group in zip(given, groups, strict=True)
            )
        ):
            raise _damaged(trial, f"{given!s:.60} is no choice")
        return tuple(given)

    def evidence(self) -> tuple[FloatArray, FloatArray]:
        """Discarded masses ``(n, G)`` and losses ``(n,)`` of what has a finite loss."""
        pairs = [(m.choice, m.loss) for m in self.known().values() if m.loss is not None]
        masses = [
            [group.loss[j] for group, j in zip(self.problem.groups, choice, strict=True)]
            for choice, _ in pairs
        ]
        shape = (len(pairs), len(self.problem.groups))
        return np.array(masses, dtype=np.float64).reshape(shape), np.array([y for _, y in pairs])

    def taken(self, before: int | None = None) -> int:
        """Trials in somebody's hands or queued as plans; of the search, those below a number."""
        running = self.search.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        states = (TrialState.RUNNING, TrialState.WAITING)
        return len(self.plans.get_trials(deepcopy=False, states=states)) + sum(
            before is None or trial.number < before for trial in running
        )

    def waiting(self) -> bool:
        """Whether a plan is queued."""
        return bool(self.plans.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def measure_one(
        self,
        propose: Callable[[Trial], Choice],
        evaluate: Callable[[Choice], float],
        limit: int,
        source: str,
    ) -> Measured | str:
        """Take a trial and measure its choice, unless that is known or in other hands.

        Args:
            propose: the choice of a trial of the search.
            evaluate: the loss of a choice.
            limit: choices to be measured in all.
            source: to be noted for proposals.

        Returns:
            What was measured; or ``repeat``, or ``surplus`` where others are measuring the rest.
        """
        study = self.plans if self.waiting() else self.search
        with quiet():
            trial = study.ask()
        try:
            trial.set_user_attr("owner", owner())
            # Numbers are handed out one at a time: of all who came too late, the first goes on.
            late = study is self.search and self.taken(trial.number) + len(self.known()) >= limit
            if late or (study is self.plans and "choice" not in trial.user_attrs):
                finish(study, trial.number)
                return "surplus"
            if "choice" not in trial.user_attrs:
                trial.set_user_attr("choice", list(propose(trial)))
                trial.set_user_attr("source", source)
            choice = self.choice_of(trial)
            assert choice is not None, "it has just been proposed, or was looked for above"
            if self._told(study, trial, choice):
                return "repeat"
            return self._measure(study, trial, choice, evaluate)
        except UpdateFinishedTrialError:
            # Taken for dead, failed and queued again while this process had it in hand.
            if not finished(study, trial.number):
                raise
            return "repeat"
        except BaseException as error:
            with quiet():
                finish(study, trial.number)
            error.add_note(f"while measuring trial {trial.number} of study {study.study_name!r}")
            raise

    def _told(self, study: Study, trial: Trial, choice: Choice) -> bool:
        """Finish a trial whose choice is known, or in the hands of another trial."""
        # Both write their choice before they look, so at most one of two goes on. A plan's was
        # written when it was queued: it gives way only to the same plan with a lower number.
        plans = self.plans.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if study is self.plans:
            others = [other for other in plans if other.number < trial.number]
        else:
            proposals = self.search.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            others = plans + [other for other in proposals if other.number != trial.number]
        elsewhere = any(self.choice_of(other) == choice for other in others)
        known = self.known().get(choice)  # after it, so as to see what was finished in between
        if known is None and not elsewhere:
            return False
        trial.set_user_attr("repeats", True)
        finish(study, trial.number, None if known is None else known.loss)
        return True

    def _measure(
        self, study: Study, trial: Trial, choice: Choice, evaluate: Callable[[Choice], float]
    ) -> Measured | str:
        source = trial.user_attrs.get("source")
        if not isinstance(source, str):
            raise _damaged(trial, "it has no source")
        began = time.perf_counter()
        with heartbeat(study, self.storage, trial):
            loss = float(evaluate(choice))
        seconds = time.perf_counter() - began
        trial.set_user_attr("seconds", seconds)
        if not np.isfinite(loss):
            trial.set_user_attr("failed", f"the loss is {loss}")
        told = loss if np.isfinite(loss) else None
        if not finish(study, trial.number, told):
            return "repeat"  # as where it is taken for dead before
        return Measured(source, choice, told, seconds)


def _measured(trial: FrozenTrial, choice: Choice) -> Measured:
    attributes = trial.user_attrs
    try:
        loss = trial.value if trial.state == TrialState.COMPLETE else None
        seconds, source = float(attributes["seconds"]), attributes["source"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(trial, "it has no source, no seconds, or several losses") from error
    if not isinstance(source, str) or not (loss is None or math.isfinite(loss)):
        raise _damaged(trial, f"source {source!s:.60}, loss {loss}")
    return Measured(source, choice, loss, seconds)


def _damaged(trial: FrozenTrial | Trial, why: str) -> StudyError:
    return StudyError(
        f"trial {trial.number} in the storage is damaged ({why}): name another storage to start "
        "again"
    )
