"""From a spectrum to the loss of every rank.

For a backend that truncates the SVD of a weighted matrix with energies e_1 >= e_2 >= ... (squared
singular values), what is retained at rank r is e_1 + ... + e_r and what is lost is the tail
e_{r+1} + .... A *scale* turns the tail into comparable numbers across layers:

``nats`` (fwsvd)
    1/(2 * out) * tail: the second-order estimate 1/2 sum_ij F_ij dW_ij^2 of the increase of the
    loss of one example, with the Fisher information of a weight taken as the *mean* over its
    row (all weights that read the same input feature).
``sum`` (fwsvd)
    the tail as in the paper (Hsu et al., ICLR 2022, section 3.2), where the Fisher information of a
    row is a *sum*: the same within a layer, but it counts wide layers more.
``frobenius`` (svd)
    the tail of the plain spectrum: squared weights, no information about the loss.
"""

import numpy as np
import numpy.typing as npt

from rankopt.errors import BudgetError
from rankopt.layers import DENSE, IntArray, Layer

FloatArray = npt.NDArray[np.float64]

#: Scales of each backend; the first is the default.
SCALES: dict[str, tuple[str, ...]] = {"fwsvd": ("nats", "sum"), "svd": ("frobenius",)}


def find_scale(backend: str, scale: str | None) -> str:
    """The scale by name, or the backend's default.

    Raises:
        BudgetError: the backend has no such scale; lists those it has.
    """
    known = SCALES[backend]
    if scale is None:
        return known[0]
    if scale not in known:
        raise BudgetError(f"backend {backend!r} has no scale {scale!r}; known: {', '.join(known)}")
    return scale


def scale_factor(layer: Layer, scale: str) -> float:
    """What a layer's energies are multiplied with."""
    return 0.5 / layer.out_features if scale == "nats" else 1.0


def tails(energies: FloatArray) -> FloatArray:
    """Energy lost at every rank 0..K, shape ``(K+1,)``; summed from the small end."""
    return np.append(np.cumsum(energies[::-1])[::-1], 0.0)


def loss_at(energies: FloatArray, ranks: IntArray) -> FloatArray:
    """Energy lost at each of the ranks; DENSE loses nothing."""
    lost = tails(energies)
    return np.where(ranks == DENSE, 0.0, lost[np.minimum(ranks, lost.size - 1)])
