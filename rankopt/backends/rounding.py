"""What rounding a layer's weights loses, beside what its rank does.

Weights are rounded to the nearest of evenly spaced values around 0, as torchao does it (see
rankopt.model.rounding): of 8 bits with one scale for each row of a matrix, of 4 bits with one for
each group of 32 inputs. Of a layer of lower rank both factors are rounded.

Rounding errors are made, not modelled: what is lost is the second-order estimate of the change from
the factors to the rounded ones (see valued). They hardly correlate with what truncation drops, so
the two losses add up.
"""

from typing import Any

import torch
from torch import Tensor

from rankopt.backends.base import Backend, Decomposition
from rankopt.backends.statistics import Statistics
from rankopt.backends.valued import Changes
from rankopt.layers import DENSE, GROUP, Bits, Form, IntArray
from rankopt.model.pivoted import kind_of

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
    bits: Bits,
) -> Tensor:
    """Losses of rounding in nats of a unit, float64, shape of ``ranks``.

    Args:
        backend: that made the decomposition.
        weight: W, shape ``(out, in)``.
        seen: statistics of the layer, with both moments.
        made: of this weight.
        ranks: of the factors, with DENSE; for 4 bits in whole groups.
        form: in which the factors are kept.
        bits: 8 or 4.
    """
    changes = Changes(weight, seen, rtol=_RTOL)
    found = []
    for rank in ranks.tolist():
        if rank == DENSE:
            change = rounded(weight, bits).to(weight.dtype).double() - weight.double()
        else:
            up, down = (each.to(weight.dtype) for each in backend.factors(weight, made.kept, rank))
            kind: Any = kind_of(False, (len(up), down.shape[1]), form)
            low = kind.from_factors(down, up, None)
            before = low.weight.double()
            for factor in (low.down, low.up):
                factor.weight = torch.nn.Parameter(rounded(factor.weight, bits).to(weight.dtype))
            change = low.weight.double() - before
        found.append(0.5 * changes.twice(change).clamp_min(0.0))
    return torch.stack(found)
