"""Apply a plan to a checkpoint without ever having the model in memory.

The model is loaded with its weights left in their files (``load_model(device_map="disk")``), from
which each is read when it is asked for. So a plan is held against it as against any model, and
then modules without values stand in the planned layers' places: names, shapes and ties of
the smaller model are known, and its files can be laid out (see shards). What remains is to make one
piece after the other: the factors of a layer, or a tensor that stays what it is.

What comes out is what apply_plan and save_model write, byte for byte.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rankopt._version import __version__
from rankopt.apply.apply import Planned
from rankopt.apply.marking import attach
from rankopt.apply.quantizer import guard_of
from rankopt.apply.saving import NO_CODE, NO_CODE_FOR_BITS, complete, write_config
from rankopt.apply.shards import JOURNAL, Shards, require_partial
from rankopt.apply.surgery import empty_in_place_of, replace
from rankopt.errors import ModelError, few
from rankopt.files import partial_of, require_free, whole_folder
from rankopt.model.offloaded import files_of_weights
from rankopt.model.rounding import in_parts
from rankopt.model.size import model_size
from rankopt.model.weights import tensor_of
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from rankopt.progress import bar


def apply_streamed(
    model: PreTrainedModel,
    plan: Plan,
    profile: Profile,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    allow_other_weights: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = (),
    remote_code: bool = False,
    progress: bool | None = None,
) -> None:
    """Write the smaller model of a plan, one tensor at a time; it appears whole or not at all.

    What was made before a kill lies in ``DIRECTORY.partial`` and is not made again by the same
    call. At the end all is read again and compared with what was written, and the folder with what
    ``from_pretrained`` makes of it.

    Args:
        model: loaded with ``device_map="disk"``; of no use afterwards.
        plan: see apply_plan.
        profile: see apply_plan.
        directory: see save_model.
        tokenizer: see save_model.
        allow_other_weights: see apply_plan.
        overwrite: see save_model.
        command: see save_model.
        remote_code: see save_model.
        progress: a bar on stderr; by default if it is a terminal.

    Raises:
        PlanError, ModelError, OptionError: see apply_plan and save_model; or a tensor of the
            checkpoint would be lost, or the parameters are not those that the plan counts.
        RankoptError: the folder is taken, or ``DIRECTORY.partial`` is of another model or plan.
    """
    partial = partial_of(directory)
    require_free(directory, overwrite)
    require_partial(partial)
    _require_all_read(model)
    _settle_ties(model)
    settings = _settings(model, plan, profile, allow_other_weights)
    planned = Planned.of(model, plan, profile, allow_other_weights)
    if planned.bits:
        settings["torchao"] = version("torchao")
    hollow = {
        name: empty_in_place_of(
            planned.modules[name], planned.ranks.get(name), plan.form, planned.bits.get(name)
        )
        for name in [*planned.ranks, *planned.only_rounded]
    }
    if remote_code and (planned.bits or not hollow):
        raise ModelError(NO_CODE_FOR_BITS if planned.bits else NO_CODE)
    replace(model, hollow)
    attach(model, plan)
    size = model_size(model, [entry.layer for entry in plan.layers])
    if (size.planned, size.model) != (plan.size.planned, plan.size.model):
        raise ModelError(
            f"the smaller model would have {size.model:,} parameters, {size.planned:,} in the "
            f"planned layers, where the plan counts {plan.size.model:,} and "
            f"{plan.size.planned:,}: profile this model again"
        )
    tensors, originals = _to_write(model)
    pieces = _pieces(tensors, hollow)
    with Shards(partial.absolute(), tensors, settings) as shards:
        left = [piece for piece in pieces if not shards.has(piece)]
        with whole_folder(directory, overwrite, partial=shards.folder, journal=JOURNAL):
            for piece in bar(left, "Weights", "piece", progress):
                names = pieces[piece]
                made = _factors(planned, piece) if piece in hollow else _read(model, piece)
                shards.put(piece, {name: made[name] for name in names})

            def intact(name: str, loaded: Tensor) -> bool:
                stored = originals.get(name, name)
                ours = tensors.get(stored)
                # T5 keeps some layers in float32, and may widen what it reads.
                fits = ours is None or (
                    ours.shape == loaded.shape
                    and torch.promote_types(ours.dtype, loaded.dtype) == loaded.dtype
                )
                return fits and (ours is None or stored != name or shards.intact(name))

            write_config(model, shards.folder)
            shards.finish(size.model)
            about: dict[str, Any] = {"plan": plan, "tokenizer": tokenizer, "command": command}
            complete(model, shards.folder, intact, **about, remote_code=remote_code)


def _settings(
    model: PreTrainedModel, plan: Plan, profile: Profile, allow_other_weights: bool
) -> dict[str, Any]:
    """What must be the same when a partial folder is gone on with."""
    found = {each["safetensors_file"] for each in files_of_weights(model).values()}
    own = [Path(file) for file in found if Path(file).parent == Path(model.name_or_path)]
    return {
        "plan": hashlib.sha256(plan.to_json().encode()).hexdigest(),
        "profile": profile.digest(),
        "model": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in own},
        "dtype": str(model.dtype),
        "allow_other_weights": allow_other_weights,
        "rankopt": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _require_all_read(model: PreTrainedModel) -> None:
    """Refuse a checkpoint with tensors of the model's that are not read.

    Of those that are not the model's, transformers has told when it was loaded.
    """
    read, state = files_of_weights(model), model.state_dict().keys()
    used = {(each["safetensors_file"], each["weight_name"]) for each in read.values()}
    lost = []
    for path in {path for path, _ in used}:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
        lost += [name for name in names & state if (path, name) not in used]
    if lost:
        raise ModelError(f"weights of the checkpoint would be lost: {few(sorted(lost))}")


def _settle_ties(model: PreTrainedModel) -> None:
    """Ties as ``from_pretrained`` settles them where it has the values.

    Two that are both in the files are tied if they are equal; where only the copy is, it stands
    for both.
    """
    files, ties = files_of_weights(model), model.all_tied_weights_keys
    for copied, original in list(ties.items()):
        if copied not in files or original not in files:
            there = files.get(copied, files.get(original))
            files |= {} if there is None else {copied: there, original: there}
        elif files[copied] != files[original]:
            one, other = _read(model, copied)[copied], _read(model, original)[original]
            if one.shape != other.shape or not torch.equal(one, other):
                del ties[copied]


def _to_write(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name -> tensor, maybe without values, of what is written; and copy -> original, of ties."""
    state, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    ties = {a: b for a, b in model.all_tied_weights_keys.items() if b in state}
    kept = {name: tensor for name, tensor in state.items() if name not in ties}
    # There is nothing to revert, but this is what puts names into the order of save_pretrained.
    return revert_weight_conversion(model, kept), ties


def _pieces(tensors: Mapping[str, Tensor], new: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Piece -> its tensors: those of a layer that is replaced together, any other by itself."""
    found: dict[str, list[str]] = {}
    for name in tensors:
        parent = name
        while parent and parent not in new:
            parent = parent.rpartition(".")[0]
        found.setdefault(parent or name, []).append(name)
    return found


def _factors(planned: Planned, name: str) -> dict[str, Tensor]:
    """All tensors of a layer that is replaced, the guard among them (see quantizer)."""
    if name in planned.ranks:
        made: nn.Module = planned.low_rank(name, planned.kept(name))
    else:
        made = planned.rounded(name)
    state = in_parts(made.state_dict())
    return {f"{name}.{own}": tensor for own, tensor in state.items()} | {
        f"{name}.weight": guard_of(made)
    }


def _read(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """A tensor that stays what it is."""
    module, _, own = name.rpartition(".")
    found = tensor_of(model.get_submodule(module), own)
    if found is None or found.is_meta:
        raise ModelError(f"{name} is not in the files of {model.name_or_path}")
    return {name: found}
