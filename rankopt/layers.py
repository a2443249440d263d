"""Layers: the matrices whose ranks are planned, and what a rank of them costs.

Normal form. A layer maps ``in_features`` to ``out_features``; its weight is W of shape (out, in),
as in ``nn.Linear`` (GPT-2's ``Conv1D`` is transposed into it, and so is ``nn.Embedding``: it maps a
one-hot vector of the vocabulary to its row). Rank r replaces W by two factors with r(out + in)
parameters; that is less than out*in up to the break-even rank. Biases stay and are not counted.

Tied layers, one matrix in several modules (a language model's head and its embedding), are one
group with one rank. Each module gets factors of its own, weighted by its own statistics: n modules
have n*r(out + in) parameters, against out*in for the one matrix that they share while dense.
"""

import hashlib

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, PositiveInt

from rankopt.schema import STRICT

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

#: The rank that stands for "not factorised" in arrays of ranks.
DENSE = -1


def largest_rank(out_features: int, in_features: int, members: int = 1) -> int:
    """The largest rank at which ``members`` pairs of factors are smaller than one dense matrix."""
    return (out_features * in_features - 1) // (members * (out_features + in_features))


class Layer(BaseModel):
    """One planned matrix.

    Attributes:
        name: as in ``model.named_modules()``; of a group, the first of its modules.
        out_features: rows of W.
        in_features: columns of W.
        kind: the name without its block, ``self_attn.q_proj``.
        itemsize: bytes of one parameter.
        digest: hash of a sample of the weights, to recognise the model again.
        partners: other modules with the same matrix, or its transpose, as their weight.
    """

    model_config = STRICT

    name: str
    out_features: PositiveInt
    in_features: PositiveInt
    kind: str
    itemsize: PositiveInt
    digest: str
    partners: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """All modules of the group: the layer itself, then its partners."""
        return (self.name, *self.partners)

    @property
    def dense_cost(self) -> int:
        """Parameters of the dense weight, which all members share."""
        return self.out_features * self.in_features

    @property
    def rank_cost(self) -> int:
        """Parameters of one rank, of all members together."""
        return len(self.members) * (self.out_features + self.in_features)

    @property
    def largest_rank(self) -> int:
        """The largest rank with fewer parameters than dense; 0 if even rank 1 has not."""
        return largest_rank(self.out_features, self.in_features, len(self.members))

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

    model_config = STRICT

    name: str
    module: str
    parameters: int
    reason: str


def fingerprint(architecture: str, layers: tuple[Layer, ...]) -> str:
    """sha256 over the architecture and the layers' names, shapes and weight samples."""
    digest = hashlib.sha256(architecture.encode())
    for x in layers:
        names = " ".join(x.members)
        digest.update(f"\n{names} {x.out_features} {x.in_features} {x.digest}".encode())
    return digest.hexdigest()
