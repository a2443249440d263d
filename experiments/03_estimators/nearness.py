"""How far row importances are from the reference's, and whether its standard errors say so."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from passes import Work, measured, one_by_one
from shortcuts import Rows


def compared(rows: Rows, reference: Rows) -> dict[str, float]:
    """How far row importances are from the reference's."""
    within, distances, masses = [], [], []
    for name, wanted in reference.items():
        got = rows[name]
        within.append(_spearman(got, wanted))
        distances.append(float(abs(got / got.sum() - wanted / wanted.sum()).sum() / 2))
        masses.append((got.sum(), wanted.sum()))
    ours, theirs = np.array(masses).T
    ratio = np.log(ours / theirs)
    return {
        "rows_median": float(np.median(within)),
        "rows_least": min(within),
        "distance_median": float(np.median(distances)),
        "layers": _spearman(ours, theirs),
        "scale": float(np.exp(ratio.mean())),
        "spread": float(ratio.std()),
    }


def _spearman(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    from scipy.stats import rankdata

    a, b = rankdata(one), rankdata(other)
    a, b = a - a.mean(), b - b.mean()
    length = math.sqrt(float(a @ a) * float(b @ b))
    # Nothing but ties is no order at all.
    return float(a @ b) / length if length > 0 else 0.0


def honesty(work: Work) -> list[dict[str, Any]]:
    """Standard errors that the data themselves suggest, against what other data really gave."""
    from rankopt.profile.jackknife import relative_standard_errors

    exact, other = measured(work, "exact"), measured(work, "other")
    names = list(work.found.modules)
    windows = one_by_one(work).windows
    parts = np.array([[rows[name].sum() for name in names] for rows in windows])
    mass = [np.array([each.rows[name].sum() for name in names]) for each in (exact, other)]
    change = np.log(mass[1] / mass[0])
    found = []
    for what, sums, units in (
        ("batches", exact.parts, exact.units),
        ("windows", parts, np.ones(len(parts))),
    ):
        errors = relative_standard_errors(sums, units)
        # Of the difference of two independent measurements of the same size.
        expected = math.sqrt(2) * errors
        sizes = abs(change) / expected
        found.append(
            {
                "parts": what,
                "count": len(units),
                "median_error": float(np.median(errors)),
                "largest_error": float(errors.max()),
                "expected_rms": float(np.sqrt(np.mean(expected**2))),
                "actual_rms": float(np.sqrt(np.mean(change**2))),
                "actual_common": float(change.mean()),
                "actual_spread": float(change.std()),
                "ratio_rms": float(np.sqrt(np.mean(sizes**2))),
                "within_one": float(np.mean(sizes < 1)),
                "within_two": float(np.mean(sizes < 2)),
            }
        )
    return found
