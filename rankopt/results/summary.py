"""What results say of each strategy: its loss with an interval, and how it compares.

Under several calibrations (profiles of other samples of the same data) a strategy has a mean loss,
and an interval by Student's t over them: how much a plan owes to the sample. Ranks of two
calibrations are compared by Spearman's correlation over the layers of the share that each keeps.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rankopt.errors import ResultsError
from rankopt.layers import Layer
from rankopt.results.correlation import Correlation, correlation, scipy_stats, spearman
from rankopt.results.paired import LEVEL, Difference, difference, holm
from rankopt.results.results import Measured, MeasuredPlan, Results


@dataclasses.dataclass(frozen=True)
class Line:
    """One strategy at one budget, over all calibrations.

    Attributes:
        plans: of each calibration.
        kept: realised share of the planned layers' parameters, mean.
        predicted: increase of the loss of a target, mean; None where a plan predicts none.
        loss: mean; None where one is not finite.
        half_width: of the interval of the loss over calibrations; None of one.
        metrics: means; None where one is not defined.
        also: ``loss of NAME``, and the metrics likewise, of other data: means.
        stability: Spearman's correlation of ranks, mean over pairs of calibrations; None of one,
            and of ranks that are the same for all layers.
        against: how it compares with the reference at the same budget; None of that itself.
    """

    plans: tuple[MeasuredPlan, ...]
    kept: float
    predicted: float | None
    loss: float | None
    half_width: float | None
    metrics: Mapping[str, float | None]
    also: Mapping[str, float | None]
    stability: float | None
    against: Difference | None = None

    @property
    def measured(self) -> tuple[Measured, ...]:
        """Of each calibration; empty if the models were not measured."""
        return tuple(row.measured for row in self.plans if row.measured is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the plans."""
        return {
            "strategy": self.strategy,
            "keep": self.keep,
            "calibrations": len(self.plans),
            "kept": self.kept,
            "predicted": self.predicted,
            "loss": self.loss,
            "half_width": self.half_width,
            "stability": self.stability,
            **self.also,
            **self.metrics,
            "against": None if self.against is None else dataclasses.asdict(self.against),
        }

    @property
    def strategy(self) -> str:
        """As it is written, with backend and form."""
        return self.plans[0].strategy

    @property
    def keep(self) -> float:
        """What was asked for."""
        return self.plans[0].keep


def summarise(results: Results, against: str | None = None) -> list[Line]:
    """One line for each strategy and budget.

    Args:
        results: plans that were not measured are left out.
        against: the strategy that the others are compared with, as it was asked for; none if None.

    Raises:
        ResultsError: no such strategy.
        MissingExtraError: scipy is not there.
    """
    order = {each.digest: place for place, each in enumerate(results.calibrations)}
    plans = [row for row in results.plans if row.measured is not None]
    plans.sort(key=lambda row: order[row.calibration])
    lines = lines_of(results.layers, plans)
    return lines if against is None else compared_with(lines, against)


def lines_of(layers: Sequence[Layer], plans: Iterable[MeasuredPlan]) -> list[Line]:
    """The plans of all calibrations together, in their order.

    Args:
        layers: in the order of the plans' ranks.
        plans: measured or not.
    """
    grouped: dict[tuple[object, ...], list[MeasuredPlan]] = {}
    for row in plans:
        grouped.setdefault(row.line, []).append(row)
    return [_line(layers, rows) for rows in grouped.values()]


def compared_with(lines: Sequence[Line], against: str) -> list[Line]:
    """The same lines, each compared with a strategy at the same budget.

    Classifiers by accuracy, all others by loss; p is corrected for all comparisons together.

    Args:
        lines: measured.
        against: the strategy, as it was asked for.

    Raises:
        ResultsError: no such strategy.
        MissingExtraError: scipy is not there.
    """
    references = {line.keep: line for line in lines if line.strategy == against}
    if not references:
        known = ", ".join(dict.fromkeys(line.strategy for line in lines))
        raise ResultsError(f"no strategy {against!r} to compare with; measured: {known}")
    found = [_against(line, references.get(line.keep)) for line in lines]
    corrected = iter(holm([each.p for each in found if each is not None]))
    return [
        line
        if each is None
        else dataclasses.replace(line, against=dataclasses.replace(each, corrected=next(corrected)))
        for line, each in zip(lines, found, strict=True)
    ]


