"""Loss curves: what is lost at every rank on offer.

For a backend that truncates the SVD of a weighted matrix with energies e_1 >= e_2 >= ... (squared
singular values), the loss of rank r is the tail e_{r+1} + e_{r+2} + ... (Eckart & Young 1936). A
tail is summed from its small end: ``total - (e_1 + ... + e_r)`` would lose the digits of small
losses, which are the ones that a plan weighs against each other. A backend without a closed form
computes its factors at a grid of ranks, and the curve has those ranks only.

A *scale* (``rankopt.profile.ScaleInfo``) is a factor for each layer that makes the curves of
different layers comparable.
"""

import dataclasses

import numpy as np

from rankopt.errors import ProfileError
from rankopt.layers import DENSE, FloatArray, Form, IntArray, Layer


@dataclasses.dataclass(frozen=True, eq=False)
class LossCurve:
    """Losses of one layer under one backend, from the decomposition to the solver.

    Attributes:
        ranks: int64 ``(G,)``, increasing, the first is 0; 0..K if the curve is complete.
        losses: float64 ``(G,)``, finite, >= 0, never rising.
        on_grid: whether the backend named its ranks; otherwise they are 0..K and not stored.
    """

    ranks: IntArray
    losses: FloatArray
    on_grid: bool = True

    @classmethod
    def complete(cls, losses: FloatArray) -> "LossCurve":
        """Losses at every rank 0..K, ``(K+1,)``."""
        return cls(np.arange(losses.size, dtype=np.int64), losses, on_grid=False)

    def require_sound(self, layer: Layer, backend: str) -> None:
        """Check all of the above against a layer.

        Raises:
            ProfileError: names the layer and the backend.
        """
        ranks, losses, largest = self.ranks, self.losses, min(layer.out_features, layer.in_features)
        what = f"layer {layer.name}: the {backend} loss curve"
        wanted = ranks.size if self.on_grid else largest + 1
        if ranks.ndim != 1 or losses.shape != (wanted,) or losses.dtype != np.float64:
            raise ProfileError(
                f"{what} must have {wanted} float64 losses, one for each rank, "
                f"got {losses.dtype} {losses.shape}"
            )
        if ranks.dtype != np.int64 or not ranks.size or ranks[0] != 0 or ranks[-1] > largest:
            raise ProfileError(
                f"{what} needs ranks from 0 to at most {largest}, got {ranks.tolist()[:5]}"
            )
        if (np.diff(ranks) <= 0).any():
            raise ProfileError(f"{what} has ranks that do not increase")
        if not np.isfinite(losses).all() or (losses < 0).any():
            raise ProfileError(f"{what} holds NaN, infinite or negative values")
        if (np.diff(losses) > 0).any():
            raise ProfileError(f"{what} rises with the rank")

    @property
    def full(self) -> float:
        """Loss of retaining nothing."""
        return float(self.losses[0])

    def lost(self, rank: int | None) -> float:
        """Loss at one of the curve's ranks, or dense (None)."""
        return 0.0 if rank is None else float(self.at(np.array([rank], dtype=np.int64))[0])

    def at(self, ranks: IntArray) -> FloatArray:
        """Losses at some of the curve's ranks, same shape; DENSE loses nothing.

        Raises:
            ProfileError: the curve has no such rank.
        """
        places = np.minimum(np.searchsorted(self.ranks, ranks), self.ranks.size - 1)
        missing = (self.ranks[places] != ranks) & (ranks != DENSE)
        if missing.any():
            raise ProfileError(f"the loss curve has no rank {ranks[missing][0]}")
        return np.where(ranks == DENSE, 0.0, self.losses[places])

    def offered(self, layer: Layer, multiple: int, form: Form = "pairs") -> IntArray:
        """Ranks of the curve that save parameters in the form and are multiples, then DENSE."""
        saving = layer.ranks(multiple, form)
        offered: IntArray = saving[(saving == DENSE) | np.isin(saving, self.ranks)]
        return offered
