"""Layers: the matrices whose ranks are planned, and what a rank of them costs.

Normal form. A layer maps ``in_features`` to ``out_features``; its weight is W of shape (out, in),
as in ``nn.Linear`` (GPT-2's ``Conv1D`` is transposed into it). Rank r replaces W by two factors
with r(out + in) parameters; that is less than out*in up to the break-even rank. Biases stay and
are not counted.
"""

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, PositiveInt

IntArray = npt.NDArray[np.int64]

#: The rank that stands for "not factorised" in arrays of ranks.
DENSE = -1


class Layer(BaseModel):
    """One planned matrix.

    Attributes:
        name: as in ``model.named_modules()``.
        out_features: rows of W.
        in_features: columns of W.
        kind: the name without its block, ``self_attn.q_proj``.
        itemsize: bytes of one parameter.
        digest: hash of a sample of the weights, to recognise the model again.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: str
    out_features: PositiveInt
    in_features: PositiveInt
    kind: str
    itemsize: PositiveInt
    digest: str

    @property
    def dense_cost(self) -> int:
        """Parameters of the dense weight."""
        return self.out_features * self.in_features

    @property
    def rank_cost(self) -> int:
        """Parameters of one rank."""
        return self.out_features + self.in_features

    @property
    def largest_rank(self) -> int:
        """The largest rank with fewer parameters than dense; 0 if even rank 1 has not."""
        return (self.dense_cost - 1) // self.rank_cost

    def cost(self, rank: int | None) -> int:
        """Parameters at a rank; None is dense."""
        return self.dense_cost if rank is None else rank * self.rank_cost

    def ranks(self, multiple: int = 1) -> IntArray:
        """The ranks on offer: multiples up to the largest rank that saves, then DENSE."""
        low = np.arange(multiple, self.largest_rank + 1, multiple, dtype=np.int64)
        return np.append(low, DENSE)


class LeftAlone(BaseModel):
    """A module with weights that no plan touches.

    Attributes:
        name: as in ``model.named_modules()``.
        module: its class.
        parameters: number of its own parameters.
        reason: why it is left alone.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: str
    module: str
    parameters: int
    reason: str
