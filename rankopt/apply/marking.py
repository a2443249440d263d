"""Mark a model as low rank or rounded, so that it saves itself reloadably."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rankopt.apply.quantizer import RankoptConfig, RankoptQuantizer
from rankopt.errors import ModelError
from rankopt.model.lowrank import LowRank
from rankopt.plan.plan import Plan


@dataclasses.dataclass(frozen=True)
class Ties:
    """What a transformers model says about its ties.

    Attributes:
        keys: each transformers model in it -> copies and their originals.
        configs: configs that tie.
    """

    keys: Mapping[PreTrainedModel, dict[str, str]]
    configs: tuple[Any, ...]


def attach(model: nn.Module, plan: Plan) -> Ties | None:
    """Tell a transformers model that it is low rank, so that it saves itself reloadably.

    A head or an embedding that is low rank is no longer tied.

    Returns:
        What ``detach`` needs.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    ranks = {
        member: entry.rank
        for entry in plan.layers
        if entry.rank is not None
        for member in entry.layer.members
    }
    before = _untie(model, ranks)
    after = model.all_tied_weights_keys
    ties = after if after != before.keys[model] else None
    config = RankoptConfig(ranks, plan.backend, ties=ties, form=plan.form, bits=plan.bits)
    quantizer = RankoptQuantizer(config)
    quantizer.plan = plan
    quantizer.attach(model)
    return before


def _untie(model: PreTrainedModel, low_rank: Collection[str]) -> Ties:
    # A part that was not set up as a model of its own knows of no ties.
    parts = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel) and hasattr(part, "all_tied_weights_keys")
    }
    keys = {part: dict(part.all_tied_weights_keys) for part in parts.values()}
    configs: dict[int, Any] = {}
    for prefix, part in parts.items():
        dot = f"{prefix}." if prefix else ""
        own = {name.removeprefix(dot) for name in low_rank if name.startswith(dot)}
        gone = {f"{name}.weight" for name in own}
        part.all_tied_weights_keys = {
            _renamed(part, copy, own): _renamed(part, original, own)
            for copy, original in keys[part].items()
            if not {copy, original} & gone
        }
        swapped = any(isinstance(part.get_submodule(x).down, nn.Embedding) for x in own)
        if getattr(part.config, "tie_word_embeddings", False) and (
            swapped or keys[part].keys() & gone
        ):
            configs[id(part.config)] = part.config
    for config in configs.values():
        config.tie_word_embeddings = False
    return Ties(keys, tuple(configs.values()))


def _renamed(model: nn.Module, parameter: str, low_rank: Collection[str]) -> str:
    """The name of a bias in a low-rank layer: it has moved into ``up``."""
    name, _, own = parameter.rpartition(".")
    low = model.get_submodule(name) if name in low_rank else None
    inside = isinstance(low, LowRank) and low.up.bias is not None
    return f"{name}.up.{own}" if inside else parameter


def require_unquantised(model: nn.Module) -> None:
    """Refuse a model that another method has quantised: transformers has one place for one."""
    taken = getattr(getattr(model, "config", None), "quantization_config", None)
    if taken is not None:
        method = taken.get("quant_method") if isinstance(taken, dict) else taken.quant_method
        raise ModelError(
            f"the model is marked as quantised ({getattr(method, 'value', method)}): dequantise it "
            "and save it as a plain model first"
        )


def detach(model: nn.Module, before: Ties | None) -> None:
    """Undo attach."""
    if isinstance(model, PreTrainedModel) and before is not None:
        model.hf_quantizer.remove_quantization_config(model)
        for part, keys in before.keys.items():
            part.all_tied_weights_keys = keys
        for config in before.configs:
            config.tie_word_embeddings = True
