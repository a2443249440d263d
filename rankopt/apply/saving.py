"""Save compressed models as ordinary transformers folders, and mark them as such.

How they are loaded again: see quantizer.
"""

import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rankopt.errors import ModelError
from rankopt.files import whole_folder
from rankopt.plan.plan import Plan


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
