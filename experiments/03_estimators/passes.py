"""Passes over the data, each made once and kept in a folder; row importances of every variant."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import shortcuts
from shortcuts import Measured, Rows

#: Key -> what it is, in the order of the table; the first is what all are compared with.
VARIANTS = {
    "exact": "exact, per example",
    "other": "the same, other windows",
    "sampled": "labels sampled from the model",
    "token": "per token (random signs)",
    "batch-4": "squared gradient of batches of 4",
    "batch-16": "squared gradient of batches of 16",
    "shifted": "labels shifted twice",
    "float16": "mean loss, squared in float16",
    "maximum": "exact, each layer over its maximum",
    "epsilon": "batches of 4, mean loss, + 1e-5",
    "activations": "activations only",
}
#: Those whose unit is nats per example, so that their scale means something.
IN_NATS = set(VARIANTS) - {"maximum", "epsilon", "activations"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; the windows can be cut into batches of each of ``sizes``."""

    keep: float = 0.8
    windows: int = 32
    held_out: int = 16
    tokens: int = 256
    batch: int = 4
    sizes: tuple[int, ...] = (4, 16)
    epsilon: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Work:
    """What all variants share.

    Attributes:
        size: sizes.
        model: on its device.
        found: its planned layers.
        profile: as rankopt makes it: the reference.
        calibration: windows that it saw.
        other: as many windows between them.
        held_out: windows to measure the loss on.
        folder: for what has been measured.
    """

    size: Settings
    model: Any
    found: Any
    profile: Any
    calibration: list[Any]
    other: list[Any]
    held_out: list[Any]
    folder: Path


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Arrays from the file, or made and written to it."""
    from safetensors.numpy import load_file

    from rankopt.profile.tensors import write_safetensors

    if not path.is_file():
        started = time.perf_counter()
        made = make()
        made["seconds"] = np.array([time.perf_counter() - started])
        print(f"{path.stem}: {made['seconds'][0]:.0f} s", flush=True)
        write_safetensors(path, made)
    return dict(load_file(path))


def measured(work: Work, name: str) -> Measured:
    """What rankopt measures, as the variant asks for it."""
    from rankopt.measure.estimators import Estimator

    if name == "exact":
        profile = work.profile
        rows = {layer: values / profile.units for layer, values in profile.fisher_rows.items()}
        return Measured(rows, profile.batch_fisher, profile.batch_units)
    how = {
        "sampled": Estimator("sampled"),
        "token": Estimator(unit="token"),
    }
    batches = work.other if name == "other" else work.calibration
    batches = shortcuts.shifted_twice(batches) if name == "shifted" else batches

    def make() -> dict[str, Any]:
        found = shortcuts.by_estimator(
            work.model, work.found.modules, batches, how.get(name, Estimator())
        )
        return {"parts": found.parts, "units": found.units, **_named("", found.rows)}

    arrays = kept(work.folder / f"pass-{name}.safetensors", make)
    return Measured(_rows(work, "", arrays), arrays["parts"], arrays["units"])


def one_by_one(work: Work) -> shortcuts.OneByOne:
    """The pass that has whole gradients of the weights."""
    sizes = work.size.sizes

    def make() -> dict[str, Any]:
        found = shortcuts.one_by_one(work.model, work.found.modules, work.calibration, sizes)
        arrays = {"lost": np.array([found.lost]), "terms": np.array([found.terms])}
        for number, rows in enumerate(found.windows):
            arrays |= _named(f"window-{number}/", rows)
        for size, rows in found.batches.items():
            arrays |= _named(f"batch-{size}/", rows)
        return arrays | _named("half/", found.half)

    arrays = kept(work.folder / "pass-one-by-one.safetensors", make)
    return shortcuts.OneByOne(
        [_rows(work, f"window-{number}/", arrays) for number in range(work.size.windows)],
        {size: _rows(work, f"batch-{size}/", arrays) for size in sizes},
        _rows(work, "half/", arrays),
        float(arrays["lost"][0]),
        int(arrays["terms"][0]),
    )


def activations(work: Work) -> Rows:
    """A pass without backward."""

    def make() -> dict[str, Any]:
        return dict(shortcuts.by_activations(work.model, work.found.modules, work.calibration))

    return _rows(work, "", kept(work.folder / "pass-activations.safetensors", make))


def rows_of(work: Work, variant: str) -> Rows:
    """Row importances of a variant."""
    if variant == "activations":
        return activations(work)
    if variant in ("exact", "other", "sampled", "token", "shifted"):
        return measured(work, variant).rows
    if variant == "maximum":
        return shortcuts.over_maximum(measured(work, "exact").rows)
    found, epsilon = one_by_one(work), work.size.epsilon
    if variant == "float16":
        return found.half
    if variant == "epsilon":
        # As in the script: of the mean loss, and summed over batches.
        to_sums = work.size.windows / work.size.sizes[0] / found.terms**2
        summed = {n: values * to_sums for n, values in found.batches[work.size.sizes[0]].items()}
        return shortcuts.plus(summed, epsilon)
    return found.batches[int(variant.removeprefix("batch-"))]


def _named(prefix: str, rows: Rows) -> dict[str, Any]:
    return {f"{prefix}{name}": values for name, values in rows.items()}


def _rows(work: Work, prefix: str, arrays: Mapping[str, Any]) -> Rows:
    return {name: arrays[f"{prefix}{name}"] for name in work.found.modules}