def increases(lines: Sequence[Line], dense: float) -> list[float | None]:
    """What was measured of what a plan predicts, of each line.

    A profile predicts how far the predictions go from the dense model's. The loss rises by as much
    on average if the dense model is right about its own errors; that of a model too sure of itself
    falls when it is damaged. So it is the divergence where all lines have one, else the loss over
    dense.

    Args:
        lines: see summarise.
        dense: loss of the dense model.

    Returns:
        None where a loss is not finite.
    """
    if _have_divergence(lines):
        return [line.metrics.get("divergence") for line in lines]
    return [None if line.loss is None else line.loss - dense for line in lines]


def increase_name(lines: Sequence[Line]) -> str:
    """What increases returns, in words."""
    return "divergence from dense" if _have_divergence(lines) else "increase over dense"


def _have_divergence(lines: Sequence[Line]) -> bool:
    """Of every line with a finite loss: an older file may have some without."""
    finite = [line for line in lines if line.loss is not None]
    return bool(finite) and all(line.metrics.get("divergence") is not None for line in finite)


def prediction(lines: Sequence[Line], dense: float) -> dict[str, Correlation]:
    """Whether predictions order plans as their measured losses do.

    Args:
        lines: see summarise.
        dense: loss of the dense model.

    Returns:
        Backend -> correlation of predicted and measured increase (see increases); see correlation
        for those that have none.

    Raises:
        MissingExtraError: scipy is not there.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for line, increase in zip(lines, increases(lines, dense), strict=True):
        if line.predicted is not None and increase is not None:
            found.setdefault(line.plans[0].backend, []).append((line.predicted, increase))
    correlated = {name: correlation(*zip(*pairs, strict=True)) for name, pairs in found.items()}
    return {name: each for name, each in correlated.items() if each is not None}


def _line(layers: Sequence[Layer], rows: Sequence[MeasuredPlan]) -> Line:
    measured = [row.measured for row in rows if row.measured is not None]
    dense = sum(layer.dense_cost for layer in layers)
    loss, half_width = interval_of([each.loss for each in measured])
    return Line(
        tuple(rows),
        float(np.mean([row.parameters for row in rows])) / dense,
        mean_of([row.predicted for row in rows]),
        loss,
        half_width,
        {name: mean_of([each.metrics.get(name) for each in measured]) for name in _names(measured)},
        {
            name: mean_of([each.of_others.get(name) for each in measured])
            for name in dict.fromkeys(name for each in measured for name in each.of_others)
        },
        _stability(layers, rows),
    )


def _names(measured: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(name for each in measured for name in each.metrics))


def _against(line: Line, reference: Line | None) -> Difference | None:
    """Of the calibrations that both have."""
    if reference is None or reference.strategy == line.strategy:
        return None
    these, those = _by_calibration(line), _by_calibration(reference)
    shared = [name for name in these if name in those]
    ours = [these[name] for name in shared]
    if not shared:
        return None
    of_classifier = all(each.example_correct is not None for each in ours)
    return difference(
        ours, [those[name] for name in shared], "accuracy" if of_classifier else "loss"
    )


def _by_calibration(line: Line) -> dict[str, Measured]:
    return {row.calibration: row.measured for row in line.plans if row.measured is not None}


def mean_of(values: Sequence[float | None]) -> float | None:
    """None where one is missing, or all are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def interval_of(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean, and half of the width of its interval by Student's t; None of one value.

    Raises:
        MissingExtraError: scipy is not there.
    """
    mean = mean_of(values)
    if mean is None or len(values) < 2:
        return mean, None
    error = float(np.std(np.array(values, np.float64), ddof=1)) / len(values) ** 0.5
    return mean, error * float(scipy_stats().t.ppf((1 + LEVEL) / 2, len(values) - 1))


def _stability(layers: Sequence[Layer], rows: Sequence[MeasuredPlan]) -> float | None:
    kept = [
        [
            layer.cost(rank, row.form) / layer.dense_cost
            for layer, rank in zip(layers, row.ranks, strict=True)
        ]
        for row in rows
    ]
    return mean_of([spearman(*pair) for pair in itertools.combinations(kept, 2)])
