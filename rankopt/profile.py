"""The profile: what every rank of every layer retains, in one safetensors file.

Tensors, for each layer NAME (no pickle, readable without torch):

    NAME/fisher_rows       float64 (in,)   sum over examples of the row Fisher: raw, so that
                                           profiles of parts of the data add up
    NAME/energies.BACKEND  float64 (min(out, in),)  squared weighted singular values, largest first,
                                           weighted with the *mean* Fisher (sum / examples)
    NAME/basis.BACKEND     float32 (min(out, in), largest useful rank)  singular vectors of the
                                           smaller side, optional: saves the decomposition on apply

The header's metadata hold ``rankopt`` (the ProfileInfo as JSON), ``sha256`` over it and all tensors
but the bases, and ``bases``, the sha256 of each basis, so that planning need not read them.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from rankopt.errors import ProfileError
from rankopt.files import whole_file
from rankopt.layers import Layer, LeftAlone

FloatArray = npt.NDArray[np.float64]
BasisArray = npt.NDArray[np.float32]


class ProfileInfo(BaseModel):
    """What was measured, on what, and how.

    Attributes:
        format_version: of the file.
        versions: of rankopt, torch and transformers.
        architecture: class of the model.
        fingerprint: hash of the architecture and of all planned layers' names, shapes, weights.
        task: the loss: ``causal-lm``, ``seq2seq-lm``, ``masked-lm``, ``sequence-classification``,
            ``regression`` or ``token-classification``.
        estimator: ``empirical``: gradients of the loss at the given labels, squared.
        unit: what one gradient belongs to, before it is squared.
        examples: how many were seen; divides the sums.
        targets: loss terms seen (predicted tokens, or labels).
        data_digest: sha256 of the batches.
        model_parameters: of the whole model, tied ones counted once.
        model_bytes: the same in bytes.
        layers: the planned matrices.
        left_alone: other modules with weights, and why they are not planned.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format_version: Literal[1] = 1
    versions: dict[str, str]
    architecture: str
    fingerprint: str
    task: str
    estimator: Literal["empirical"] = "empirical"
    unit: Literal["example"] = "example"
    examples: int
    targets: int
    data_digest: str
    model_parameters: int
    model_bytes: int
    layers: tuple[Layer, ...]
    left_alone: tuple[LeftAlone, ...]

    @property
    def planned_parameters(self) -> int:
        """Parameters of the planned layers, all dense."""
        return sum(layer.dense_cost for layer in self.layers)

    @property
    def planned_bytes(self) -> int:
        """The same in bytes."""
        return sum(layer.dense_cost * layer.itemsize for layer in self.layers)


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """What every rank of every layer retains.

    Attributes:
        info: what was measured.
        fisher_rows: layer name -> row Fisher summed over the examples, shape ``(in,)``.
        energies: backend -> layer name -> squared weighted singular values, largest first.
        path: the file that it was read from, where the bases are.
    """

    info: ProfileInfo
    fisher_rows: Mapping[str, FloatArray]
    energies: Mapping[str, Mapping[str, FloatArray]]
    path: Path | None = None
    #: Tabulated options (see allocate), kept because one profile is planned many times.
    #: Not taken over by dataclasses.replace: a copy may have other spectra.
    allocations: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _bases: Mapping[str, BasisArray] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for layer in self.info.layers:
            rows = self.fisher_rows.get(layer.name)
            if rows is None or rows.shape != (layer.in_features,):
                raise ProfileError(f"layer {layer.name}: no row Fisher of shape (in,)")
            _require_measure(layer.name, "row Fisher", rows)
            for backend, spectra in self.energies.items():
                spectrum = spectra.get(layer.name)
                smaller = min(layer.out_features, layer.in_features)
                if spectrum is None or spectrum.shape != (smaller,):
                    raise ProfileError(f"layer {layer.name}: no {backend} spectrum of {smaller}")
                _require_measure(layer.name, f"{backend} spectrum", spectrum)
                if (np.diff(spectrum) > 0).any():
                    raise ProfileError(f"layer {layer.name}: {backend} spectrum is not sorted")

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends whose spectra the profile holds; the first is the default."""
        return tuple(self.energies)

    @property
    def examples(self) -> int:
        """How many examples were seen."""
        return self.info.examples

    def spectra(self, backend: str) -> Mapping[str, FloatArray]:
        """Layer name -> energies of a backend.

        Raises:
            ProfileError: it was not measured; lists those that were.
        """
        if backend not in self.energies:
            raise ProfileError(
                f"the profile has no spectrum for backend {backend!r}, only for "
                f"{', '.join(self.backends)}: profile again with --backend {backend}"
            )
        return self.energies[backend]

    def basis(self, backend: str, layer: str) -> BasisArray | None:
        """Stored singular vectors of the layer's smaller side, or None if they were not kept.

        Raises:
            ProfileError: the file has changed since it was opened.
        """
        name = f"{layer}/basis.{backend}"
        if name in self._bases or self.path is None:
            return self._bases.get(name)
        tensors, metadata = _read(self.path, {name})
        if name not in tensors:
            return None
        if _sha256(name, tensors[name]) != json.loads(metadata["bases"]).get(name):
            raise ProfileError(f"{self.path}: {name} is damaged; profile again")
        return tensors[name]

    def digest(self) -> str:
        """sha256 over everything but the bases."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(_canonical(self.info).encode())
        for name, array in sorted(self._measures().items()):
            digest.update(bytes.fromhex(_sha256(name, array)))
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; a reader never sees half of it."""
        from safetensors.numpy import save_file

        names = [f"{x.name}/basis.{b}" for x in self.info.layers for b in self.backends]
        bases = {}
        for name in names:
            layer, _, backend = name.rpartition("/basis.")
            basis = self.basis(backend, layer)
            if basis is not None:
                bases[name] = np.ascontiguousarray(basis)
        metadata = {
            "format": "rankopt-profile",
            "rankopt": _canonical(self.info),
            "backends": json.dumps(self.backends),
            "sha256": self.digest(),
            "bases": json.dumps({name: _sha256(name, array) for name, array in bases.items()}),
        }
        with whole_file(path) as temporary:
            save_file({**self._measures(), **bases}, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read and check a file; the bases stay on disk until they are asked for.

        Raises:
            ProfileError: missing, truncated, damaged, or not a profile.
        """
        tensors, metadata = _read(Path(path), None)
        if metadata.get("format") != "rankopt-profile":
            raise ProfileError(f"{path} is a safetensors file but not a rankopt profile")
        try:
            info = ProfileInfo.model_validate_json(metadata["rankopt"])
            backends = json.loads(metadata["backends"])
            if not isinstance(backends, list):
                raise ValueError("backends is not a list")
        except (KeyError, ValueError, ValidationError) as error:
            raise ProfileError(f"{path}: unreadable profile description: {error}") from error
        names = [layer.name for layer in info.layers]
        try:
            profile = cls(
                info,
                {name: tensors[f"{name}/fisher_rows"] for name in names},
                {b: {name: tensors[f"{name}/energies.{b}"] for name in names} for b in backends},
                Path(path),
            )
        except KeyError as error:
            raise ProfileError(f"{path}: tensor {error} is missing; profile again") from error
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}; profile again") from error
        if profile.digest() != metadata.get("sha256"):
            raise ProfileError(f"{path} is damaged (its sha256 does not match); profile again")
        return profile

    def _measures(self) -> dict[str, npt.NDArray[Any]]:
        arrays: dict[str, npt.NDArray[Any]] = {}
        for layer in self.info.layers:
            arrays[f"{layer.name}/fisher_rows"] = self.fisher_rows[layer.name]
            for backend, spectra in self.energies.items():
                arrays[f"{layer.name}/energies.{backend}"] = spectra[layer.name]
        return arrays


def _require_measure(layer: str, what: str, array: FloatArray) -> None:
    if not np.isfinite(array).all() or (array < 0).any():
        raise ProfileError(f"layer {layer}: its {what} holds NaN, infinite or negative values")


def _canonical(info: ProfileInfo) -> str:
    return json.dumps(info.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def _sha256(name: str, array: npt.NDArray[Any]) -> str:
    digest = hashlib.sha256(f"{name} {array.dtype.str} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _read(
    path: Path, wanted: set[str] | None
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Tensors and metadata; wanted=None reads all but the bases."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ProfileError(f"no profile at {path}: make one with `rankopt profile`")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            names = [
                name
                for name in file.keys()  # noqa: SIM118 (a safe_open is no dict)
                if (name in wanted if wanted is not None else "/basis." not in name)
            ]
            return {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise ProfileError(
            f"{path} is truncated or not a profile ({error}); run `rankopt profile` again"
        ) from error
