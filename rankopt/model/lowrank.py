"""The low-rank layers that are pairs of factors: two plain modules of torch in a row.

Both keep factors ``down`` and ``up`` as their children, which are plain ``nn.Linear`` (the first of
an embedding ``nn.Embedding``), so that tools that look for those (quantisers, exporters, LoRA) find
them.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from rankopt.layers import Form
from rankopt.model.product import product
from rankopt.model.rounding import plain


class LowRank(nn.Module):
    """What the low-rank layers have in common.

    Attributes:
        form: ``pairs`` or ``pivoted``.
        rank: width between the two factors.
        down: the first factor, in -> rank.
        up: the second, rank -> out.
    """

    form: Form = "pairs"
    rank: int
    down: nn.Linear | nn.Embedding
    up: nn.Linear

    @property
    def weight(self) -> Tensor:
        """The product of the factors, in the layout of the dense module."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of W in normal form."""
        raise NotImplementedError

    def _take(self, down: Tensor, up: Tensor) -> None:
        """Become W = ``up @ down``, of shapes ``(out, rank)`` and ``(rank, in)``."""
        self.down.weight, self.up.weight = nn.Parameter(down), nn.Parameter(up)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The zero-size guard that quantizer.py writes is not a parameter.
        state_dict.pop(prefix + "weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class OfLinear(LowRank):
    """What stands in the place of a linear layer.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        rank: width between the two.
        bias: whether there is one.
        device: as in ``nn.Linear``.
        dtype: as in ``nn.Linear``.
    """

    down: nn.Linear
    bias: Any

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
        self._make(bias, {"device": device, "dtype": dtype})

    def _make(self, bias: bool, how: dict[str, Any]) -> None:
        raise NotImplementedError

    @property
    def _biased(self) -> nn.Module:
        """The module that has the bias."""
        return self.up

    @classmethod
    def from_factors(cls, down: Tensor, up: Tensor, bias: Tensor | None) -> Self:
        """From factors of shapes ``(rank, in)`` and ``(out, rank)``, in their dtype and device.

        A bias that is a parameter stays that parameter, tied to whatever it was tied to.
        """
        layer = cls(down.shape[1], up.shape[0], down.shape[0], bias is not None, device="meta")
        layer._take(down, up)
        if bias is not None:
            own = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
            layer._biased.bias = own
        return layer

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of W."""
        return self.out_features, self.in_features

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class OfEmbedding(LowRank):
    """What stands in the place of an embedding.

    Args:
        num_embeddings: size of the vocabulary V.
        embedding_dim: size d of the output's last dimension.
        rank: width between the two.
        padding_idx: as in ``nn.Embedding``.
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
        self._make(how)

    def _make(self, how: dict[str, Any]) -> None:
        raise NotImplementedError

    @classmethod
    def from_factors(cls, down: Tensor, up: Tensor, padding_idx: int | None = None) -> Self:
        """From factors of shapes ``(rank, V)`` and ``(d, rank)``, in their dtype and device.

        They are those of W in normal form (d, V), as those of linear layers are; ``down`` keeps
        the transpose, as embeddings do.
        """
        layer = cls(down.shape[1], up.shape[0], down.shape[0], padding_idx, device="meta")
        layer._take(down, up)
        return layer

    @property
    def padding_idx(self) -> int | None:
        """The index of ``down`` that gets no gradient."""
        return self.down.padding_idx

    @property
    def shape(self) -> tuple[int, int]:
        """(d, V): W in normal form is the transpose of ``weight``."""
        return self.embedding_dim, self.num_embeddings

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return (
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, "
            f"rank={self.rank}"
        )


class LowRankLinear(OfLinear):
    """y = up(down(x)): in -> rank -> out, the bias in ``up``."""

    def _make(self, bias: bool, how: dict[str, Any]) -> None:
        self.down = nn.Linear(self.in_features, self.rank, bias=False, **how)
        self.up = nn.Linear(self.rank, self.out_features, bias=bias, **how)

    @property
    def weight(self) -> Tensor:
        """The product up.weight @ down.weight, shape ``(out, in)``: formed if used."""
        return product(plain(self.up.weight), plain(self.down.weight))

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``up``."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., in)`` -> ``(..., out)``."""
        y: Tensor = self.up(self.down(x))
        return y


class LowRankEmbedding(OfEmbedding):
    """y = up(down(index)): a vector of the rank is looked up, then mapped to the dimension.

    The padding index stays with ``down``: its vector gets no gradient. It is what the factors make
    of the dense row, not exactly zero; what attends to padding is masked anyway.
    """

    def _make(self, how: dict[str, Any]) -> None:
        self.up = nn.Linear(self.rank, self.embedding_dim, bias=False, **how)

    def _take(self, down: Tensor, up: Tensor) -> None:
        super()._take(down.T.contiguous(), up)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shape ``(V, d)`` as in nn.Embedding: formed if used."""
        return product(self.down.weight, self.up.weight.T)

    def forward(self, index: Tensor) -> Tensor:
        """Shape ``(...)`` of indices -> ``(..., d)``."""
        y: Tensor = self.up(self.down(index))
        return y
