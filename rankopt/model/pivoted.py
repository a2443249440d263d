"""The low-rank layers in the pivoted form: two plain modules of torch and an index.

A matrix of rank r is r of its columns and what the others are of them,

    M = [A, A D] in the order ``pivots, others``:  A = M[:, pivots],  (k, r);  D (r, n - r)

has r(k + n - r) numbers, as many as a matrix of rank r has degrees of freedom (stored so by Zhao et
al., PIFA, 2025). Any r independent columns would do; D is small, and rounding harmless, where their
volume is large. From a factorisation M = B C, C (r, n), that volume is |det B C_p|: only C matters.
Its pivots are first those of an LU factorisation of C^T with partial pivoting, C^T = P L U, where D
follows from L alone, however singular U is; then columns are exchanged while that enlarges the
volume by more than ``BOUND``: exchanging pivot i for another column j multiplies it by |D_ij|
(Goreinov, Tyrtyshnikov & Zamarashkin 1997; Gu & Eisenstat, SIAM J. Sci. Comput. 1996). At the end

    max |D_ij| <= BOUND,

and each exchange enlarges the volume, so that it ends.

In a layer the columns are those of W or, where out < in, of its transpose: the smaller side, where
r is close to n, D is small and there is less to put in order.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rankopt.layers import Form
from rankopt.model.lowrank import (
    LowRank,
    LowRankEmbedding,
    LowRankLinear,
    OfEmbedding,
    OfLinear,
)
from rankopt.model.product import Order, ordered, product
from rankopt.model.rounding import plain

#: What no coefficient exceeds. Exchanges become many below it, and gain little.
BOUND = 1.25


def pivot_columns(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Pivots of a matrix M = B C, from C.

    Args:
        factor: C, shape ``(r, n)`` with r <= n, finite.

    Returns:
        The order of the columns, pivots first, ``(n,)``, int64; and D, ``(r, n - r)``, float64.
    """
    rank, count = factor.shape
    packed, swaps, _ = torch.linalg.lu_factor_ex(factor.double().T)
    order = list(range(count))
    for k, other in enumerate(swaps.tolist()):
        order[k], order[other - 1] = order[other - 1], order[k]
    # M^T in that order is [L_1; L_2] U B^T, and D^T = L_2 L_1^-1.
    mixing = torch.linalg.solve_triangular(
        packed[:rank].T, packed[rank:].T, upper=True, unitriangular=True
    )
    while mixing.numel():
        pivot, other = divmod(int(mixing.abs().argmax()), count - rank)
        largest = mixing[pivot, other].clone()
        if largest.abs() <= BOUND:
            break
        column, row = mixing[:, other].clone(), mixing[pivot].clone()
        column[pivot] -= 1.0
        row[other] += 1.0
        mixing.addr_(column, row / largest, alpha=-1.0)
        order[pivot], order[rank + other] = order[rank + other], order[pivot]
    return torch.tensor(order, device=factor.device), mixing


class PivotedColumns(OfLinear):
    """W = [A, A D] with its columns in another order: y = up(x_pivots + down(x_others)).

    ``up`` is A, r columns of W, and has the bias; ``down`` is D; ``index`` are the columns, the
    pivots first, int64 ``(in,)``. For in <= out.
    """

    form: Form = "pivoted"
    index: Tensor

    def _make(self, bias: bool, how: dict[str, Any]) -> None:
        self.down = nn.Linear(self.in_features - self.rank, self.rank, bias=False, **how)
        self.up = nn.Linear(self.rank, self.out_features, bias=bias, **how)
        self.register_buffer("index", torch.arange(self.in_features, device=how["device"]))

    def _take(self, down: Tensor, up: Tensor) -> None:
        self.index, mixing = pivot_columns(down)
        kept = up.double() @ down.double()[:, self.index[: self.rank]]
        super()._take(mixing.to(down.dtype), kept.to(up.dtype))

    @property
    def weight(self) -> Tensor:
        """W, shape ``(out, in)``: formed if used."""
        left, right = plain(self.up.weight), plain(self.down.weight)
        return product(left, right, Order(self.index, sends=True))

    bias = LowRankLinear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., in)`` -> ``(..., out)``."""
        shares = [self.rank, self.in_features - self.rank]
        parts = torch.split(ordered(x, self.index), shares, -1)
        y: Tensor = self.up(parts[0] + self.down(parts[1]))
        return y


class PivotedRows(OfLinear):
    """W = [B; C B] with its rows in another order: h = down(x), y = [h, up(h)] + bias.

    ``down`` is B, r rows of W; ``up`` is C; ``index`` says where in [B; C B] each row of W is,
    int64 ``(out,)``. The bias is the layer's own. For out < in.
    """

    form: Form = "pivoted"
    index: Tensor

    def _make(self, bias: bool, how: dict[str, Any]) -> None:
        self.down = nn.Linear(self.in_features, self.rank, bias=False, **how)
        self.up = nn.Linear(self.rank, self.out_features - self.rank, bias=False, **how)
        self.register_buffer("index", torch.arange(self.out_features, device=how["device"]))
        self.bias = nn.Parameter(torch.zeros(self.out_features, **how)) if bias else None

    @property
    def _biased(self) -> nn.Module:
        return self

    def _take(self, down: Tensor, up: Tensor) -> None:
        kept, others, self.index = _pivoted_rows(down, up)
        super()._take(kept, others)

    @property
    def weight(self) -> Tensor:
        """W, shape ``(out, in)``: formed if used."""
        left, right = plain(self.down.weight).T, plain(self.up.weight).T
        return product(left, right, Order(self.index), turned=True)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., in)`` -> ``(..., out)``."""
        kept = self.down(x)
        y = ordered(torch.cat([kept, self.up(kept)], -1), self.index)
        return y if self.bias is None else y + self.bias


class PivotedEmbedding(OfEmbedding):
    """As PivotedRows, of W in normal form (d, V): r numbers are looked up, d - r made of them."""

    form: Form = "pivoted"
    index: Tensor

    def _make(self, how: dict[str, Any]) -> None:
        self.up = nn.Linear(self.rank, self.embedding_dim - self.rank, bias=False, **how)
        self.register_buffer("index", torch.arange(self.embedding_dim, device=how["device"]))

    def _take(self, down: Tensor, up: Tensor) -> None:
        kept, others, self.index = _pivoted_rows(down, up)
        super()._take(kept.T.contiguous(), others)

    @property
    def weight(self) -> Tensor:
        """Shape ``(V, d)`` as in nn.Embedding: formed if used."""
        return product(self.down.weight, self.up.weight.T, Order(self.index))

    def forward(self, index: Tensor) -> Tensor:
        """Shape ``(...)`` of indices -> ``(..., d)``."""
        kept = self.down(index)
        return ordered(torch.cat([kept, self.up(kept)], -1), self.index)


def kind_of(dense_is_embedding: bool, shape: tuple[int, int], form: Form) -> type[LowRank]:
    """The class of low-rank layers for W ``(out, in)`` in normal form."""
    if form == "pairs":
        return LowRankEmbedding if dense_is_embedding else LowRankLinear
    if dense_is_embedding:
        return PivotedEmbedding
    return PivotedColumns if shape[1] <= shape[0] else PivotedRows


def _pivoted_rows(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B ``(r, in)``, C ``(out - r, r)``, and where in [B; C B] each row of ``up @ down`` is."""
    order, mixing = pivot_columns(up.T)
    kept = up.double()[order[: len(down)]] @ down.double()
    return kept.to(down.dtype), mixing.T.contiguous().to(up.dtype), order.argsort()
