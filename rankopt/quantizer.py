"""The hook through which ``from_pretrained`` rebuilds low-rank layers.

transformers lets third parties register a ``quant_method``: its config names the low-rank layers,
and ``from_pretrained`` asks our quantizer to swap them in before the weights are loaded. Nothing is
quantised; it is the place that transformers offers for changing modules on load.

Without ``import rankopt`` transformers would only warn about the unknown method and load a dense
model with random weights in the planned layers. So a saved file also holds a zero-size tensor
``<layer>.weight`` for each low-rank layer: loading it into a dense layer is an error of size.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankopt._register import register
from rankopt.discover import is_conv1d, weight_of
from rankopt.lowrank import LowRankLinear

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
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        backend: str = "fwsvd",
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if format_version != FORMAT_VERSION or unknown:
            raise ValueError(
                f"this checkpoint is in rankopt format {format_version} "
                f"(unknown entries: {sorted(unknown)}); this rankopt reads {FORMAT_VERSION}"
            )
        self.quant_method = METHOD
        self.format_version = format_version
        self.backend = backend
        self.ranks = dict(ranks)


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
            # A base model loaded from a checkpoint with a head, or the other way round.
            candidates = (saved_name, saved_name.removeprefix(prefix), prefix + saved_name)
            name = next((c for c in candidates if c in modules), None)
            if name is None:
                raise ValueError(f"{type(model).__name__} has no layer {saved_name} to be low rank")
            _replace_empty(model, name, modules[name], rank)
            guards.append(re.escape(name.removeprefix(prefix)))
        if guards:
            pattern = rf"^(.*\.)?({'|'.join(guards)})\.weight$"
            known = model._keys_to_ignore_on_load_unexpected or set()
            model._keys_to_ignore_on_load_unexpected = {*known, pattern}
        return model

    def get_state_dict_and_metadata(
        self, model: "PreTrainedModel"
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The weights plus the zero-size guards."""
        state = dict(model.state_dict())
        for name, module in model.named_modules():
            if isinstance(module, LowRankLinear):
                state[f"{name}.weight"] = torch.zeros(0, dtype=module.up.weight.dtype)
        return state, {}

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> Any:
        with torch.device("meta"):
            dense = type(model)(model.config)
        for name, module in list(model.named_modules()):
            if isinstance(module, LowRankLinear):
                model.set_submodule(name, _merged(module, dense.get_submodule(name), dtype))
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


def _replace_empty(model: nn.Module, name: str, dense: nn.Module, rank: int) -> None:
    weight = weight_of(dense)
    low = LowRankLinear(
        weight.shape[1],
        weight.shape[0],
        rank,
        getattr(dense, "bias", None) is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    model.set_submodule(name, low)


def _merged(low: LowRankLinear, empty: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The product in the dense layer that the architecture has there, nn.Linear or Conv1D."""
    weight = low.weight.detach()
    weight = weight.T.contiguous() if is_conv1d(empty) else weight
    empty.weight = nn.Parameter(weight.to(dtype or weight.dtype))
    if low.bias is not None:
        empty.bias = nn.Parameter(low.bias.detach().to(dtype or weight.dtype))
    return empty.train(low.training)


# Whoever imports this module first may have been interrupted by transformers' own import of it.
register()
