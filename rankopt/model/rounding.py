"""Weights of linear layers that are rounded to 8 or 4 bits, by torchao.

    8 bits: integers of -128..127, and a float32 scale for every row
    4 bits: integers of -8..7, and a scale of the weight's own dtype for every 32 of a row

to the nearest, and symmetric: zero is kept. A rounded layer is an ``nn.Linear`` whose weight is one
of torchao's tensors, which keep 4 bits in a byte each while in memory. In files, and while those
are read, there are the parts of a weight instead: ``qdata``, two values of 4 bits in a byte, and
``scale``. Sizes are those of the parts.
"""

from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from rankopt._register import quiet
from rankopt.errors import MissingExtraError, ModelError, first_line
from rankopt.layers import GROUP, Bits

PARTS = ("qdata", "scale")
#: mypy does not know it.
_INT4: Any = vars(torch)["int4"]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def require_torchao(purpose: str) -> Any:
    """The module ``torchao.quantization``.

    Args:
        purpose: that it is needed for.

    Raises:
        MissingExtraError: it is not installed.
        ModelError: it is too old, or none for this torch.
    """
    try:
        with quiet():
            from torchao import quantization

            for name in ("Int8Tensor", "IntxUnpackedToInt8Tensor", "IntxWeightOnlyConfig"):
                getattr(quantization, name)
    except (ImportError, AttributeError) as error:
        if getattr(error, "name", None) != "torchao":
            # Each release is built for some releases of torch.
            raise ModelError(
                f"{purpose} needs torchao 0.18 or later, of a release for torch "
                f"{torch.__version__}; the one that is here is none ({first_line(error)}): "
                "pip install --upgrade torch torchao"
            ) from error
        raise MissingExtraError(purpose, "torchao (0.18 or later)", "quantize") from error
    return quantization


def require_roundable(name: str, module: nn.Module, purpose: str) -> None:
    """Refuse a layer whose weights torchao does not round.

    Args:
        name: of the layer.
        module: the dense one.
        purpose: see require_torchao.

    Raises:
        ModelError: an embedding, or a dtype that is not rounded.
        MissingExtraError: torchao is not there.
    """
    if isinstance(module, nn.Embedding):
        raise ModelError(
            f"layer {name} is an embedding, and those are not rounded: plan it without bits"
        )
    dtype = module.get_parameter("weight").dtype
    if dtype not in _DTYPES:
        raise ModelError(
            f"layer {name} is of {dtype}, and rounded are float16, bfloat16 and float32: move the "
            "model to one of them (model.to(torch.float32)), or plan it without bits"
        )
    require_torchao(purpose)


@torch.no_grad()
def packed(weight: Tensor, bits: Bits) -> nn.Parameter:
    """A weight ``(out, in)`` rounded and packed; of 4 bits ``in`` is a multiple of 32. It does not
    learn.

    Raises:
        MissingExtraError: torchao is not there.
    """
    of_torchao = require_torchao(f"rounding to {bits} bits")
    from torchao.quantization.granularity import PerGroup

    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bits == 8:
        config = of_torchao.Int8WeightOnlyConfig()
    else:
        config = of_torchao.IntxWeightOnlyConfig(_INT4, PerGroup(GROUP))
    of_torchao.quantize_(holder, config)
    return holder.weight


def bits_of(weight: Tensor | None) -> Bits | None:
    """What a weight is rounded to as ``packed`` does it; None of all others."""
    # By name: nothing is rounded where torchao has not been imported.
    if not type(weight).__module__.startswith("torchao."):
        return None
    of: Any = weight
    kind, block = type(weight).__name__, list(getattr(of, "block_size", ()))
    if kind == "Int8Tensor" and of.act_quant_kwargs is None and of.act_pre_scale is None:
        return 8 if block == [1, of.shape[-1]] else None
    if kind == "IntxUnpackedToInt8Tensor" and of.activation_quantization is None:
        return 4 if of.target_dtype == _INT4 and block == [1, GROUP] else None
    return None


def plain(weight: Tensor) -> Tensor:
    """The values of a weight that is rounded, in its dtype; any other itself."""
    # The first is all that torch.compile can ask.
    if type(weight) in (Tensor, nn.Parameter) or bits_of(weight) is None:
        return weight
    found: Tensor = cast(Any, weight).dequantize()
    return found


def nbytes_of(weight: Tensor) -> int:
    """Bytes of a weight, rounded or not: of its parts, as in a file."""
    bits = bits_of(weight)
    if bits is None:
        return weight.numel() * weight.element_size()
    return weight.numel() * bits // 8 + int(cast(Any, weight).scale.nbytes)


