"""What a backend is: a weighting of a layer's error, and the factors that minimise it.

A backend of your own is an object with the attributes and methods of ``Backend``. It is named
``module:object``, or installed under the entry point group ``rankopt.backends``;
``rankopt.testing.check_backend`` says whether it keeps its promises. The chief one: the loss it
reports for a rank is the error of the factors that it gives for that rank.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from rankopt.backends import projection
from rankopt.backends.statistics import VECTORS, Statistics
from rankopt.profile.curves import LossCurve

Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Scale:
    """A way to compare layers.

    Attributes:
        unit: of losses multiplied with the factor; ``{unit}`` stands for example or token.
        factor: (out, in) and statistics -> what a layer's losses are multiplied with.
    """

    unit: str
    factor: Callable[[Shape, Statistics], float]


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """What a backend found for one layer, K = min(out, in).

    Attributes:
        losses: error of the factors, float64 and not increasing: at every rank 0..K, shape
            ``(K+1,)``, or at ``ranks``.
        kept: arrays that ``factors`` needs again, by kind; at most ``largest`` columns are used.
        ranks: for a backend that knows its loss at some ranks only: these, the first one 0.
        projections: Z and Q, each ``(K, K)``, where the factors of every rank r are Q_r Z_r^T W
            (out <= in) or W Z_r Q_r^T: what it takes to value them otherwise (see valued).
        made: ``up`` and ``down`` for each of ``ranks``, where they are there anyhow.
    """

    losses: Tensor
    kept: Mapping[str, Tensor]
    ranks: tuple[int, ...] | None = None
    projections: tuple[Tensor, Tensor] | None = None
    made: Sequence[tuple[Tensor, Tensor]] | None = None

    def curve(self) -> LossCurve:
        """The losses as a profile has them."""
        losses = self.losses.double().cpu().numpy()
        if self.ranks is None:
            return LossCurve.complete(losses)
        return LossCurve(np.array(self.ranks, dtype=np.int64), losses)


@runtime_checkable
class Backend(Protocol):
    """The protocol.

    Attributes:
        name: in profiles, plans and on the command line; letters, digits, ``_``, ``+`` and ``-``.
        source: paper and equation.
        needs: statistics that it reads (see rankopt.backends.statistics).
        scales: by name; the first is the default.
    """

    name: str
    source: str
    needs: frozenset[str]
    scales: Mapping[str, Scale]

    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        """Losses of all ranks of W ``(out, in)``, and what factors up to ``largest`` need."""
        ...

    def factors(
        self, weight: Tensor, kept: Mapping[str, Tensor], rank: int
    ) -> tuple[Tensor, Tensor]:
        """``up`` (out, rank) and ``down`` (rank, in) from what decompose kept."""
        ...

    def error(self, weight: Tensor, approximation: Tensor, statistics: Statistics) -> float:
        """Weighted error of an approximation of W, in the unit of the losses."""
        ...


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """A backend whose optimum is a truncated SVD of L^T W R (see projection).

    Attributes:
        name: see Backend.
        source: see Backend.
        needs: see Backend.
        scales: see Backend.
        metric: W and statistics -> the metric.
        weighted: whether inner weights are other than the identity, for (out, in).
        dual: whether C_out is other than the identity.
    """

    name: str
    source: str
    needs: frozenset[str]
    scales: Mapping[str, Scale]
    metric: Callable[[Tensor, Statistics], projection.Metric]
    weighted: Callable[[Shape], bool]
    dual: bool

    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        """See Backend."""
        both = statistics.has_moments
        found = projection.decompose(self.metric(weight, statistics), self.dual or both)
        kept = {"basis": found.basis[:, :largest]}
        if self.dual:
            assert found.dual is not None
            kept["dual"] = found.dual[:, :largest]
        tails = found.energies.flip(0).cumsum(0).flip(0)
        pair = (found.basis, found.basis if found.dual is None else found.dual) if both else None
        return Decomposition(torch.cat([tails, tails.new_zeros(1)]), kept, projections=pair)

    def factors(
        self, weight: Tensor, kept: Mapping[str, Tensor], rank: int
    ) -> tuple[Tensor, Tensor]:
        """See Backend."""
        identity = not self.weighted((weight.shape[0], weight.shape[1]))
        return projection.factors(weight, kept["basis"], kept.get("dual"), rank, identity)

    def error(self, weight: Tensor, approximation: Tensor, statistics: Statistics) -> float:
        """See Backend."""
        return projection.error(weight, approximation, self.metric(weight, statistics))


def recomputable(backend: Backend) -> bool:
    """Whether what a profile always holds is enough to decompose again, without the data."""
    return backend.needs <= VECTORS
