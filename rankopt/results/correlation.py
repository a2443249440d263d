"""Spearman's rank correlation, and how sure it is.

The interval is that between percentiles over draws of the pairs with replacement (Efron &
Tibshirani, An Introduction to the Bootstrap, 1993). Pairs of plans are no independent sample, since
strategies resemble each other: it says what the correlation owes to single plans, no more.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rankopt.errors import MissingExtraError
from rankopt.layers import FloatArray
from rankopt.results.paired import LEVEL

_DRAWS = 1_999
_SEED = 0
#: With fewer pairs any order is likely.
FEWEST = 3


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Of pairs of figures.

    Attributes:
        rho: Spearman's; 1 is the same order.
        low: end of the interval.
        high: likewise.
        count: of the pairs.
    """

    rho: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.rho:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spearman(these: Sequence[float], those: Sequence[float]) -> float | None:
    """None where all of one side are the same."""
    if len(set(these)) < 2 or len(set(those)) < 2:
        return None
    return float(_pearson(_ranks(np.array([these])), _ranks(np.array([those])))[0])


def correlation(these: Sequence[float], those: Sequence[float]) -> Correlation | None:
    """With its interval; None of fewer than three pairs, or where all of one side are the same.

    Raises:
        MissingExtraError: scipy is not there.
    """
    rho, count = spearman(these, those), len(these)
    if rho is None or count < FEWEST:
        return None
    taken = np.random.default_rng(_SEED).integers(0, count, (_DRAWS, count))
    found = _pearson(_ranks(np.asarray(these)[taken]), _ranks(np.asarray(those)[taken]))
    # Draws of the same pair again and again have no order.
    low, high = np.nanquantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Correlation(rho, low, high, count)


def _ranks(values: FloatArray) -> FloatArray:
    ranks: FloatArray = scipy_stats().rankdata(values, axis=1)
    return ranks


def _pearson(these: FloatArray, those: FloatArray) -> FloatArray:
    """Of each row; NaN where one side has no variance."""
    these, those = (each - each.mean(1, keepdims=True) for each in (these, those))
    scale = np.sqrt((these**2).sum(1) * (those**2).sum(1))
    with np.errstate(invalid="ignore"):
        found: FloatArray = (these * those).sum(1) / scale
    return found


def scipy_stats() -> Any:
    """The module.

    Raises:
        MissingExtraError: scipy is not there.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("comparing results", "scipy", "eval") from error
    return stats
