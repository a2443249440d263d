"""Save compressed models as ordinary transformers folders, and mark them as such.

How they are loaded again: see quantizer.
"""

import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rankopt.errors import ModelError
from rankopt.files import whole_folder
from rankopt.plan import Plan
from rankopt.quantizer import METHOD, RankoptConfig, RankoptQuantizer


def attach(model: nn.Module, plan: Plan) -> None:
    """Tell a transformers model that it is low rank, so that it saves itself reloadably."""
    if not isinstance(model, PreTrainedModel):
        return
    ranks = {name: rank for name, rank in plan.ranks.items() if rank is not None}
    config = RankoptConfig(ranks, plan.backend)
    model.config.quantization_config = config
    model.hf_quantizer = RankoptQuantizer(config)
    model.is_quantized = True
    model.quantization_method = METHOD


def require_unquantised(model: nn.Module) -> None:
    """Refuse a model that another method has quantised: transformers has one place for one."""
    taken = getattr(getattr(model, "config", None), "quantization_config", None)
    if taken is not None:
        method = taken.get("quant_method") if isinstance(taken, dict) else taken.quant_method
        raise ModelError(
            f"the model is marked as quantised ({getattr(method, 'value', method)}): dequantise it "
            "and save it as a plain model first"
        )


def detach(model: nn.Module) -> None:
    """Undo attach."""
    if isinstance(model, PreTrainedModel):
        model.hf_quantizer.remove_quantization_config(model)


def save_model(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a model as a transformers folder; it appears whole or not at all.

    Args:
        model: a transformers model, compressed or dense.
        directory: does not exist, is empty, or overwrite is set.
        plan: also written, as ``rankopt_plan.json``.
        tokenizer: also written.
        overwrite: replace a folder that has something in it.

    Raises:
        ModelError: not a transformers model.
        RankoptError: the folder is taken.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is not a transformers model: save its state_dict")
    with whole_folder(directory, overwrite) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if plan is not None:
            plan.save(folder / "rankopt_plan.json")
