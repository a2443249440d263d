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
from rankopt.model.lowrank import LowRank, LowRankEmbedding, LowRankLinear
from rankopt.model.product import product

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


class _Pivoted(LowRank):
    """What the pivoted layers have in common: W has rank r and is kept as its pivots.

    Attributes:
        index: int64, a permutation.
    """

    form: Form = "pivoted"
    index: Tensor

    def _number(self, count: int, device: torch.device | str | None) -> None:
        self.register_buffer("index", torch.arange(count, device=device))

    def _take(self, down: Tensor, up: Tensor, index: Tensor) -> None:
        self.down.weight, self.up.weight = nn.Parameter(down), nn.Parameter(up)
        self.index = index


class PivotedColumns(_Pivoted):
    """W = [A, A D] with its columns in another order: y = up(x_pivots + down(x_others)).

    ``up`` is A, r columns of W, and has the bias; ``down`` is D. For in <= out.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        rank: number of pivots.
        bias: whether ``up`` has one.
        device: as in ``nn.Linear``.
        dtype: as in ``nn.Linear``.
    """

    down: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Linear(in_features - rank, rank, bias=False, **how)
        self.up = nn.Linear(rank, out_features, bias=bias, **how)
        self._number(in_features, device)

    @classmethod
    def from_factors(cls, down: Tensor, up: Tensor, bias: Tensor | None) -> "PivotedColumns":
        """From factors of shapes ``(rank, in)`` and ``(out, rank)``; see LowRankLinear."""
        layer = cls(down.shape[1], up.shape[0], down.shape[0], bias is not None, device="meta")
        order, mixing = pivot_columns(down)
        kept = up.double() @ down.double()[:, order[: layer.rank]]
        layer._take(mixing.to(down.dtype), kept.to(up.dtype), order)
        if bias is not None:
            layer.up.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """W, shape ``(out, in)``: formed if used."""
        return product(self.up.weight, self.down.weight, self.index.argsort())

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``up``."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., in)`` -> ``(..., out)``."""
        pivots, others = self.index[: self.rank], self.index[self.rank :]
        kept = x.index_select(-1, pivots) + self.down(x.index_select(-1, others))
        y: Tensor = self.up(kept)
        return y

    extra_repr = LowRankLinear.extra_repr


class PivotedRows(_Pivoted):
    """W = [B; C B] with its rows in another order: h = down(x), y = [h, up(h)] + bias.

    ``down`` is B, r rows of W; ``up`` is C. For out < in.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        rank: number of pivots.
        bias: whether there is one; it is the layer's own.
        device: as in ``nn.Linear``.
        dtype: as in ``nn.Linear``.
    """

    down: nn.Linear
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Linear(in_features, rank, bias=False, **how)
        self.up = nn.Linear(rank, out_features - rank, bias=False, **how)
        self._number(out_features, device)
        self.bias = nn.Parameter(torch.zeros(out_features, **how)) if bias else None

    @classmethod
    def from_factors(cls, down: Tensor, up: Tensor, bias: Tensor | None) -> "PivotedRows":
        """From factors of shapes ``(rank, in)`` and ``(out, rank)``; see LowRankLinear."""
        layer = cls(down.shape[1], up.shape[0], down.shape[0], bias is not None, device="meta")
        kept, others, index = _pivoted_rows(down, up)
        layer._take(kept, others, index)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """W, shape ``(out, in)``: formed if used."""
        return product(self.down.weight.T, self.up.weight.T, self.index, turned=True)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., in)`` -> ``(..., out)``."""
        kept = self.down(x)
        y = torch.cat([kept, self.up(kept)], -1).index_select(-1, self.index)
        return y if self.bias is None else y + self.bias

    extra_repr = LowRankLinear.extra_repr


class PivotedEmbedding(_Pivoted):
    """As PivotedRows, of W in normal form (d, V): r numbers are looked up, d - r made of them.

    Args:
        num_embeddings: size of the vocabulary V.
        embedding_dim: size d of the output's last dimension, at most V.
        rank: number of pivots.
        padding_idx: as in LowRankEmbedding.
        device: as in ``nn.Embedding``.
        dtype: as in ``nn.Embedding``.
    """

    down: nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Embedding(num_embeddings, rank, padding_idx, **how)
        self.up = nn.Linear(rank, embedding_dim - rank, bias=False, **how)
        self._number(embedding_dim, device)

    @classmethod
    def from_factors(
        cls, down: Tensor, up: Tensor, padding_idx: int | None = None
    ) -> "PivotedEmbedding":
        """From factors of shapes ``(rank, V)`` and ``(d, rank)``; see LowRankEmbedding."""
        layer = cls(down.shape[1], up.shape[0], down.shape[0], padding_idx, device="meta")
        kept, others, index = _pivoted_rows(down, up)
        layer._take(kept.T.contiguous(), others, index)
        return layer

    @property
    def padding_idx(self) -> int | None:
        """The index of ``down`` that gets no gradient."""
        return self.down.padding_idx

    @property
    def weight(self) -> Tensor:
        """Shape ``(V, d)`` as in nn.Embedding: formed if used."""
        return product(self.down.weight, self.up.weight.T, self.index)

    def forward(self, index: Tensor) -> Tensor:
        """Shape ``(...)`` of indices -> ``(..., d)``."""
        kept = self.down(index)
        return torch.cat([kept, self.up(kept)], -1).index_select(-1, self.index)

    extra_repr = LowRankEmbedding.extra_repr


def _pivoted_rows(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B ``(r, in)``, C ``(out - r, r)``, and where in [B; C B] each row of ``up @ down`` is."""
    order, mixing = pivot_columns(up.T)
    kept = up.double()[order[: len(down)]] @ down.double()
    return kept.to(down.dtype), mixing.T.contiguous().to(up.dtype), order.argsort()
