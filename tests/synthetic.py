"""Profiles with random spectra, made without torch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rankopt.layers import Layer, LeftAlone
from rankopt.profile.curves import LossCurve
from rankopt.profile.info import BackendInfo, ProfileInfo, ScaleInfo
from rankopt.profile.profile import Profile

SHAPES = ((24, 16), (16, 40), (30, 30), (9, 50))


def tails(energies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Energy lost at every rank 0..K, shape ``(K,)`` -> ``(K+1,)``."""
    return np.append(np.cumsum(energies[::-1])[::-1], 0.0)


def backend_info(name: str, layers: Sequence[Layer]) -> BackendInfo:
    """With scales of its own, so that planning cannot know them from anywhere else."""
    ones = tuple(1.0 for _ in layers)
    if name == "svd":
        plain = ScaleInfo(name="frobenius", unit="squared weights", factors=ones)
        return BackendInfo(name=name, source="Eckart & Young 1936", scales=(plain,))
    halves = tuple(0.5 / layer.out_features for layer in layers)
    nats = ScaleInfo(name="nats", unit="nats per example", factors=halves)
    sums = ScaleInfo(name="sum", unit="row sums", factors=ones)
    return BackendInfo(name=name, source="Hsu et al., ICLR 2022", scales=(nats, sums))


def synthetic_profile(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    seed: int = 0,
    backends: Sequence[str] = ("fwsvd", "svd"),
    silent: Sequence[int] = (),
    bases: bool = False,
    left_alone: int = 1000,
    grids: dict[str, Sequence[int]] | None = None,
    tied: Sequence[int] = (),
) -> Profile:
    """Layers with random spectra, made without torch; those in ``silent`` have no energy at all.

    ``grids`` gives backends ranks to be measured at (as far as a layer has them); the layers in
    ``tied`` have a partner, which holds the same matrix the other way round.
    """
    rng = np.random.default_rng(seed)
    layers = tuple(
        Layer(
            name=f"block.{n}.proj",
            out_features=out,
            in_features=into,
            kind="proj",
            itemsize=4 if n % 2 else 2,
            digest=f"{n:02d}",
            partners=(f"partner.{n}",) if n in tied else (),
        )
        for n, (out, into) in enumerate(shapes)
    )
    rows, kept = {}, {}
    curves: dict[str, dict[str, LossCurve]] = {name: {} for name in backends}
    basis_rng = np.random.default_rng(seed)
    for n, layer in enumerate(layers):
        smaller = min(layer.out_features, layer.in_features)
        loud = n not in silent
        rows[layer.name] = rng.gamma(0.5, 10.0 ** min(n, 100), layer.in_features) * loud
        for name in backends:
            values = rng.gamma(0.5, 1.0, smaller) * np.exp(-4 * rng.random() * np.arange(smaller))
            energies = np.sort(values)[::-1].copy() * 10.0 ** (n % 3) * loud
            curves[name][layer.name] = LossCurve.complete(tails(energies))
            if name in (grids or {}):
                grid = np.array([r for r in grids[name] if r <= smaller], dtype=np.int64)
                curves[name][layer.name] = LossCurve(grid, tails(energies)[grid])
            if bases:
                columns = (smaller, layer.largest_rank())
                kept[f"{layer.name}/basis.{name}"] = basis_rng.standard_normal(columns, np.float32)
    for layer in layers:
        for partner in layer.partners:
            rows[partner] = rng.gamma(0.5, 10.0, layer.out_features)
    planned = sum(layer.dense_cost for layer in layers)
    info = ProfileInfo(
        versions={"rankopt": "0", "torch": "2", "transformers": "5"},
        architecture="SyntheticForCausalLM",
        fingerprint="f" * 64,
        task="causal-lm",
        examples=7,
        targets=70,
        units=7.0,
        data_digest="d" * 64,
        model_parameters=planned + left_alone,
        model_bytes=sum(x.dense_cost * x.itemsize for x in layers) + 4 * left_alone,
        layers=layers,
        left_alone=(
            LeftAlone(name="embed", module="Embedding", parameters=left_alone, reason="tied"),
        ),
        backends=tuple(backend_info(name, layers) for name in backends),
    )
    return Profile(info, rows, curves, kept_arrays=kept)


def full_profile() -> Profile:
    """With everything that a profile may have: columns, traces, batches, a grid, a partner."""
    made = synthetic_profile(bases=True, grids={"svd": (0, 1, 2, 4, 8)}, tied=(1,))
    rng = np.random.default_rng(3)
    columns = {x.name: rng.gamma(1.0, 1.0, x.out_features) for x in made.info.layers}
    columns["partner.1"] = rng.gamma(1.0, 1.0, 40)
    batches = rng.gamma(1.0, 1.0, (5, len(made.info.layers)))
    kept = {
        **made.kept_arrays,
        "block.1.proj/down.svd": rng.standard_normal((3, 2)).astype(np.float32),
        "partner.1/down.svd": rng.standard_normal((2, 3)).astype(np.float32),
    }
    return dataclasses.replace(
        made,
        fisher_columns=columns,
        traces={"block.0.proj": np.array([70.0, 1.5, 2.5]), "partner.1": np.ones(3)},
        batch_fisher=batches,
        batch_units=np.array([1.0, 2.0, 1.0, 2.0, 1.0]),
        kept_arrays=kept,
    )


def recurved(profile: Profile, backend: str, change: Any) -> dict[str, Any]:
    """The field ``curves`` with the curve of the third layer changed."""
    layer = "block.2.proj"
    curve = profile.curves[backend][layer]
    changed = {**profile.curves[backend], layer: LossCurve(*change(curve), curve.on_grid)}
    return {"curves": {**profile.curves, backend: changed}}
