"""The hook through which ``from_pretrained`` rebuilds low-rank and rounded layers.

transformers lets third parties register a ``quant_method``: its config names the low-rank layers
and the rounded ones, and ``from_pretrained`` asks our quantizer to swap them in before the weights
are loaded. It is the place that transformers offers for changing modules on load, whether anything
is quantised or not. Rounded weights are read as their parts (see rounding), which become torchao's
tensors when all is read.

Without ``import rankopt`` transformers would only warn about the unknown method and load a dense
model with random weights in the planned layers. So a saved file also holds a zero-size tensor
``<layer>.weight`` for each of these layers: loading it into a dense layer is an error of size.

A head and an embedding that were tied have factors of their own, so the config unties them. Other
ties of the model go on (BERT's head shares its bias with a second name); they are named here,
because transformers forgets all of them with ``tie_word_embeddings``.

transformers writes some architectures under names, or in shapes, of an older format (fused
projections, experts one by one) and converts them on load. Factors of a matrix do not go that way,
so a low-rank model is written under its own names and read without conversion.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankopt.apply.refined import read
from rankopt.apply.remote import taken_out
from rankopt.apply.surgery import empty_in_place_of, put_dense, replace
from rankopt.errors import ModelError, few
from rankopt.layers import BITS, FORMS, Bits, Form
from rankopt.model.lowrank import LowRank
from rankopt.model.rounding import Parts, holds_rounded, in_parts, require_torchao
from rankopt.model.weights import shown_shape, tensor_of
from rankopt.plan.plan import Plan

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
        own_names: the files have the model's own names; older ones those of transformers' format.
        form: how the low-rank layers are kept.
        refined: what the factors have learnt since, see refined; no entry where nothing.
        bits: rounded layers and their bits, by module name; no entry where none.
    """

    # Of the class, as what an object does not have is not written.
    refined: Sequence[Mapping[str, Any]] = ()
    bits: Mapping[str, Bits] = MappingProxyType({})

    def __init__(
        self,
        ranks: Mapping[str, int],
        backend: str = "fwsvd",
        format_version: int = FORMAT_VERSION,
        ties: Mapping[str, str] | None = None,
        own_names: bool = False,
        form: Form = "pairs",
        refined: Sequence[Mapping[str, Any]] = (),
        bits: Mapping[str, Bits] = MappingProxyType({}),
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if format_version != FORMAT_VERSION or form not in FORMS or unknown:
            raise ValueError(
                f"this model folder is in rankopt format {format_version} "
                f"(form {form}, unknown entries: {sorted(unknown)}); this rankopt reads "
                f"{FORMAT_VERSION} ({', '.join(FORMS)})"
            )
        self.quant_method = METHOD
        self.format_version = format_version
        self.backend = backend
        self.ranks = dict(ranks)
        self.ties = dict(ties or {})
        self.own_names = own_names
        self.form = form
        if strange := [x for x in bits.values() if x not in BITS]:
            raise ValueError(f"this model folder has layers of {strange[0]} bits, not of 8 or 4")
        if bits:
            self.bits = dict(bits)
        if refined:
            self.refined = [each.model_dump() for each in read(refined)]


class RankoptQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps low-rank and rounded layers in on load and writes the guard on save."""

    requires_calibration = True
    quantization_config: RankoptConfig

    def __init__(self, quantization_config: RankoptConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        #: That was applied in this process, for the model's card.
        self.plan: Plan | None = None
        #: What transformers converts of the dense model; None: what it does by default.
        self.conversions: list[Any] | None = None
        #: The model was loaded from a folder that has its code (see remote).
        self.with_code = False

    def attach(self, model: "PreTrainedModel") -> None:
        """Mark a model that has its low-rank layers, so that it saves itself reloadably.

        transformers takes ``is_quantized`` to mean that the dtype cannot change, and that the model
        does not learn: neither is so but of rounded weights.
        """
        self.quantization_config.own_names = True
        self.conversions = getattr(model, "_weight_conversions", None)
        model._weight_conversions = []
        model.config.quantization_config = self.quantization_config
        model.hf_quantizer = self
        model.quantization_method = METHOD
        model.is_quantized = bool(self.quantization_config.bits)
        for name, part in _models_in(model).items():
            part.config.__dict__.pop("_is_quantized", None)
            if name and layers_of(part):
                part.hf_quantizer = _PartQuantizer(self.quantization_config)

    def remove_quantization_config(self, model: "PreTrainedModel") -> None:
        """Undo attach."""
        super().remove_quantization_config(model)
        model._weight_conversions = self.conversions
        for part in _models_in(model).values():
            if isinstance(getattr(part, "hf_quantizer", None), _PartQuantizer):
                del part.hf_quantizer

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: "PreTrainedModel"
    ) -> list[Any]:
        """None on load, if the files have the model's own names."""
        if self.quantization_config.own_names:
            return []
        found: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return found

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to keep a part of a rounded model off the device that computes.

        Raises:
            ModelError: what accelerate puts back for a forward pass are plain tensors.
        """
        device_map = kwargs.get("device_map")
        places = {str(x) for x in device_map.values()} if isinstance(device_map, dict) else set()
        offloads = "disk" in places or ("cpu" in places and len(places) > 1)
        if self.quantization_config.bits and offloads:
            raise ModelError(
                f"rounded weights cannot be offloaded (device_map has {', '.join(sorted(places))}):"
                ' load the model onto its devices alone, or all of it with device_map="cpu"'
            )

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", **kwargs: Any
    ) -> "PreTrainedModel":
        config, modules = self.quantization_config, dict(model.named_modules())
        if config.bits:
            require_torchao("loading a model of rounded weights")
        prefix = f"{model.base_model_prefix}."
        found: dict[str, str] = {}
        for saved_name in {**config.ranks, **config.bits}:
            # A base model loaded from a folder with a head, or the other way round.
            candidates = (saved_name, saved_name.removeprefix(prefix), prefix + saved_name)
            name = next((c for c in candidates if c in modules), None)
            if name is not None:
                found[saved_name] = name
            elif type(model).__name__ in (model.config.architectures or ()):
                kind = "low rank" if saved_name in config.ranks else "rounded"
                raise ValueError(f"{type(model).__name__} has no layer {saved_name} to be {kind}")
            # Else the layer belongs to a head that this class has not.
        for saved_name, name in found.items():
            rank, bits = config.ranks.get(saved_name), config.bits.get(saved_name)
            replace(model, {name: empty_in_place_of(modules[name], rank, config.form, bits)})
        if found:
            guards = [re.escape(name.removeprefix(prefix)) for name in found.values()]
            pattern = rf"^(.*\.)?({'|'.join(guards)})\.weight$"
            known = model._keys_to_ignore_on_load_unexpected
            # A list, or nothing, in the first versions of transformers 5.
            more = {*known, pattern} if isinstance(known, set) else [*(known or ()), pattern]
            model._keys_to_ignore_on_load_unexpected = more
        elif config.ranks or config.bits:
            raise ValueError(f"{type(model).__name__} has none of the layers to be low rank")
        config.ranks = {found[name]: rank for name, rank in config.ranks.items() if name in found}
        if config.bits:
            config.bits = {found[name]: own for name, own in config.bits.items() if name in found}
        there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        ties = {**model.all_tied_weights_keys, **self.quantization_config.ties}
        model.all_tied_weights_keys = {a: b for a, b in ties.items() if {a, b} <= there}
        return model

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **kwargs: Any
    ) -> "PreTrainedModel":
        for name, module in list(model.named_modules()):
            if isinstance(getattr(module, "index", None), Tensor):
                # The first versions of transformers 5 cast whole numbers with what is kept wide.
                module.index = module.index.long()
            if isinstance(module, Parts):
                module.join(torch.float32 if _is_kept_wide(model, name) else module.dtype)
        self.attach(model)
        # A dense model of these layers would be converted as one that was never loaded.
        self.conversions = None
        self.with_code = taken_out(model.config)
        return model

    def get_state_dict_and_metadata(
        self, model: "PreTrainedModel"
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The weights, also those that accelerate offloads, plus the zero-size guards.

        Raises:
            ModelError: a model made from the config would not have these weights.
        """
        state = in_parts(model.state_dict())
        if not getattr(model, "_hf_peft_config_loaded", False):
            self._require_reloadable(model, state)
        if not hasattr(model, "hf_device_map"):
            # With a map, save_pretrained reads offloaded weights itself, one shard at a time.
            for name, module in model.named_modules():
                for own, parameter in module.named_parameters(recurse=False):
                    key = f"{name}.{own}" if name else own
                    weight = tensor_of(module, own) if parameter.is_meta else None
                    if weight is not None and key in state:
                        state[key] = weight.cpu()
        for name, module in layers_of(model).items():
            state[f"{name}.weight"] = guard_of(module)
        # transformers knows these ties by their names in the dense model only.
        for copied in self.quantization_config.ties:
            state.pop(copied, None)
        return state, {}

    def _require_reloadable(self, model: "PreTrainedModel", state: Mapping[str, Tensor]) -> None:
        again = _skeleton(model)
        RankoptQuantizer(copy.deepcopy(self.quantization_config)).preprocess_model(again)
        expected = {name: tuple(tensor.shape) for name, tensor in again.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        differences = [
            f"{name} is {shown_shape(found.get(name))} here "
            f"and {shown_shape(expected.get(name))} there"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
        if differences:
            raise ModelError(
                f"the saved model would not load again, because a {type(model).__name__} made from "
                f"its config has other weights: {few(differences, between='; ')}: change the "
                "config as the model was changed, or save the state_dict"
            )

    def dequantize(
        self, model: "PreTrainedModel", dtype: torch.dtype | str | None = None
    ) -> "PreTrainedModel":
        """Multiply the factors; rounded weights are then plain ones, of their values.

        Args:
            model: low rank or rounded; dense afterwards.
            dtype: move the whole model to it; by default every layer keeps the dtype it has.
        """
        self._dequantize(model)
        self.remove_quantization_config(model)
        if dtype is not None:
            text = str(dtype).removeprefix("torch.")
            model.to(getattr(torch, text))
        return model

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> Any:
        dense = _skeleton(model)
        for name, module in layers_of(model).items():
            replace(model, {name: put_dense(module, dense.get_submodule(name))})
        there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        ties = model.all_tied_weights_keys
        model.all_tied_weights_keys = {a: b for a, b in ties.items() if {a, b} <= there}
        return model

    def is_serializable(self) -> bool:
        """Whether save_pretrained may write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary weights, but those that are rounded."""
        return not self.quantization_config.bits

    @property
    def is_qat_trainable(self) -> bool:
        """Factors are ordinary weights: Trainer may train them without adapters."""
        return self.is_trainable

    @property
    def is_compileable(self) -> bool:
        """Factors are ordinary layers."""
        return True


class _PartQuantizer(RankoptQuantizer):
    """Of a transformers model inside a low-rank one: only the whole says which layers are."""

    def get_state_dict_and_metadata(
        self, model: "PreTrainedModel"
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Refused."""
        raise ModelError(
            f"this {type(model).__name__} is a part of a low-rank model, which is saved as a "
            f"whole: {type(model).__name__}.from_pretrained reads the part out of that folder"
        )

    def dequantize(
        self, model: "PreTrainedModel", dtype: torch.dtype | str | None = None
    ) -> "PreTrainedModel":
        """Refused."""
        raise ModelError(
            f"this {type(model).__name__} is a part of a low-rank model: dequantize the whole"
        )


def _models_in(model: nn.Module) -> dict[str, "PreTrainedModel"]:
    """The model and the transformers models in it, by name."""
    # Not imported above: transformers imports this module while it imports itself.
    from transformers import PreTrainedModel

    return {name: m for name, m in model.named_modules() if isinstance(m, PreTrainedModel)}


def _skeleton(model: "PreTrainedModel") -> "PreTrainedModel":
    """A dense model of the same config, without memory."""
    config = copy.deepcopy(model.config)
    if isinstance(getattr(config, "dtype", None), str):
        # save_pretrained leaves a name where some architectures want the dtype.
        config.dtype = getattr(torch, config.dtype.removeprefix("torch."), None)
    with torch.device("meta"):
        return type(model)(config)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """What is in the place of dense layers, by name: low-rank layers, and rounded ones."""
    low = [module for module in model.modules() if isinstance(module, LowRank)]
    factors = {id(factor) for module in low for factor in (module.down, module.up)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LowRank) or (holds_rounded(module) and id(module) not in factors)
    }


def guard_of(module: nn.Module) -> Tensor:
    """The tensor of no size that is written under the name of a dense weight."""
    linear: Any = module.up if isinstance(module, LowRank) else module
    return torch.zeros(0, dtype=linear.weight.dtype)


def _is_kept_wide(model: "PreTrainedModel", name: str) -> bool:
    """Whether transformers reads a layer's weights in float32, as it does some of T5's."""
    of_dtype = getattr(model, "_get_dtype_plan", None)
    patterns = of_dtype(model.dtype) if of_dtype is not None else ()
    return any(re.search(each.replace("*", ".*"), f"{name}.weight") for each in patterns)


for _table in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    # The code of a folder, which may have been loaded before, gives way (see standalone).
    _table.pop(METHOD, None)
register_quantization_config(METHOD)(RankoptConfig)
register_quantizer(METHOD)(RankoptQuantizer)
