"""Code of a low-rank model, for transformers' ``trust_remote_code=True``.

Layers whose weight W (out, in) has a low rank r are kept in one of two forms:

    pairs      W = up @ down
    pivoted    r of W's rows (or columns, if those are fewer) and what the others are of them

``config.json`` says under ``quantization_config`` which layers these are; transformers asks the
quantizer below to put them in place before it reads the weights. Nothing is quantised. The package
rankopt, which wrote this file, is not needed; where it is imported, it does the work instead.
"""

import re
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "rankopt"
FORMAT_VERSION = 1


class LowRank(nn.Module):
    """What stands in the place of a dense layer: two plain layers of torch in a row.

    Args:
        out_features: rows of W.
        in_features: columns of W.
        rank: width between the two.
        own: whether a linear layer has a bias; of an embedding the padding index.
        how: device and dtype, as in ``nn.Linear``.
    """

    down: nn.Module
    up: nn.Linear

    def __init__(
        self, out_features: int, in_features: int, rank: int, own: Any, how: dict[str, Any]
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.rank = out_features, in_features, rank
        self._make(own, how)

    def _make(self, own: Any, how: dict[str, Any]) -> None:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the dense weight, for who asks for those; it is not formed (meta)."""
        shape = (self.out_features, self.in_features)
        return torch.empty(shape, dtype=self.up.weight.dtype, device="meta")


class LowRankLinear(LowRank):
    """y = up(down(x)), the bias in ``up``."""

    def _make(self, own: bool, how: dict[str, Any]) -> None:
        self.down = nn.Linear(self.in_features, self.rank, bias=False, **how)
        self.up = nn.Linear(self.rank, self.out_features, bias=own, **how)

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``up``."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., in)`` -> ``(..., out)``."""
        y: Tensor = self.up(self.down(x))
        return y


def ordered(x: Tensor, index: Tensor) -> Tensor:
    """``x.index_select(-1, index)`` of a permutation, which takes CPUs several times as long.

    Args:
        x: shape ``(..., n)``.
        index: of each place where it comes from, int64 ``(n,)``.
    """
    return x.gather(-1, index.expand_as(x))


class PivotedColumns(LowRankLinear):
    """W = [A, A D] with its columns in another order: y = up(x_pivots + down(x_others))."""

    index: Tensor

    def _make(self, own: bool, how: dict[str, Any]) -> None:
        self.down = nn.Linear(self.in_features - self.rank, self.rank, bias=False, **how)
        self.up = nn.Linear(self.rank, self.out_features, bias=own, **how)
        self.register_buffer("index", torch.arange(self.in_features, device=how["device"]))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., in)`` -> ``(..., out)``."""
        shares = [self.rank, self.in_features - self.rank]
        parts = torch.split(ordered(x, self.index), shares, -1)
        y: Tensor = self.up(parts[0] + self.down(parts[1]))
        return y


class PivotedRows(LowRank):
    """W = [B; C B] with its rows in another order: h = down(x), y = [h, up(h)] + bias."""

    index: Tensor

    def _make(self, own: bool, how: dict[str, Any]) -> None:
        self.down = nn.Linear(self.in_features, self.rank, bias=False, **how)
        self.up = nn.Linear(self.rank, self.out_features - self.rank, bias=False, **how)
        self.register_buffer("index", torch.arange(self.out_features, device=how["device"]))
        self.bias = nn.Parameter(torch.zeros(self.out_features, **how)) if own else None

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., in)`` -> ``(..., out)``."""
        kept = self.down(x)
        y = ordered(torch.cat([kept, self.up(kept)], -1), self.index)
        return y if self.bias is None else y + self.bias


class LowRankEmbedding(LowRank):
    """y = up(down(index)) of indices below ``in``."""

    def _make(self, own: int | None, how: dict[str, Any]) -> None:
        self.down = nn.Embedding(self.in_features, self.rank, own, **how)
        self.up = nn.Linear(self.rank, self.out_features, bias=False, **how)

    @property
    def weight(self) -> Tensor:
        """See LowRank; an embedding keeps the transpose."""
        return super().weight.T

    def forward(self, index: Tensor) -> Tensor:
        """Shape ``(...)`` of indices -> ``(..., out)``."""
        y: Tensor = self.up(self.down(index))
        return y


class PivotedEmbedding(LowRankEmbedding):
    """r numbers are looked up, the others made of them."""

    index: Tensor

    def _make(self, own: int | None, how: dict[str, Any]) -> None:
        self.down = nn.Embedding(self.in_features, self.rank, own, **how)
        self.up = nn.Linear(self.rank, self.out_features - self.rank, bias=False, **how)
        self.register_buffer("index", torch.arange(self.out_features, device=how["device"]))

    def forward(self, index: Tensor) -> Tensor:
        """Shape ``(...)`` of indices -> ``(..., out)``."""
        kept = self.down(index)
        return ordered(torch.cat([kept, self.up(kept)], -1), self.index)


