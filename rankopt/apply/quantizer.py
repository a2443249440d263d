"""The hook through which ``from_pretrained`` rebuilds low-rank layers.

transformers lets third parties register a ``quant_method``: its config names the low-rank layers,
and ``from_pretrained`` asks our quantizer to swap them in before the weights are loaded. Nothing is
quantised; it is the place that transformers offers for changing modules on load.

Without ``import rankopt`` transformers would only warn about the unknown method and load a dense
model with random weights in the planned layers. So a saved file also holds a zero-size tensor
``<layer>.weight`` for each low-rank layer: loading it into a dense layer is an error of size.

A head and an embedding that were tied have factors of their own, so the config unties them. Other
ties of the model go on (BERT's head shares its bias with a second name); they are named here,
because transformers forgets all of them with ``tie_word_embeddings``.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankopt.model.lowrank import LowRank, LowRankEmbedding, LowRankLinear, replace
from rankopt.model.weights import is_conv1d, tensor_of, weight_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1
METHOD = "rankopt"


class RankoptConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` says under ``quantization_config``.

    Args:
        ranks: low-rank layers and their ranks, by module name in the saved model.
        backend: how they were factorised.
        format_version: of this entry.
        ties: parameters that stay tied although the config ties no more, copy -> original.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        backend: str = "fwsvd",
        format_version: int = FORMAT_VERSION,
        ties: Mapping[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if format_version != FORMAT_VERSION or unknown:
            raise ValueError(
                f"this model folder is in rankopt format {format_version} "
                f"(unknown entries: {sorted(unknown)}); this rankopt reads {FORMAT_VERSION}"
            )
        self.quant_method = METHOD
        self.format_version = format_version
        self.backend = backend
        self.ranks = dict(ranks)
        self.ties = dict(ties or {})


class RankoptQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps low-rank layers in on load and writes the guard on save."""

    requires_calibration = True
    quantization_config: RankoptConfig

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", **kwargs: Any
    ) -> "PreTrainedModel":
        modules = dict(model.named_modules())
        prefix = f"{model.base_model_prefix}."
        guards = []
        for saved_name, rank in self.quantization_config.ranks.items():
            # A base model loaded from a folder with a head, or the other way round.
            candidates = (saved_name, saved_name.removeprefix(prefix), prefix + saved_name)
            name = next((c for c in candidates if c in modules), None)
            if name is None and type(model).__name__ not in (model.config.architectures or ()):
                continue  # The layer belongs to a head that this class has not.
            if name is None:
                raise ValueError(f"{type(model).__name__} has no layer {saved_name} to be low rank")
            replace(model, {name: _empty(modules[name], rank)})
            guards.append(re.escape(name.removeprefix(prefix)))
        if guards:
            pattern = rf"^(.*\.)?({'|'.join(guards)})\.weight$"
            known = model._keys_to_ignore_on_load_unexpected or set()
            model._keys_to_ignore_on_load_unexpected = {*known, pattern}
        elif self.quantization_config.ranks:
            raise ValueError(f"{type(model).__name__} has none of the layers to be low rank")
        there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        ties = {**model.all_tied_weights_keys, **self.quantization_config.ties}
        model.all_tied_weights_keys = {a: b for a, b in ties.items() if {a, b} <= there}
        return model

    def get_state_dict_and_metadata(
        self, model: "PreTrainedModel"
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The weights, also those that accelerate offloads, plus the zero-size guards."""
        state = dict(model.state_dict())
        if not hasattr(model, "hf_device_map"):
            # With a map, save_pretrained reads offloaded weights itself, one shard at a time.
            for name, module in model.named_modules():
                for own, parameter in module.named_parameters(recurse=False):
                    key = f"{name}.{own}" if name else own
                    weight = tensor_of(module, own) if parameter.is_meta else None
                    if weight is not None and key in state:
                        state[key] = weight.cpu()
        for name, module in model.named_modules():
            if isinstance(module, LowRank):
                state[f"{name}.weight"] = torch.zeros(0, dtype=module.up.weight.dtype)
        # transformers knows these ties by their names in the dense model only.
        for copy in self.quantization_config.ties:
            state.pop(copy, None)
        return state, {}

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> Any:
        with torch.device("meta"):
            dense = type(model)(model.config)
        for name, module in list(model.named_modules()):
            if isinstance(module, LowRank):
                merged = _merged(module, dense.get_submodule(name), dtype)
                replace(model, {name: merged})
        there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        ties = model.all_tied_weights_keys
        model.all_tied_weights_keys = {a: b for a, b in ties.items() if {a, b} <= there}
        return model

    def is_serializable(self) -> bool:
        """Whether save_pretrained may write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Factors are ordinary weights: Trainer may train them without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Factors are ordinary layers."""
        return True


def _empty(dense: nn.Module, rank: int) -> LowRank:
    out_features, in_features = weight_shape(dense)
    weight = dense.get_parameter("weight")
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(dense, nn.Embedding):
        return LowRankEmbedding(in_features, out_features, rank, dense.padding_idx, **options)
    bias = getattr(dense, "bias", None) is not None
    return LowRankLinear(in_features, out_features, rank, bias, **options)


def _merged(low: LowRank, empty: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The product in the dense module that the architecture has there."""
    weight = low.weight.detach()
    weight = weight.T.contiguous() if is_conv1d(empty) else weight
    empty.weight = nn.Parameter(weight.to(dtype or weight.dtype))
    if low.up.bias is not None:
        # A copy: a dense model that ties no more would not save a bias that is another's too.
        empty.bias = nn.Parameter(low.up.bias.detach().to(dtype or weight.dtype, copy=True))
    return empty.train(low.training)


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(RankoptConfig)
    register_quantizer(METHOD)(RankoptQuantizer)
