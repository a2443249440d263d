"""Layers: the matrices whose ranks are planned, and what a rank of them costs.

Normal form. A layer maps ``in_features`` to ``out_features``; its weight is W of shape (out, in),
as in ``nn.Linear`` (GPT-2's ``Conv1D`` is transposed into it, and so is ``nn.Embedding``: it maps a
one-hot vector of the vocabulary to its row). Biases stay and are not counted.

Rank r replaces W by a matrix of that rank in one of two forms:

    pairs    two factors, r(out + in) parameters; less than out*in up to rank out*in/(out + in)
    pivoted  r of its rows or columns and what the others are of them, r(out + in - r) parameters,
             all the degrees of freedom that there are; less than out*in below full rank

The same function in either form; ``pivoted`` has the fewer parameters at every rank, so that under
a budget of parameters a pair is never chosen beside it, and a plan has one form. (Pivots: Zhao et
al., PIFA, 2025; Goreinov, Tyrtyshnikov & Zamarashkin, Linear Algebra and its Applications 1997.)
An index of out or in whole numbers says which are the pivots; it is no parameter, and not counted.

Tied layers, one matrix in several modules (a language model's head and its embedding), are one
group with one rank. Each module gets factors of its own, weighted by its own statistics: n modules
have n times the parameters of one, against out*in for the one matrix that they share while dense.
"""

import hashlib
import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, PositiveInt

from rankopt.schema import STRICT

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

#: How a matrix of some rank is kept; see the module's text.
Form = Literal["pairs", "pivoted"]
FORMS: tuple[Form, ...] = get_args(Form)

#: The rank that stands for "not factorised" in arrays of ranks.
DENSE = -1

#: Widths that weights may be rounded to, and the one that stands for "not rounded" in arrays.
Bits = Literal[8, 4]
BITS: tuple[Bits, ...] = get_args(Bits)
AS_IS = 0
#: Of 8 bits a row has one scale, float32; of 4 bits so many inputs, in the weight's own dtype.
GROUP = 32
#: Ranks at which losses of rounding are measured.
ROUNDED_AT = 8


def largest_rank(
    out_features: int, in_features: int, members: int = 1, form: Form = "pairs"
) -> int:
    """The largest rank at which ``members`` of that form are smaller than one dense matrix."""
    sides, most = out_features + in_features, (out_features * in_features - 1) // members
    if form == "pairs":
        return most // sides
    # r(sides - r) <= most; below half of the sides it rises with r.
    rank = (sides - math.isqrt(sides * sides - 4 * most)) // 2
    while rank * (sides - rank) > most:
        rank -= 1
    while rank < min(out_features, in_features) and (rank + 1) * (sides - rank - 1) <= most:
        rank += 1
    return rank


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

    def largest_rank(self, form: Form = "pairs") -> int:
        """The largest rank with fewer parameters than dense; 0 if even rank 1 has not."""
        return largest_rank(self.out_features, self.in_features, len(self.members), form)

    def cost(self, rank: int | None, form: Form = "pairs") -> int:
        """Parameters of all members together at a rank; None is dense."""
        if rank is None:
            return self.dense_cost
        sides = self.out_features + self.in_features - (rank if form == "pivoted" else 0)
        return len(self.members) * rank * sides

    def costs(self, ranks: IntArray, form: Form = "pairs") -> IntArray:
        """The same for an array of ranks, with DENSE."""
        sides = self.out_features + self.in_features - (ranks if form == "pivoted" else 0)
        return np.where(ranks == DENSE, self.dense_cost, len(self.members) * ranks * sides)

    def bytes_of(self, ranks: IntArray, form: Form, bits: IntArray | int = AS_IS) -> IntArray:
        """Bytes at ranks, with DENSE, of weights in so many bits each, scales included."""
        numbers = self.costs(ranks, form)
        # Every matrix that a layer is kept in has a scale for each of its own rows.
        down = 0 if form == "pivoted" and self.out_features < self.in_features else ranks
        rows = self.out_features + np.where(ranks == DENSE, 0, down)
        eight = numbers + 4 * rows
        four = numbers // 2 + numbers // GROUP * self.itemsize
        own = numbers * self.itemsize
        return np.where(np.equal(bits, 8), eight, np.where(np.equal(bits, 4), four, own))

    def can_round(self, rank: int | None, bits: Bits) -> bool:
        """Whether its matrices may be rounded: no partners, and of 4 bits whole groups."""
        fits = bits == 8 or not (self.in_features % GROUP or (rank or 0) % GROUP)
        return fits and not self.partners

    def rounded_ranks(self, form: Form = "pairs") -> IntArray:
        """Ranks at which losses of rounding are measured, with DENSE; between them they are smooth.

        Multiples of ``GROUP``, a handful of them up to the largest that saves parameters.
        """
        groups = self.largest_rank(form) // GROUP
        points = np.linspace(1, groups, min(groups, ROUNDED_AT)) if groups else np.empty(0)
        return np.append(np.unique(points.round().astype(np.int64)) * GROUP, DENSE)

    def flops(self, ranks: IntArray, form: Form = "pairs") -> IntArray:
        """Of a product with one vector, for all members together; an addition counts, too."""
        dense = len(self.members) * self.dense_cost
        return 2 * np.where(ranks == DENSE, dense, self.costs(ranks, form))

    def ranks(self, multiple: int = 1, form: Form = "pairs") -> IntArray:
        """The ranks on offer: multiples up to the largest rank that saves, then DENSE."""
        low = np.arange(multiple, self.largest_rank(form) + 1, multiple, dtype=np.int64)
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
