"""What rounding a layer's weights loses, beside what its rank does.

Weights are rounded to the nearest of evenly spaced values around 0, as torchao does it (see
rankopt.model.rounding): of 8 bits with one scale for each row of a matrix, of 4 bits with one for
each group of 32 inputs. Of a layer of lower rank both matrices that it is kept in are rounded.

Errors d of single weights hardly correlate with each other, so that of the second-order estimate
the diagonal is left, the Fisher information F_ij of each weight,

    1/2 sum_ij d_ij^2 F_ij,    F_ij = rows_j columns_i / sum(rows),

whose margins were summed exactly, example for example: inputs that are large where gradients are
small (separators, the first token) count for what they are, which a product of two moments cannot
see. An error of one of two factors, W = U V, moves W in the direction of a column of U or a row of
V. What such a direction is worth is told by the moments, and the margin of the other side is exact:

    d of V:  1/2 sum_kj d_kj^2 rows_j    (U^T E[gg^T] U)_kk / tr E[gg^T]
    d of U:  1/2 sum_ik d_ik^2 columns_i (V E[xx^T] V^T)_kk / tr E[xx^T]

The two losses, of truncation and of rounding, add up.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankopt.backends.base import Backend, Decomposition
from rankopt.backends.statistics import Statistics
from rankopt.layers import DENSE, GROUP, Bits, Form, IntArray
from rankopt.model.lowrank import LowRank
from rankopt.model.pivoted import PivotedColumns, PivotedRows, kind_of

#: Statistics that it reads.
NEEDS = frozenset({"rows", "columns", "second_moment", "gradient_moment"})
#: Directions of a weight below this share of its largest count as none.
_RTOL = 1e-4


def rounded(matrix: Tensor, bits: Bits) -> Tensor:
    """A matrix ``(out, in)`` after rounding, in float32 or wider; for 4 bits in whole groups.

    Args:
        matrix: what is kept, in any dtype.
        bits: 8 or 4.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    groups = wide if bits == 8 else wide.reshape(len(wide), -1, GROUP)
    most = 2 ** (bits - 1)
    scale = groups.abs().amax(-1, keepdim=True) / (most - 0.5)
    steps = (groups / scale.clamp_min(torch.finfo(wide.dtype).tiny)).round().clamp(-most, most - 1)
    found: Tensor = (steps * scale).reshape(matrix.shape)
    return found


@torch.no_grad()
def rounding_losses(
    backend: Backend,
    weight: Tensor,
    seen: Statistics,
    made: Decomposition,
    ranks: IntArray,
    form: Form,
    bits: Sequence[Bits],
) -> dict[Bits, Tensor]:
    """Bits -> losses of rounding to them in nats of a unit, float64, shape of ``ranks``.

    Args:
        backend: that made the decomposition.
        weight: W, shape ``(out, in)``.
        seen: statistics of the layer, with all of ``NEEDS``.
        made: of this weight.
        ranks: of the factors, with DENSE; for 4 bits in whole groups.
        form: in which the factors are kept.
        bits: 8, 4.
    """
    worth = _Worth(weight, seen)
    found: list[Tensor] = []
    for rank in ranks.tolist():
        if rank == DENSE:
            lost = worth.of_weight(weight, bits)
        else:
            up, down = (each.to(weight.dtype) for each in backend.factors(weight, made.kept, rank))
            kind: Any = kind_of(False, (len(up), down.shape[1]), form)
            lost = worth.of_factors(kind.from_factors(down, up, None), bits)
        found.append(lost)
    return dict(zip(bits, torch.stack(found, 1), strict=True))


def _error(matrix: Tensor, bits: Bits) -> Tensor:
    return (rounded(matrix, bits).to(matrix.dtype) - matrix).double().square()


class _Worth:
    """What squared errors of single numbers of a layer lose, in nats of a unit."""

    def __init__(self, weight: Tensor, seen: Statistics) -> None:
        self._weight = weight.double()
        self._rows = 0.5 * seen.need("rows").double() / seen.units
        self._columns = 0.5 * seen.need("columns").double() / seen.units
        # Of the larger side only the moment behind W is known.
        self._inputs = seen.need("second_moment").double() / max(seen.input_energy, 1e-300)
        self._gradients = seen.need("gradient_moment").double() / max(seen.gradient_energy, 1e-300)

    def of_weight(self, weight: Tensor, bits: Sequence[Bits]) -> Tensor:
        total = self._rows.sum()
        lost = torch.stack([self._columns @ _error(weight, each) @ self._rows for each in bits])
        return lost / total if total > 0 else lost

    def of_factors(self, low: LowRank, bits: Sequence[Bits]) -> Tensor:
        down, up = (factor.weight.detach() for factor in (low.down, low.up))
        rows, columns, sends, reads = self._rows, self._columns, up.double(), down.double()
        index: Any = getattr(low, "index", None)
        own = torch.eye(len(down), dtype=sends.dtype, device=sends.device)
        if isinstance(low, PivotedColumns):
            # Pivots are read as they are, the others through ``down``.
            rows = rows[index[low.rank :]]
            reads = torch.cat([own, reads], 1)[:, index.argsort()]
        elif isinstance(low, PivotedRows):
            columns = columns[index.argsort()[low.rank :]]
            sends = torch.cat([own, sends])[index]
        sent, read = self._sent(sends), self._read(reads)
        return torch.stack(
            [
                sent @ _error(down, each) @ rows + columns @ (_error(up, each) @ read)
                for each in bits
            ]
        )

    def _sent(self, sends: Tensor) -> Tensor:
        """(U^T E[gg^T] U)_kk / tr E[gg^T] of U ``(out, r)``."""
        out, into = self._weight.shape
        inside = sends if out <= into else self._pinv @ sends
        return (inside * (self._gradients @ inside)).sum(0).clamp_min(0.0)

    def _read(self, reads: Tensor) -> Tensor:
        """(V E[xx^T] V^T)_kk / tr E[xx^T] of V ``(r, in)``."""
        out, into = self._weight.shape
        inside = reads if into <= out else reads @ self._pinv
        return ((inside @ self._inputs) * inside).sum(1).clamp_min(0.0)

    @functools.cached_property
    def _pinv(self) -> Tensor:
        found: Tensor = torch.linalg.pinv(self._weight, rtol=_RTOL)
        return found
