"""How sure a ratio of sums is: the delete-one-batch jackknife.

A layer's Fisher information is a ratio of sums over batches, theta = sum_b s_b / sum_b u_b: summed
squared gradients over summed units. Leave out each of n batches in turn,

    theta_b = (S - s_b) / (U - u_b),    S = sum_b s_b,  U = sum_b u_b,

and the spread of these estimates is the variance of theta (Quenouille, Notes on bias in estimation,
Biometrika 1956; Efron & Stein, The jackknife estimate of variance, Annals of Statistics 1981):

    var(theta) = (n - 1)/n  sum_b (theta_b - mean_b theta_b)^2.

Batches may differ in size; examples within one may depend on each other. The estimate itself is
rough where there are few batches: with n of them, its own relative error is about 1/sqrt(2 n).
"""

import math

import numpy as np

from rankopt.layers import FloatArray


def relative_standard_errors(sums: FloatArray, units: FloatArray) -> FloatArray:
    """Standard error of each ratio, as a share of the ratio.

    Args:
        sums: s_b for each batch and layer, shape ``(n, layers)``, >= 0.
        units: u_b, shape ``(n,)``, >= 0; batches without units are left out.

    Returns:
        Shape ``(layers,)``, never NaN: infinite for all if fewer than two batches have units, 0 for
        a layer that has nothing in any batch.
    """
    sums, units = sums[units > 0], units[units > 0]
    count = units.size
    if count < 2:
        return np.full(sums.shape[1], math.inf)
    # The jackknife is linear in a layer's sums: with shares of their total nothing overflows, and
    # with shares of the largest neither does the total.
    largest = sums.max(axis=0)
    parts, units = sums / np.where(largest > 0, largest, 1.0), units / units.max()
    shares = parts / np.where(largest > 0, parts.sum(axis=0), 1.0)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        without = _others(shares) / _others(units)[:, None]
        spread = np.square(without - without.mean(axis=0)).sum(axis=0)
        # The ratio of the shares is 1 / U.
        errors: FloatArray = np.sqrt((count - 1) / count * spread) * units.sum()
    # All that was seen was in one batch, but for what is no number beside it.
    return np.where(np.isnan(errors), math.inf, errors)


def _others(values: FloatArray) -> FloatArray:
    """Sum of all others along the first axis: added up, as a difference would lose small ones."""
    before, after = np.zeros_like(values), np.zeros_like(values)
    before[1:] = values[:-1].cumsum(axis=0)
    after[:-1] = values[:0:-1].cumsum(axis=0)[::-1]
    found: FloatArray = before + after
    return found
