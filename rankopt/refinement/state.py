"""What has been refined so far, on disk: a killed refinement goes on where it was.

A checkpoint is written between two steps. It is safetensors with a description in JSON, and is
refused if it is damaged or of another model, other data or other settings.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from rankopt.files import REFINEMENT, require_file
from rankopt.measure.resume import Described, read, unreadable, write
from rankopt.model.weights import tensor_of
from rankopt.refinement.fit import State
from rankopt.schema import STRICT, Count, Number

_SAMPLE = 64


@dataclasses.dataclass(frozen=True)
class RefinedBlock:
    """A block that has been refined.

    Attributes:
        name: of the module.
        before: squared error of its output on the held-out data, as a share of the output's square.
        after: the same of what was kept.
        steps: that were taken; 0 were kept if before = after.
    """

    name: str
    before: float
    after: float
    steps: int


class _Counted(BaseModel):
    """State, without its tensors, as a file has it."""

    model_config = STRICT

    step: Count
    before: Number
    best: Number
    kept: Count
    worse: Count
    slowed: Count
    averaged: Count
    lost: tuple[tuple[Count, Count], ...]


class _About(Described):
    done: tuple[RefinedBlock, ...]
    state: _Counted | None


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        state: of the fit that was under way, if one was.
        done: blocks before it.
        values: of these blocks' parameters, by name.
    """

    state: State | None = None
    done: tuple[RefinedBlock, ...] = ()
    values: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where and how often to save what has been refined.

    Attributes:
        path: of the file.
        every: steps.
        settings: that must be the same to go on.
    """

    path: Path
    every: int
    settings: Mapping[str, Any]

    def save(self, saved: Saved) -> None:
        """Write it; a reader never sees half of it."""
        tensors = {f"done/{name}": value for name, value in saved.values.items()}
        counted = None
        if saved.state is not None:
            tensors |= saved.state.tensors
            counted = {name: getattr(saved.state, name) for name in _Counted.model_fields}
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        done = [dataclasses.asdict(block) for block in saved.done]
        about = {"settings": dict(self.settings), "done": done, "state": counted}
        write(self.path, REFINEMENT, about, plain)

    def load(self, parameters: Mapping[str, nn.Parameter]) -> Saved | None:
        """Read it; None if there is none.

        Args:
            parameters: that are refined, by name.

        Raises:
            DataError: it is not readable, or of other settings; says which.
            RankoptError, WriteError: it could not be written.
        """
        require_file(self.path)
        if not self.path.is_file():
            return None
        differs = "is of a refinement with another"
        about, tensors = read(self.path, _About, self.settings, differs)
        _require_fitting(self.path, tensors, parameters)
        values = {n.removeprefix("done/"): t for n, t in tensors.items() if n.startswith("done/")}
        rest = {name: t for name, t in tensors.items() if not name.startswith("done/")}
        state = None if about.state is None else State(**about.state.model_dump(), tensors=rest)
        return Saved(state, about.done, values)


def _require_fitting(
    path: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    for name, tensor in tensors.items():
        kind, _, own = name.partition("/")
        wanted = parameters.get(own)
        if wanted is None or not (kind == "count" or tensor.shape == wanted.shape):
            raise unreadable(path, f"it has {name}, which is not in the model")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise unreadable(path, f"{name} holds what is no finite number")


def fingerprint(model: nn.Module) -> str:
    """sha256 over a model's class, and names, shapes and samples of its weights."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            digest.update(f"\n{name}.{own} {tuple(parameter.shape)} {parameter.dtype}".encode())
            flat = _values(module, own).reshape(-1)
            sample = flat[:: max(flat.numel() // _SAMPLE, 1)][:_SAMPLE].float().cpu()
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _values(module: nn.Module, name: str) -> Tensor:
    found = tensor_of(module, name)
    assert found is not None
    return found
