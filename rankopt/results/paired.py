"""Paired comparisons of two models on the same examples.

Two models that were measured on the same examples have errors in common: their difference is known
far better than either. With d_i the difference of an example and t_i its number of targets, the
difference is D = sum d_i / sum t_i.

*McNemar's test* (Psychometrika 12, 1947), exact: of the examples that one model alone gets right,
each is as likely to be of either model, if they are equally good. For classifiers with one label an
example, under one calibration.

*Paired bootstrap* (Efron & Tibshirani, An Introduction to the Bootstrap, 1993), for all others:
examples are drawn with replacement, both models on the same ones. The interval is that between the
percentiles of D, p twice the share of the draws on the side of zero that has fewer. Under several
calibrations each example's difference is their mean. A dozen examples are few: intervals are then
too narrow.

*Holm's correction* (Scand. J. Statistics 6, 1979): of m comparisons, the k-th smallest p is
multiplied by m - k + 1, and none is below the one before it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rankopt.errors import MissingExtraError
from rankopt.layers import FloatArray
from rankopt.results.results import Measured

#: Draws of a bootstrap: p is at least 2 / (DRAWS + 1).
DRAWS = 9_999
LEVEL = 0.95
_SEED = 0
#: Examples that are drawn at a time: what that takes of memory.
_AT_A_TIME = 2_000_000

What = Literal["loss", "accuracy"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much more one model has of something than another.

    Attributes:
        what: ``loss`` of a target, or ``accuracy``.
        mean: of the differences; negative where the first has less.
        low: end of the interval.
        high: likewise.
        p: how likely so large a difference is if there is none.
        test: ``McNemar`` or ``bootstrap``.
        corrected: p after Holm's correction for all comparisons of the table.
    """

    what: What
    mean: float
    low: float
    high: float
    p: float
    test: Literal["McNemar", "bootstrap"]
    corrected: float


def difference(
    these: Sequence[Measured], those: Sequence[Measured], what: What
) -> Difference | None:
    """What one model has more than another, on the same examples.

    Args:
        these: the first model, under each calibration.
        those: the other, under the same.
        what: is compared.

    Returns:
        None where that was not measured for each example.
    """
    name = "example_correct" if what == "accuracy" else "example_losses"
    targets = these[0].example_targets
    pairs = [
        (getattr(this, name), getattr(that, name)) for this, that in zip(these, those, strict=True)
    ]
    if targets is None or any(None in pair for pair in pairs):
        return None
    apart = np.array([np.subtract(this, that, dtype=np.float64) for this, that in pairs])
    each, counts = apart.mean(0), np.array(targets, np.float64)
    found = _drawn(each, counts)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    mean = float(each.sum() / counts.sum())
    if what == "accuracy" and len(pairs) == 1 and (counts == 1.0).all():
        p = _mcnemar(int((each > 0).sum()), int((each < 0).sum()))
        return Difference(what, mean, low, high, p, "McNemar", p)
    if not each.any():
        return Difference(what, 0.0, 0.0, 0.0, 1.0, "bootstrap", 1.0)
    fewer = min(int((found <= 0).sum()), int((found >= 0).sum()))
    p = min(1.0, 2.0 * (fewer + 1) / (DRAWS + 1))
    return Difference(what, mean, low, high, p, "bootstrap", p)


def holm(values: Sequence[float]) -> list[float]:
    """The values of p after Holm's correction, in their order."""
    order = np.argsort(values, kind="stable")
    raised = np.asarray(values)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return [float(p) for p in corrected]


def _drawn(each: FloatArray, counts: FloatArray) -> FloatArray:
    """The difference in every draw of the examples; the same draws for all pairs of models."""
    generator, examples = np.random.default_rng(_SEED), len(each)
    at_a_time, found = max(1, _AT_A_TIME // examples), []
    for start in range(0, DRAWS, at_a_time):
        shape = min(at_a_time, DRAWS - start), examples
        taken = generator.integers(0, examples, shape)
        found.append(each[taken].sum(1) / np.maximum(counts[taken].sum(1), 1.0))
    return np.concatenate(found)


def _mcnemar(only_these: int, only_those: int) -> float:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("McNemar's test", "scipy", "eval") from error
    if not only_these + only_those:
        return 1.0
    return float(stats.binomtest(only_these, only_these + only_those).pvalue)
