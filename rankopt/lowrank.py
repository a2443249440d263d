"""The low-rank layer: two plain ``nn.Linear`` in a row."""

from typing import Any

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = up(down(x)): in -> rank -> out, the bias in ``up``.

    The children are plain ``nn.Linear``, so tools that look for those (quantisers, exporters, LoRA)
    find them.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        rank: width between the two.
        bias: whether ``up`` has one.
        device: as in ``nn.Linear``.
        dtype: as in ``nn.Linear``.
    """

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
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, down: Tensor, up: Tensor, bias: Tensor | None) -> "LowRankLinear":
        """From factors of shapes ``(rank, in)`` and ``(out, rank)``, in their dtype and device."""
        layer = cls(down.shape[1], up.shape[0], down.shape[0], bias is not None, device="meta")
        layer.down.weight = nn.Parameter(down)
        layer.up.weight = nn.Parameter(up)
        if bias is not None:
            layer.up.bias = nn.Parameter(bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """The product up.weight @ down.weight, shape ``(out, in)``: formed at each access."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``up``."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., in)`` -> ``(..., out)``."""
        y: Tensor = self.up(self.down(x))
        return y

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The zero-size guard that checkpoint.py writes is not a parameter.
        state_dict.pop(prefix + "weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
