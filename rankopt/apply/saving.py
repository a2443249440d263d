"""Save compressed models as ordinary transformers folders, and mark them as such.

How they are loaded again: see quantizer.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rankopt.apply.card import CARD, model_card
from rankopt.apply.quantizer import RankoptQuantizer
from rankopt.apply.remote import alone, write_code
from rankopt.apply.verify import require_reloadable
from rankopt.errors import ModelError, first_line
from rankopt.files import whole_folder
from rankopt.model.weights import unwrapped
from rankopt.plan.plan import Plan

NO_CODE = "no layer of the model is low rank: transformers loads it without code in its folder"
NO_CODE_FOR_BITS = (
    "the model has rounded weights, which the code in a folder does not read: leave remote_code "
    "(--remote-code) out, and import rankopt where it is loaded"
)


def save_model(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    measured: Mapping[str, float] | None = None,
    command: Sequence[str] = (),
    remote_code: bool = False,
) -> None:
    """Write a model as a transformers folder; it appears whole or not at all.

    What was written is loaded again and compared before the folder appears. A compressed model has
    a model card, ``README.md``.

    Args:
        model: a transformers model, compressed or dense; wrapped by torch.compile it may be.
        directory: does not exist, is empty, or overwrite is set.
        plan: also written, as ``rankopt_plan.json``. The card has the plan that was applied to the
            model in any case.
        tokenizer: also written.
        overwrite: replace a folder that has something in it.
        measured: for the card: what -> value, in the unit that its name says.
        command: for the card: the command line that made the model, word by word.
        remote_code: also write ``modeling_rankopt.py``, by which ``from_pretrained(directory,
            trust_remote_code=True)`` of an auto class loads the model where rankopt is not
            installed. So does a model that was loaded from a folder that has it.

    Raises:
        ModelError: not a transformers model, or one that would not come back as it is; with
            ``remote_code`` a dense model, one of rounded weights, or one that transformers has no
            auto class for.
        RankoptError: the folder is taken.
    """
    inner = unwrapped(model)
    if _has_adapters(inner):
        raise ModelError(
            "adapters are saved without the model that they are on: merge them first "
            "(merge_and_unload of PEFT), or save them with their own save_pretrained"
        )
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(f"{type(inner).__name__} is not a transformers model: save its state_dict")
    low = _compressed(inner)
    if remote_code and low is None:
        raise ModelError(NO_CODE)
    if remote_code and low is not None and low.quantization_config.bits:
        raise ModelError(NO_CODE_FOR_BITS)
    with whole_folder(directory, overwrite) as folder:
        try:
            inner.save_pretrained(folder)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ModelError(f"transformers cannot save this model: {first_line(error)}") from error
        about: dict[str, Any] = {"plan": plan, "tokenizer": tokenizer, "measured": measured}
        complete(inner, folder, **about, command=command, remote_code=remote_code)


def complete(
    model: PreTrainedModel,
    folder: Path,
    same: Callable[[str, Tensor], bool] | None = None,
    *,
    plan: Plan | None = None,
    tokenizer: Any = None,
    measured: Mapping[str, float] | None = None,
    command: Sequence[str] = (),
    remote_code: bool = False,
) -> None:
    """Verify a folder that has configs and weights, and add what else belongs into it.

    Args:
        model: whose it is.
        folder: not yet under its name.
        same: see require_reloadable.
        plan: this and what follows: see save_model.
        tokenizer: see save_model.
        measured: see save_model.
        command: see save_model.
        remote_code: see save_model.

    Raises:
        ModelError: see save_model.
    """
    low, auto_class = _compressed(model), None
    if remote_code or (low is not None and low.with_code):
        auto_class = write_code(model, folder)
        with alone():
            require_reloadable(model, folder, same)
    require_reloadable(model, folder, same)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if plan is not None:
        plan.save(folder / "rankopt_plan.json")
    if low is not None:
        text = model_card(model, plan or low.plan, measured, command, auto_class)
        (folder / CARD).write_text(text, encoding="utf-8")


def _has_adapters(model: nn.Module) -> bool:
    """Of PEFT, which older versions of it still name in a model that they were merged into."""
    wraps = hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel)
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    loaded = bool(getattr(model, "_hf_peft_config_loaded", False))
    return wraps or loaded or "BaseTunerLayer" in kinds


def _compressed(model: PreTrainedModel) -> RankoptQuantizer | None:
    """What a model with low-rank or rounded layers has; None of a dense one."""
    found = getattr(model, "hf_quantizer", None)
    if not isinstance(found, RankoptQuantizer):
        return None
    config = found.quantization_config
    return found if config.ranks or config.bits else None


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """The configs, as ``save_pretrained`` writes them with the weights."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
