"""How a batch lies in the tensors that a layer sees: examples, positions, padding.

The normal form is ``(B, T, features)``: one row for each position of each example. Some models
flatten positions, ``(B T, features)``; the number of rows tells.
"""

import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor

from rankopt.errors import ModelError


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Of one batch.

    Attributes:
        examples: B.
        tokens: positions of each, to recognise inputs of shape ``(B T, features)``.
        masks: padding masks by shape ``(B, T)``, False at padding; none without padding.
    """

    examples: int
    tokens: int
    masks: dict[tuple[int, ...], Tensor]

    @classmethod
    def of(cls, examples: int, tokens: int, masks: Collection[Tensor] = ()) -> "Layout":
        """With those of the masks that mark any padding."""
        marking = {tuple(mask.shape): mask for mask in masks if not bool(mask.all())}
        return cls(examples, tokens, marking)

    def mask_for(self, shape: tuple[int, ...]) -> Tensor | None:
        """The padding mask of positions of this shape, or None."""
        if not self.masks:
            return None
        if len(shape) == 1:
            # Flattened positions.
            flat = [mask for mask in self.masks.values() if mask.numel() == shape[0]]
            return flat[0] if len(flat) == 1 else None
        return self.masks.get(tuple(shape))

    def by_example(self, name: str, tensor: Tensor) -> Tensor:
        """Any layout to ``(B, T, features)``.

        Raises:
            ModelError: which example a row belongs to cannot be told; names the layer.
        """
        examples, features = self.examples, tensor.shape[-1]
        rows = tensor.numel() // features
        if tensor.dim() == 2 and rows not in (examples, examples * self.tokens) and examples > 1:
            raise ModelError(
                f"layer {name} sees {rows} rows for {examples} examples of {self.tokens} tokens: "
                "which example a row belongs to is lost (routed experts?); use batch size 1"
            )
        if rows % examples or (tensor.dim() > 2 and tensor.shape[0] % examples):
            raise ModelError(
                f"layer {name}: inputs of shape {tuple(tensor.shape)} for {examples} examples; "
                "profile with batch size 1"
            )
        return tensor.reshape(examples, -1, features)


def widened(tensor: Tensor) -> Tensor:
    """Detached, in float32 or wider: before anything is squared."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def flattened(tensor: Tensor) -> Tensor:
    """Widened, ``(positions, features)``."""
    return widened(tensor).reshape(-1, tensor.shape[-1])
