"""What has been measured so far, on disk: a killed profile goes on where it was.

A checkpoint is written between two batches and holds raw sums in float64; what follows a batch does
not depend on what came before. So a resumed profile has the bits of one that was never interrupted.
A checkpoint of another model, other data or other settings is refused.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AliasChoices, BaseModel, Field, ValidationError
from torch import Tensor

from rankopt.errors import DataError
from rankopt.files import CHECKPOINT, is_format, require_file, whole_file
from rankopt.measure.loss import Summed
from rankopt.measure.processes import Processes
from rankopt.schema import STRICT, Count, Number, first_of, parse


@dataclasses.dataclass
class Seen:
    """How far a process has come.

    Attributes:
        batches: of the data, those of other processes included.
        examples: in this process's batches.
        targets: loss terms in them.
        chain: digest of all batches so far, each hashed onto the one before.
        totals: for each of this process's batches: Fisher information of the layers, ``(layers,)``.
        units: for each of them: units.
        numbers: for each of them: its place in the data.
        stopped: why measuring ended before the data did, or None.
        last_check: what was found when it was last asked whether to stop.
        loss: at the given labels, summed over so many targets as are ``weighed``.
        entropy: what the model itself expects that loss to be.
        weighed: targets of which both are known.
    """

    batches: int = 0
    examples: int = 0
    targets: int = 0
    chain: str = ""
    totals: list[Tensor] = dataclasses.field(default_factory=list)
    units: list[float] = dataclasses.field(default_factory=list)
    numbers: list[int] = dataclasses.field(default_factory=list)
    stopped: str | None = None
    last_check: list[float] = dataclasses.field(default_factory=list)
    loss: float = 0.0
    entropy: float = 0.0
    weighed: int = 0

    def add(self, number: int, found: Summed, units: int, totals: Tensor) -> None:
        """Take note of a batch that this process has measured."""
        self.examples += found.examples
        self.targets += found.targets
        if found.entropy is not None:
            self.loss += found.loss
            self.entropy += found.entropy
            self.weighed += found.targets
        self.totals.append(totals)
        self.units.append(float(units))
        self.numbers.append(number)


class _Counted(BaseModel):
    """Seen, without its tensors, as a file has it."""

    model_config = STRICT

    batches: Count
    examples: Count
    targets: Count
    chain: str
    numbers: tuple[Count, ...]
    # Its second name is that in files of before there were packages.
    last_check: Annotated[
        tuple[Number, ...], Field(validation_alias=AliasChoices("last_check", "looked"))
    ]
    loss: Number = 0.0
    entropy: Number = 0.0
    weighed: Count = 0


class _Layers(BaseModel):
    model_config = STRICT

    owners: dict[str, str] = {}
    seen: dict[str, Count] = {}
    odd: dict[str, Count] = {}


class Described(BaseModel):
    """What a checkpoint says of itself."""

    model_config = STRICT

    settings: dict[str, Any]


_D = TypeVar("_D", bound=Described)


class _About(Described):
    seen: _Counted
    layers: _Layers


def save(
    path: str | os.PathLike[str],
    seen: Seen,
    sums: Mapping[str, Tensor],
    layers: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Write a checkpoint; a reader never sees half of it.

    Args:
        path: of the file.
        seen: how far.
        sums: raw sums by name.
        layers: what the collector knows of the layers besides.
        settings: what must be the same when it goes on.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sums.items()}
    if seen.totals:
        plain["seen.totals"] = torch.stack(seen.totals)
    plain["seen.units"] = torch.tensor(seen.units, dtype=torch.float64)
    counts = {name: getattr(seen, name) for name in _Counted.model_fields}
    about = {"seen": counts, "layers": dict(layers), "settings": dict(settings)}
    write(path, CHECKPOINT, about, plain)


def write(
    path: str | os.PathLike[str], kind: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write safetensors with a description in JSON; a reader never sees half of it.

    Args:
        path: of the file; another of its kind is replaced.
        kind: of file.
        about: the description, plain values.
        tensors: on the CPU, contiguous.
    """
    from safetensors.torch import save_file

    text = json.dumps(about)
    header = {"format": kind, "about": text, "sha256": _digest(text, tensors)}
    with whole_file(path, is_format(kind)) as temporary:
        save_file(dict(tensors), temporary, header)


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(f" {name} ".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(
    path: str | os.PathLike[str], settings: Mapping[str, Any]
) -> tuple[Seen, dict[str, Tensor], dict[str, Any]] | None:
    """Read a checkpoint: how far, sums, and what the collector knew. None if there is none.

    Raises:
        DataError: it is not readable, or of other settings; says which.
        RankoptError, WriteError: it could not be written.
    """
    require_file(path)
    if not Path(path).is_file():
        return None

    about, tensors = read(path, _About, settings, "was measured with another")
    try:
        seen = _seen(about.seen, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(path, str(error)) from error
    return seen, tensors, about.layers.model_dump()


def read(
    path: str | os.PathLike[str], kind: type[_D], settings: Mapping[str, Any], differs: str
) -> tuple[_D, dict[str, Tensor]]:
    """Read what write has written: the description, and the tensors.

    Args:
        path: of a file.
        kind: of description.
        settings: that must be the same.
        differs: said between the path and the settings that are others.

    Raises:
        DataError: it is not readable, or of other settings; says which.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(header["about"], tensors) != header["sha256"]:
            raise ValueError("its contents were damaged")
        parse(header["about"])
        about = kind.model_validate_json(header["about"])
    except ValidationError as error:
        raise unreadable(path, first_of(error)) from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, MemoryError) as error:
        raise unreadable(path, str(error) or type(error).__name__) from error
    plain = json.loads(json.dumps(dict(settings)))
    other = [name for name in plain if about.settings.get(name) != plain[name]]
    if other:
        raise DataError(
            f"the checkpoint {path} {differs} {', another '.join(other)}: give the same to go on, "
            "or delete it to start again"
        )
    return about, tensors


def unreadable(path: str | os.PathLike[str], why: str) -> DataError:
    """The error that says what to do with a checkpoint that is none."""
    return DataError(f"the checkpoint {path} cannot be read ({why}): delete it to start again")


def _seen(counted: _Counted, tensors: dict[str, Tensor]) -> Seen:
    """How far a file says that it is; its own tensors are taken out of all.

    Raises:
        ValueError: counts and tensors that do not go together, or a number that is none.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds what is no finite number")
    units, totals = tensors.pop("seen.units"), tensors.pop("seen.totals", None)
    numbers = counted.numbers
    rows = 0 if totals is None else len(totals)
    ordered = all(a < b for a, b in zip(numbers, (*numbers[1:], counted.batches), strict=True))
    if not (units.shape == (rows,) == (len(numbers),) and ordered and _positive(units)):
        raise ValueError("its counts contradict each other")
    return Seen(
        counted.batches,
        counted.examples,
        counted.targets,
        counted.chain,
        [] if totals is None else list(totals),
        units.tolist(),
        list(numbers),
        last_check=list(counted.last_check),
        loss=counted.loss,
        entropy=counted.entropy,
        weighed=counted.weighed,
    )


def _positive(units: Tensor) -> bool:
    return bool((units > 0).all()) and bool(torch.isfinite(units.sum()))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where and how often to save what has been measured.

    Attributes:
        path: of the file; with several processes, each adds its number.
        every: batches of this process.
        settings: that must be the same to go on.
        whole: also save when all batches have been measured, as more is to come.
    """

    path: Path
    every: int
    settings: Mapping[str, Any]
    whole: bool = False

    def again(self, asked: str) -> "Checkpoint":
        """The file of a second round, beside that of the first; ``asked`` says which one."""
        path = self.path.with_name(f"{self.path.name}.again")
        return Checkpoint(path, self.every, {**self.settings, "again": asked})

    def of(self, processes: Processes) -> "Checkpoint":
        """The file of this process."""
        if processes.count == 1:
            return self
        path = self.path.with_name(f"{self.path.name}.{processes.rank}")
        settings = {**self.settings, "processes": processes.count, "process": processes.rank}
        return dataclasses.replace(self, path=path, settings=settings)
