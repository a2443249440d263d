"""The profile: what every rank of every layer loses, in one safetensors file.

Tensors (no pickle, readable without torch). NAME is a layer; MEMBER is a layer or one of its
partners, which are tied to it and get the same rank. Sums are raw, over all units seen (examples or
tokens: ``info.unit``): divide by ``info.units`` for means.

    MEMBER/fisher_rows     float64 (in,)   sum of squared gradients, over units and rows of W
    MEMBER/fisher_columns  float64 (out,)  the same over columns of W; optional
    MEMBER/traces          float64 (3,)    positions, and traces of the second moments of inputs and
                                           of gradients; optional
    NAME/losses.BACKEND    float64 (K+1,)  what the backend's factors lose at ranks 0..K,
                                           K = min(out, in), per unit; of the layer and its partners
    NAME/losses.BACKEND.kronecker  float64  what the same factors lose under the Kronecker-factored
                                           Fisher information, in nats; there if both moments were
    NAME/ranks.BACKEND     int64 (G,)      there if ``losses`` has a grid of ranks only
    NAME/rounding.BACKEND.BITS  float64 (R,)  what rounding to BITS loses more, in nats per unit, at
                                           the layer's R ``rounded_ranks``; optional
    batches/fisher         float64 (batches, layers)  each batch's share of the layers' sums
    batches/units          float64 (batches,)         its units; both optional
    MEMBER/KIND.BACKEND    float32         kept arrays, which spare a decomposition on apply

The header's metadata hold ``rankopt`` (the ProfileInfo as JSON), ``sha256`` over it and all tensors
but the kept ones, and ``kept``, the sha256 of each kept array, so that planning need not read them.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rankopt.errors import ProfileError
from rankopt.files import PROFILE
from rankopt.layers import Bits, FloatArray, Layer
from rankopt.profile.curves import LossCurve
from rankopt.profile.info import BackendInfo as BackendInfo
from rankopt.profile.info import ProfileInfo as ProfileInfo
from rankopt.profile.info import ScaleInfo as ScaleInfo
from rankopt.profile.jackknife import relative_standard_errors
from rankopt.profile.tensors import (
    MEASURES,
    Array,
    KeptArray,
    LazyArray,
    Renamed,
    StoredArrays,
    read,
    sha256_of,
    write_safetensors,
)
from rankopt.schema import parse


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """What every rank of every layer loses.

    Attributes:
        info: what was measured.
        fisher_rows: layer or partner -> raw row sums of its Fisher information, ``(in,)``.
        curves: backend -> layer -> loss per unit at each of its ranks.
        valued: the same under the Kronecker-factored Fisher information (see BackendInfo's scales),
            of all layers; of some backends or none.
        rounding: backend -> layer -> bits -> what rounding loses more, in nats per unit, at the
            layer's ``rounded_ranks``; of some layers or none.
        fisher_columns: layer or partner -> raw column sums, ``(out,)``; some or none.
        traces: layer or partner -> positions, traces of the second moments of inputs and of
            gradients, ``(3,)``; some or none.
        batch_fisher: Fisher information of each batch and layer, raw, ``(batches, layers)``.
        batch_units: units of each batch, ``(batches,)``; both or neither.
        kept_arrays: ``MEMBER/KIND.BACKEND`` -> float32; asked for an array only when it is needed.

    Raises:
        ProfileError: anything is missing, misshapen, NaN, infinite or negative; names the layer.
    """

    info: ProfileInfo
    fisher_rows: Mapping[str, FloatArray]
    curves: Mapping[str, Mapping[str, LossCurve]]
    valued: Mapping[str, Mapping[str, LossCurve]] = dataclasses.field(default_factory=dict)
    rounding: Mapping[str, Mapping[str, Mapping[Bits, FloatArray]]] = dataclasses.field(
        default_factory=dict
    )
    fisher_columns: Mapping[str, FloatArray] = dataclasses.field(default_factory=dict)
    traces: Mapping[str, FloatArray] = dataclasses.field(default_factory=dict)
    batch_fisher: FloatArray | None = None
    batch_units: FloatArray | None = None
    kept_arrays: Mapping[str, KeptArray] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if set(self.curves) != set(self.backends):
            raise ProfileError(
                f"losses of {', '.join(self.curves)} for the backends {', '.join(self.backends)}"
            )
        for layer in self.info.layers:
            _require_statistics(self, layer)
            for backend in self.info.backends:
                for scale in (None, *(each.name for each in backend.scales if each.valued)):
                    curve = self.loss_curve(backend.name, layer.name, scale)
                    curve.require_sound(layer, backend.name)
                shape = layer.rounded_ranks(self.info.form).shape
                for bits, lost in self.rounding_of(backend.name, layer.name).items():
                    _require(f"layer {layer.name}: rounding to {bits} bits", lost, shape)
        if (self.batch_fisher is None) != (self.batch_units is None):
            raise ProfileError("batch_fisher and batch_units belong together")
        if self.batch_fisher is not None and self.batch_units is not None:
            batches = self.batch_units.size
            shape = (batches, len(self.info.layers))
            _require("the batches' Fisher", self.batch_fisher, shape)
            _require("the batches' units", self.batch_units, (batches,))
        _ = self._kept_names

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends whose losses the profile holds; the first is the default."""
        return tuple(backend.name for backend in self.info.backends)

    @property
    def examples(self) -> int:
        """How many examples were seen."""
        return self.info.examples

    @property
    def units(self) -> float:
        """What the raw sums are divided by."""
        return self.info.units

    def backend(self, name: str | None = None) -> BackendInfo:
        """A backend by name, by the ``module:object`` that was named for it, or the default.

        Raises:
            ProfileError: it was not measured; lists those that were.
        """
        for backend in self.info.backends:
            if name in (None, backend.name, backend.loaded_from):
                return backend
        raise ProfileError(
            f"the profile has no losses for backend {name!r}, only for "
            f"{', '.join(self.backends)}: profile again with --backend {name}"
        )

    def loss_curve(self, backend: str, layer: str, scale: str | None = None) -> LossCurve:
        """Loss per unit of a layer at the ranks that the backend offers.

        Args:
            backend: by name.
            layer: likewise.
            scale: whose curve; by default that of the backend's own error.

        Raises:
            OptionError: the backend has no such scale.
            ProfileError: there is no such backend or layer.
        """
        info = self.backend(backend)
        other = scale is not None and info.find_scale(scale).valued
        curve = (self.valued if other else self.curves).get(info.name, {}).get(layer)
        if curve is None:
            raise ProfileError(f"layer {layer}: no {backend} losses")
        return curve

    def rounding_of(self, backend: str, layer: str) -> Mapping[Bits, FloatArray]:
        """Bits -> what rounding loses more, at the layer's ``rounded_ranks``; often empty."""
        return self.rounding.get(backend, {}).get(layer, {})

    def fisher_trace(self, layer: str) -> float:
        """Raw sum of a layer's Fisher information over all its weights, partners included."""
        members = self._layers[layer].members
        return float(sum(self.fisher_rows[member].sum() for member in members))

    def standard_errors(self) -> dict[str, float]:
        """Layer -> standard error of its Fisher information, as a share of it.

        From the spread between batches (see jackknife). Infinite if that is unknown: fewer than two
        batches, or none recorded.
        """
        names = [layer.name for layer in self.info.layers]
        if self.batch_fisher is None or self.batch_units is None:
            return dict.fromkeys(names, np.inf)
        errors = relative_standard_errors(self.batch_fisher, self.batch_units)
        return dict(zip(names, errors.tolist(), strict=True))

    def kept(self, backend: str, member: str) -> Mapping[str, KeptArray]:
        """Kind -> array kept for a layer or partner, each read when asked for; often empty.

        Raises:
            ProfileError: on reading: the file is gone or has changed since it was opened.
        """
        return Renamed(self.kept_arrays, self._kept_names.get((backend, member), {}))

    def digest(self) -> str:
        """sha256 over everything but the kept arrays."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(_canonical(self.info).encode())
        for name, array in sorted(self._measures().items()):
            digest.update(bytes.fromhex(sha256_of(name, array)))
        return digest.hexdigest()

    @functools.cached_property
    def _layers(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.info.layers}

    @functools.cached_property
    def _kept_names(self) -> dict[tuple[str, str], dict[str, str]]:
        """(backend, member) -> kind -> name of the array."""
        members = {member for layer in self.info.layers for member in layer.members}
        found: dict[tuple[str, str], dict[str, str]] = {}
        for name in self.kept_arrays:
            member, _, rest = name.rpartition("/")
            kind, _, backend = rest.partition(".")
            if member not in members or backend not in self.backends or kind in ("", *MEASURES):
                raise ProfileError(f"{name} is no kept array of a layer: MEMBER/KIND.BACKEND")
            found.setdefault((backend, member), {})[kind] = name
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; a reader never sees half of it.

        Kept arrays are read twice, one at a time: once for their sha256, once to be written.

        Raises:
            RankoptError: the folder does not exist.
            ProfileError: a kept array cannot be read, or is not float32.
        """
        entries: dict[str, Array | LazyArray] = dict(self._measures())
        kept: dict[str, str] = {}
        for name in self.kept_arrays:
            array = self.kept_arrays[name]
            if array.dtype != np.float32:
                raise ProfileError(f"{name}: kept arrays are float32, not {array.dtype}")
            again = functools.partial(self.kept_arrays.__getitem__, name)
            entries[name] = LazyArray(array.dtype, array.shape, again)
            kept[name] = sha256_of(name, array)
            # Before the next one is read.
            del array
        metadata = {
            "format": PROFILE,
            "rankopt": _canonical(self.info),
            "sha256": self.digest(),
            "kept": json.dumps(kept),
        }
        write_safetensors(path, entries, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read and check a file; kept arrays stay on disk until they are asked for.

        Raises:
            ProfileError: missing, truncated, damaged, of another format, or not a profile.
        """
        source = Path(path)
        tensors, metadata = read(source, None)
        if metadata.get("format") != PROFILE:
            raise ProfileError(f"{path} is a safetensors file but not a rankopt profile")
        try:
            info = ProfileInfo.from_json(metadata["rankopt"])
            digests = parse(metadata["kept"])
            if not isinstance(digests, dict):
                raise ValueError("kept is not a table")
        except KeyError as error:
            raise ProfileError(f"{path}: its header has no {error}; profile again") from error
        except ValueError as error:
            raise ProfileError(f"{path}: unreadable profile description: {error}") from error
        except ProfileError as error:
            raise ProfileError(f"{path} {error}") from error
        members = [member for layer in info.layers for member in layer.members]
        names, backends = [x.name for x in info.layers], [x.name for x in info.backends]

        def of(kind: str) -> dict[str, Any]:
            found = {member: tensors.get(f"{member}/{kind}") for member in members}
            return {member: array for member, array in found.items() if array is not None}

        def curve(name: str, backend: str, scale: str = "") -> LossCurve:
            losses, ranks = tensors[f"{name}/losses.{backend}{scale}"], f"{name}/ranks.{backend}"
            if ranks in tensors:
                return LossCurve(tensors[ranks], losses)
            return LossCurve.complete(losses)

        def rounding(name: str, backend: str) -> dict[Bits, FloatArray]:
            named = {bits: f"{name}/rounding.{backend}.{bits}" for bits in info.bits}
            return {bits: tensors[key] for bits, key in named.items() if key in tensors}

        try:
            profile = cls(
                info,
                fisher_rows={name: tensors[f"{name}/fisher_rows"] for name in members},
                curves={b: {name: curve(name, b) for name in names} for b in backends},
                valued={
                    x.name: {name: curve(name, x.name, f".{scale.name}") for name in names}
                    for x in info.backends
                    for scale in x.scales
                    if scale.valued
                },
                rounding={b: {name: rounding(name, b) for name in names} for b in backends},
                fisher_columns=of("fisher_columns"),
                traces=of("traces"),
                batch_fisher=tensors.get("batches/fisher"),
                batch_units=tensors.get("batches/units"),
                kept_arrays=StoredArrays(source, digests),
            )
        except KeyError as error:
            raise ProfileError(f"{path}: tensor {error} is missing; profile again") from error
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}; profile again") from error
        if profile.digest() != metadata.get("sha256"):
            raise ProfileError(f"{path} is damaged (its sha256 does not match); profile again")
        return profile

    def _measures(self) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for layer in self.info.layers:
            for member in layer.members:
                for kind in ("fisher_rows", "fisher_columns", "traces"):
                    if member in getattr(self, kind):
                        arrays[f"{member}/{kind}"] = getattr(self, kind)[member]
            for info in self.info.backends:
                backend, curve = info.name, self.curves[info.name][layer.name]
                arrays[f"{layer.name}/losses.{backend}"] = curve.losses
                for scale in (scale.name for scale in info.scales if scale.valued):
                    other = self.valued[backend][layer.name].losses
                    arrays[f"{layer.name}/losses.{backend}.{scale}"] = other
                if curve.on_grid:
                    arrays[f"{layer.name}/ranks.{backend}"] = curve.ranks
                for bits, lost in self.rounding_of(backend, layer.name).items():
                    arrays[f"{layer.name}/rounding.{backend}.{bits}"] = lost
        if self.batch_fisher is not None and self.batch_units is not None:
            arrays["batches/fisher"] = self.batch_fisher
            arrays["batches/units"] = self.batch_units
        return arrays


def _require_statistics(profile: Profile, layer: Layer) -> None:
    out, into = layer.out_features, layer.in_features
    for member in layer.members:
        rows, columns = profile.fisher_rows.get(member), profile.fisher_columns.get(member)
        if rows is None:
            raise ProfileError(f"layer {member}: no row Fisher")
        # A partner may hold the same matrix the other way round.
        turned = member != layer.name and rows.shape != (into,)
        _require(f"layer {member}: its row Fisher", rows, (out if turned else into,))
        if columns is not None:
            what = f"layer {member}: its column Fisher"
            _require(what, columns, (into if turned else out,))
        traces = profile.traces.get(member)
        if traces is not None:
            _require(f"layer {member}: its traces", traces, (3,))


def _require(what: str, array: FloatArray, shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype != np.float64:
        wanted, got = f"float64 {shape}", f"{array.dtype} {array.shape}"
        raise ProfileError(f"{what} must be {wanted}, got {got}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ProfileError(f"{what} holds NaN, infinite or negative values")


def _canonical(info: ProfileInfo) -> str:
    return json.dumps(info.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
