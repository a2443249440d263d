"""Whether a folder that was just written gives back the model that is in memory.

``from_pretrained`` itself is asked. With accelerate it builds the model on the meta device, which
takes no memory and tells names, shapes and dtypes; the values are then compared one tensor at a
time with what lies in the files. Dense models whose checkpoints transformers converts have other
names there, and without accelerate there is no meta device: those are loaded whole, on the CPU.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from rankopt.apply.quantizer import RankoptQuantizer
from rankopt.errors import ModelError, few, first_line
from rankopt.model.loading import builds_empty
from rankopt.model.rounding import PARTS, holds_rounded, in_parts
from rankopt.model.weights import tensor_of


def require_reloadable(
    model: PreTrainedModel, folder: Path, same: Callable[[str, Tensor], bool] | None = None
) -> None:
    """Refuse a folder that does not give back the model, to the bit.

    Only a dtype may come back wider, where the class asks for that (T5 keeps some layers in
    float32): the values are the same.

    Args:
        model: what was saved; models that others have quantised are not looked at.
        folder: a transformers folder.
        same: (name, tensor of the loaded model, which may be a meta tensor) -> whether the files
            have the model's values; by default the model in memory is compared.

    Raises:
        ModelError: names the first weights that would not come back, or says why none would.
    """
    if not isinstance(getattr(model, "hf_quantizer", None), RankoptQuantizer | None):
        return
    _require_code(model, folder)
    found, report = _loaded(model, folder, builds_empty())
    if found.device.type == "meta" and found._weight_conversions:
        found, report = _loaded(model, folder, False)
    ours = in_parts(model.state_dict())
    wanted, got = ours.keys(), in_parts(found.state_dict())
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    lost = {str(name) for kind in kinds for name in report.get(kind, ())}
    lost |= wanted ^ got.keys()
    if not lost:
        if same is None:
            same = functools.partial(_same, model, ours, _values(found, folder))
        lost = {name for name, tensor in got.items() if not same(name, tensor)}
    if lost:
        raise ModelError(
            f"the saved model would come back with other weights: {few(sorted(lost))}: move it to "
            f"one dtype before saving (model.to({model.dtype})) if they differ in it; else save "
            "its state_dict"
        )


def _same(
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    values: Callable[[str], Tensor | None],
    name: str,
    loaded: Tensor,
) -> bool:
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    # Parts of a rounded weight are no tensors of the module.
    ours = state[name] if holds_rounded(module) and own in PARTS else tensor_of(module, own)
    theirs = values(name) if loaded.is_meta else loaded
    if ours is None or theirs is None:
        return True  # Not written, and said not to be missed.
    ours, theirs = ours.cpu(), theirs.to(loaded.dtype)
    if ours.dtype != theirs.dtype:
        widest = torch.promote_types(ours.dtype, theirs.dtype)
        return torch.equal(ours.to(widest), theirs.to(widest))
    # By bytes, as NaN is not equal to itself.
    a, b = (x.contiguous().flatten().view(torch.uint8) for x in (ours, theirs))
    return ours.shape == theirs.shape and torch.equal(a, b)


def _loaded(model: PreTrainedModel, folder: Path, lean: bool) -> tuple[Any, dict[str, Any]]:
    options = {"device_map": "meta"} if lean else {}
    try:
        with _quiet():
            found, report = type(model).from_pretrained(
                folder, output_loading_info=True, local_files_only=True, **options
            )
    except MemoryError:
        raise
    except Exception as error:
        # Whatever it is that keeps the folder from loading.
        why = first_line(error)
        raise ModelError(
            f"the saved {type(model).__name__} would not load again ({type(error).__name__}: "
            f"{why.replace(str(folder), 'the folder')}): save its state_dict instead"
        ) from error
    return found, report


def _values(model: PreTrainedModel, folder: Path) -> Callable[[str], Tensor | None]:
    """What the files have under a name, or under that which it is tied to."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    opened: list[Any] = [safe_open(folder / file, framework="pt") for file in files]
    place = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
    ties: dict[str, str] = model.all_tied_weights_keys

    def value(name: str) -> Tensor | None:
        name = name if name in place else ties.get(name, name)
        found: Tensor | None = place[name].get_tensor(name) if name in place else None
        return found

    return value


def _require_code(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a config that points to code which is not in the folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = config.get("auto_map") or {}
    entries = [x for each in named.values() for x in (each if isinstance(each, list) else [each])]
    for entry in entries:
        # OWNER/NAME--module.Class is read from the hub.
        local = isinstance(entry, str) and "--" not in entry
        if local and not (folder / f"{entry.split('.')[0]}.py").is_file():
            raise ModelError(
                f"the config names {entry} as the code of {type(model).__name__}, which would not "
                "be in the folder: take it out of config.auto_map, or call "
                "register_for_auto_class() on the class and its config class before saving"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and reports."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