def low_rank(dense: Any, rank: int, form: str) -> LowRank:
    """The empty low-rank layer for a dense one: nn.Linear, Conv1D of transformers, nn.Embedding."""
    weight = dense.weight
    how = {"device": weight.device, "dtype": weight.dtype}
    embeds = isinstance(dense, nn.Embedding)
    turned = embeds or isinstance(dense, transformers.pytorch_utils.Conv1D)
    out_features, in_features = weight.shape[::-1] if turned else weight.shape
    own = dense.padding_idx if embeds else dense.bias is not None
    kind: type[LowRank]
    if form == "pairs":
        kind = LowRankEmbedding if embeds else LowRankLinear
    elif embeds:
        kind = PivotedEmbedding
    else:
        kind = PivotedColumns if in_features <= out_features else PivotedRows
    return kind(out_features, in_features, rank, own, how)


class Config(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` says under ``quantization_config``.

    Args:
        ranks: low-rank layers and their ranks, by name.
        form: ``pairs`` or ``pivoted``.
        ties: parameters that stay tied although the config ties no more, copy -> original.
        format_version: of this entry.
        others: kept as they are.
    """

    def __init__(
        self,
        ranks: dict[str, int],
        form: str = "pairs",
        ties: dict[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        **others: Any,
    ) -> None:
        if format_version != FORMAT_VERSION or form not in ("pairs", "pivoted"):
            raise ValueError(
                f"config.json is of format {format_version}, form {form}; the code beside it reads "
                f"{FORMAT_VERSION}, pairs and pivoted"
            )
        self.__dict__.update(others)
        self.quant_method, self.format_version = METHOD, format_version
        self.ranks, self.form, self.ties = dict(ranks), form, dict(ties or {})


class Quantizer(HfQuantizer):  # type: ignore[misc]
    """Puts low-rank layers in place before weights are loaded."""

    requires_calibration = True
    quantization_config: Config
    is_trainable = is_qat_trainable = is_compileable = True

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """None: the files have the model's own names."""
        return []

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config, modules = self.quantization_config, dict(model.named_modules())
        prefix, guards = f"{model.base_model_prefix}.", []
        for saved, rank in config.ranks.items():
            # A base model loaded from a folder with a head, or the other way round.
            names = (saved, saved.removeprefix(prefix), prefix + saved)
            name = next((each for each in names if each in modules), None)
            if name is None and type(model).__name__ not in (model.config.architectures or ()):
                continue  # The layer belongs to a head that this class has not.
            if name is None:
                raise ValueError(f"{type(model).__name__} has no layer {saved} to be low rank")
            low = low_rank(modules[name], rank, config.form)
            for other, module in list(model.named_modules(remove_duplicate=False)):
                if module is modules[name]:
                    model.set_submodule(other, low)
            guards.append(re.escape(name.removeprefix(prefix)))
        if not guards:
            raise ValueError(f"{type(model).__name__} has none of the layers to be low rank")
        # Of no size: an error for who loads them into dense layers.
        pattern = rf"^(.*\.)?({'|'.join(guards)})\.weight$"
        known = model._keys_to_ignore_on_load_unexpected
        # A list, or nothing, in the first versions of transformers 5.
        more = {*known, pattern} if isinstance(known, set) else [*(known or ()), pattern]
        model._keys_to_ignore_on_load_unexpected = more
        there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        ties = {**model.all_tied_weights_keys, **config.ties}
        model.all_tied_weights_keys = {a: b for a, b in ties.items() if {a, b} <= there}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # What is quantised cannot change its dtype, and this can.
        model.is_quantized = False
        for module in model.modules():
            if isinstance(getattr(module, "index", None), Tensor):
                # The first versions of transformers 5 cast whole numbers with what is kept wide.
                module.index = module.index.long()
            if hasattr(module, "config"):
                vars(module.config).pop("_is_quantized", None)
        model._weight_conversions = []
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The weights, and one of no size in the place of each dense one."""
        state = dict(model.state_dict())
        for name, module in model.named_modules():
            if isinstance(module, LowRank):
                state[f"{name}.weight"] = torch.zeros(0, dtype=module.up.weight.dtype)
        for copied in self.quantization_config.ties:
            state.pop(copied, None)
        return state, {}

    def is_serializable(self) -> bool:
        """Whether save_pretrained may write the model."""
        return True


if METHOD not in AUTO_QUANTIZER_MAPPING:
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Config
    AUTO_QUANTIZER_MAPPING[METHOD] = Quantizer