def parts_of(weight: Tensor) -> dict[str, Tensor]:
    """``qdata`` and ``scale`` of a rounded weight, as in a file; none of one that is not.

    Shapes are ``(out, in)`` int8 and ``(out, 1)``; of 4 bits ``(out, in / 2)`` uint8, the even
    columns in the low halves, and ``(out, in / 32)``.
    """
    bits = bits_of(weight)
    if bits is None:
        return {}
    of = cast(Any, weight)
    qdata: Tensor = of.qdata.detach()
    if bits == 4:
        halves = (qdata & 15).to(torch.uint8)
        qdata = halves[:, ::2] | halves[:, 1::2] << 4
    return {"qdata": qdata, "scale": of.scale.detach()}


def holds_rounded(module: nn.Module) -> bool:
    """Whether a module's own weight is rounded, or stands as its parts."""
    return isinstance(module, Parts) or bits_of(module._parameters.get("weight")) is not None


def in_parts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state in which each rounded weight is its parts, ``LAYER.qdata`` and ``LAYER.scale``."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = parts_of(tensor) if name.endswith("weight") else {}
        prefix = name.removesuffix("weight")
        found |= {prefix + own: part for own, part in parts.items()} if parts else {name: tensor}
    return found


class Parts(nn.Module):
    """What stands in the place of a rounded linear layer until its weight is read.

    Args:
        out_features: rows.
        in_features: columns.
        bits: 8 or 4.
        bias: whether there is one.
        device: as in ``nn.Linear``.
        dtype: that the weight had before it was rounded.
    """

    qdata: Tensor
    scale: Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        bits: Bits,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.bits = out_features, in_features, bits
        self.dtype = dtype
        packed, group = (in_features, in_features) if bits == 8 else (in_features // 2, GROUP)
        values = torch.empty(
            out_features, packed, dtype=torch.int8 if bits == 8 else torch.uint8, device=device
        )
        scales = torch.empty(
            out_features,
            in_features // group,
            dtype=torch.float32 if bits == 8 else dtype,
            device=device,
        )
        # Buffers: parameters are of floats, or torch refuses them gradients.
        self.register_buffer("qdata", values)
        self.register_buffer("scale", scales)
        own = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own)

    @classmethod
    def of(cls, linear: nn.Linear, bits: Bits) -> Self:
        """Of the shape, dtype and device of a layer."""
        weight = linear.weight
        rows, columns = weight.shape
        return cls(rows, columns, bits, linear.bias is not None, weight.device, weight.dtype)

    # Hooks that accelerate has put on it by then keep this method.
    forward = nn.Linear.forward

    @property
    def weight(self) -> Tensor:
        """Of the shape and dtype to come, without values, for models that look at it."""
        found = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        # What transformers initialises it leaves alone.
        found._is_hf_initialized = True  # type: ignore[attr-defined]
        return found

    @property
    def numel(self) -> int:
        """Parameters in the weight."""
        return self.out_features * self.in_features

    @property
    def nbytes(self) -> int:
        """Of the weight."""
        return self.qdata.nbytes + self.scale.nbytes

    def join(self, dtype: torch.dtype) -> None:
        """Become the rounded nn.Linear that it holds the parts of.

        Args:
            dtype: of a weight of 8 bits; one of 4 has that of its scales.
        """
        weight = _joined(self.qdata, self.scale, self.bits, dtype)
        for own in PARTS:
            delattr(self, own)
        del self.bits, self.dtype
        self.__class__ = nn.Linear  # type: ignore[assignment]
        bias = self._parameters.pop("bias")
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        self.register_parameter("bias", bias)


def _joined(qdata: Tensor, scale: Tensor, bits: Bits, dtype: torch.dtype) -> Tensor:
    """Torchao's tensor of its parts."""
    of_torchao = require_torchao(f"weights of {bits} bits")
    if bits == 8:
        zero = torch.zeros_like(scale, dtype=torch.int8)
        made: Tensor = of_torchao.Int8Tensor(
            qdata, scale, [1, qdata.shape[1]], dtype, zero_point=zero
        )
        return made
    halves = torch.stack([qdata & 15, qdata >> 4], -1).flatten(1)
    values = (halves ^ 8).to(torch.int8) - 8
    zero = torch.zeros_like(scale, dtype=torch.int8)
    made = of_torchao.IntxUnpackedToInt8Tensor(
        values, scale, zero, _INT4, (1, GROUP), scale.dtype, None
    )
    return made
