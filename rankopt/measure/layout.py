"""How a batch lies in the tensors that a layer sees: examples, positions, padding.

The normal form is ``(B, T, features)``: one row for each position of each example. Some models
flatten positions, ``(B T, features)``; the number of rows tells.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from rankopt.errors import ModelError

#: A layer, and which of its uses in one forward pass, from 1.
Use = tuple[str, int]
#: Positions of a layer -> the padding mask of as many, or None.
Frames = Callable[[int], Tensor | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Of one batch.

    Attributes:
        examples: B.
        tokens: positions of each, to recognise inputs of shape ``(B T, features)``.
        masks: padding masks ``(B, T)``, False at padding: of the encoder, and of the decoder if
            there is one; None without padding.
        sides: which of the masks a use of a layer goes by, where that is known.
        frames: makes a mask for positions that none of the masks has, from the first.
    """

    examples: int
    tokens: int
    masks: tuple[Tensor | None, ...]
    sides: Mapping[Use, int] = dataclasses.field(default_factory=dict)
    frames: Frames | None = None

    @classmethod
    def of(
        cls,
        examples: int,
        tokens: int,
        masks: Collection[Tensor | None] = (),
        sides: Mapping[Use, int] | None = None,
        frames: Frames | None = None,
    ) -> "Layout":
        """With those of the masks that mark any padding."""
        marking = tuple(None if mask is None or bool(mask.all()) else mask for mask in masks)
        return cls(examples, tokens, marking, sides or {}, frames)

    def mask_for(self, shape: tuple[int, ...], use: Use = ("", 0)) -> Tensor | None:
        """The padding mask of a layer's positions of this shape, or None."""
        side = self.sides.get(use)
        masks = self.masks if side is None else self.masks[side : side + 1]
        spread = (_spread(mask, tuple(shape)) for mask in masks if mask is not None)
        fitting = [mask for mask in spread if mask is not None]
        if fitting or self.frames is None or side not in (None, 0) or self.masks[:1] == (None,):
            return fitting[0] if len(fitting) == 1 else None
        made = self.frames(shape[-1] if len(shape) > 1 else shape[0] // max(self.examples, 1))
        return None if made is None or made.numel() != _product(shape) else made

    def covers(self, shape: tuple[int, ...], use: Use) -> bool:
        """Whether it is known which of a layer's positions are padding."""
        if self.mask_for(shape, use) is not None:
            return True
        side = self.sides.get(use)
        return side is not None and self.masks[side] is None

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


def _spread(mask: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The mask for positions ``(B, T)``, flattened, or with heads before or behind; or None."""
    if tuple(mask.shape) == shape or (mask.numel(),) == shape:
        return mask
    if len(shape) != 3 or shape[0] != mask.shape[0] or shape[1:].count(mask.shape[1]) != 1:
        return None
    return mask.unsqueeze(1 if shape[2] == mask.shape[1] else 2).expand(shape)


def _product(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def widened(tensor: Tensor) -> Tensor:
    """Detached, in float32 or wider: before anything is squared."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def flattened(tensor: Tensor) -> Tensor:
    """Widened, ``(positions, features)``."""
    return widened(tensor).reshape(-1, tensor.shape[-1])
