"""What a search measured, and what it returns."""

import dataclasses
import hashlib
import json
import re

from rankopt_solvers.solution import Solution

Choice = tuple[int, ...]


class SearchError(ValueError):
    """The search cannot be run as asked, or nothing could be measured."""


class StudyError(SearchError):
    """The storage is damaged or cannot be opened, or holds a study of something else."""


class OtherStudyError(StudyError):
    """The storage holds a study of the same name about something else.

    Attributes:
        difference: "another problem (..., now ...)", the first that differs.
    """

    def __init__(self, name: str, difference: str) -> None:
        super().__init__(
            f"the study {name!r} is about {difference}: "
            "give another storage or study name, or what it was started with"
        )
        self.difference = difference


@dataclasses.dataclass(frozen=True)
class Measured:
    """One choice that was measured.

    Attributes:
        source: the names of the plans that chose it, joined by " = ", or the sampler's.
        choice: option index of each group.
        loss: measured; None if that gave no finite number.
        seconds: that measuring took.
    """

    source: str
    choice: Choice
    loss: float | None
    seconds: float

    @property
    def digest(self) -> str:
        """The first 12 digits of the sha256 of the choice."""
        return hashlib.sha256(json.dumps(self.choice).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The best measured choice, and all others.

    Attributes:
        solution: the best choice, certified for the problem as given; the solver is ``search``.
        loss: its measured loss.
        best_plan: the best of the plans that were handed in and the unweighted optimum.
        plan_loss: its measured loss, at least ``loss``; infinite if no plan has a finite one.
        trials: every measured choice, in the order in which measuring ended.
        measured_now: how many of them this call measured.
        exhausted: ended early, since no new choices were proposed.
    """

    solution: Solution
    loss: float
    best_plan: str
    plan_loss: float
    trials: tuple[Measured, ...]
    measured_now: int
    exhausted: bool

    @property
    def improvement(self) -> float:
        """How much less the search loses than the best plan; never negative."""
        return self.plan_loss - self.loss


def without_password(url: str) -> str:
    """A storage's URL as it may be shown."""
    return re.sub(r"(://[^/@]*:)[^/]*@", r"\1***@", url)
