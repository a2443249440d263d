"""Decompose layers: one at a time, or several on threads of one core each.

LAPACK on several threads is slower than several decompositions on one thread each; torch lets go of
the interpreter's lock meanwhile. Arrays for ``apply`` go to a store as they come, which may be a
dictionary or a folder: no more than the layers in hand are in memory.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rankopt.backends import find_backend, kronecker
from rankopt.backends.base import Backend, Decomposition, recomputable
from rankopt.backends.rounding import rounding_losses
from rankopt.backends.statistics import Statistics, together
from rankopt.backends.valued import cross_fitted, valued
from rankopt.errors import ModelError, OptionError, RankoptError
from rankopt.layers import Bits, FloatArray, Form, Layer
from rankopt.model.weights import weight_of as whole_weight_of
from rankopt.profile.curves import LossCurve
from rankopt.progress import bar

#: Singular vectors are kept if they fit in this many bytes; without, ``apply`` decomposes again.
BASES_LIMIT = 2 * 2**30

#: Where arrays go: name -> float32.
Store = MutableMapping[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class ScaledCurve:
    """Losses of one layer (or group) under one backend, and how they compare.

    Attributes:
        curve: the losses.
        factors: scale -> what the losses are multiplied with to be compared with other layers'.
        valued: losses of the same factors in nats of a unit, at the same ranks, if they are known.
        rounding: bits -> losses of rounding in nats of a unit, at the layer's ``rounded_ranks``.
    """

    curve: LossCurve
    factors: dict[str, float]
    valued: FloatArray | None = None
    rounding: Mapping[Bits, FloatArray] = dataclasses.field(default_factory=dict)


def left_out_bytes(
    layers: Iterable[Layer], backends: Iterable[Backend], form: Form, keep_bases: bool | None
) -> int:
    """What the singular vectors would take that are not stored though nobody said so; 0 is none."""
    size = sum(
        4 * min(x.out_features, x.in_features) * x.largest_rank(form) * len(x.members)
        for x in layers
    )
    # fwsvd_two_sided keeps two arrays where the others keep one.
    size *= sum(1 + ("columns" in each.needs) for each in backends if recomputable(each))
    return size if keep_bases is None and size > BASES_LIMIT else 0


def storing(
    layers: Iterable[Layer], backends: Iterable[Backend], form: Form, keep_bases: bool | None
) -> Callable[[Backend], bool]:
    """Which backends' arrays are stored: those that cannot be computed again, or all.

    Args:
        layers: to decompose.
        backends: of the profile.
        form: whose largest rank the arrays reach to.
        keep_bases: all of them, or no others; None is all if they fit.
    """
    left_out = left_out_bytes(layers, backends, form, keep_bases)
    every = not left_out if keep_bases is None else keep_bases
    return lambda backend: every or not recomputable(backend)


def decompose_layers(
    layers: Sequence[Layer],
    weight_of: Callable[[str], torch.Tensor],
    statistics_of: Callable[[str], Statistics],
    backends: Sequence[str],
    *,
    store: Store | None = None,
    stored: Callable[[Backend], bool] = lambda backend: True,
    form: Form = "pairs",
    moments: bool = True,
    halves_of: "Callable[[str], tuple[Statistics, Statistics] | None] | None" = None,
    bits_of: Callable[[Layer], Sequence[Bits]] = lambda layer: (),
    workers: int = 1,
    progress: bool | None = None,
) -> dict[str, dict[str, ScaledCurve]]:
    """Losses of every rank of every layer.

    Args:
        layers: what to decompose.
        weight_of: member name -> W, shape ``(out, in)``; called when it is needed.
        statistics_of: member name -> its statistics; called when they are needed.
        backends: names.
        store: gets ``MEMBER/KIND.BACKEND``, float32, of the backends that are to be stored.
        stored: which backends these are.
        form: stored is what factors need up to the largest rank that saves parameters in it.
        moments: value what factors lose, where both second moments are there.
        halves_of: member name -> statistics of two halves of the data, to cross-fit the losses of
            backends that fit it; None where that cannot be.
        bits_of: layer -> what rounding its weights to these loses is measured, too; of backends
            that have factors of every rank.
        workers: layers at a time, on the CPU.
        progress: a bar on stderr; by default if it is a terminal.

    Returns:
        Backend -> layer -> curve. A group's losses are the sum over its members, each valued with
        the default scale.

    Raises:
        ModelError: a backend failed, or returned losses that are not finite; names the layer.
    """
    found: dict[str, dict[str, ScaledCurve]] = {name: {} for name in backends}
    chosen = {name: find_backend(name) for name in backends}

    def work(layer: Layer) -> tuple[str, dict[str, ScaledCurve]]:
        return layer.name, {
            name: _of_group(
                layer,
                backend,
                weight_of,
                statistics_of,
                store if stored(backend) else None,
                form,
                moments,
                halves_of,
                bits_of(layer),
            )
            for name, backend in chosen.items()
        }

    ordered = sorted(layers, key=lambda layer: -_work(layer))
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, layer) for layer in ordered]
        try:
            shown = bar(as_completed(futures), "Spectra", "layer", progress, total=len(futures))
            for future in shown:
                layer, curves = future.result()
                for name, curve in curves.items():
                    found[name][layer] = curve
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: {x.name: found[name][x.name] for x in layers} for name in backends}


def put_together(
    modules: Mapping[str, nn.Module], layers: Sequence[Layer], own: Sequence[Layer]
) -> dict[str, Tensor]:
    """Weights of this process's layers, on the CPU; all processes must put all of them together."""
    kept = {member for layer in own for member in layer.members}
    found = {}
    for member in (member for layer in layers for member in layer.members):
        weight = whole_weight_of(modules[member])
        if member in kept:
            found[member] = weight.cpu()
        del weight
    return found


def roundable(
    modules: Mapping[str, nn.Module], bits: Sequence[Bits], layer: Layer
) -> tuple[Bits, ...]:
    """Of some bits those that a layer's weights may be rounded to: none of an embedding."""
    if isinstance(modules[layer.name], nn.Embedding):
        return ()
    return tuple(each for each in bits if layer.can_round(None, each))


def workers_of(device: torch.device, workers: int | None) -> int:
    """Layers that are decomposed at a time; None: as many as cores, or one on a GPU.

    Raises:
        OptionError: below 1.
    """
    if workers is not None:
        if workers < 1:
            raise OptionError(f"workers must be at least 1, got {workers}")
        return workers
    if device.type != "cpu":
        return 1
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _work(layer: Layer) -> float:
    small, large = sorted((layer.out_features, layer.in_features))
    return float(small) ** 2 * (9 * small + large)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread inside, as it was after: the same bits however many layers at a time."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _of_group(
    layer: Layer,
    backend: Backend,
    weight_of: Callable[[str], torch.Tensor],
    statistics_of: Callable[[str], Statistics],
    store: Store | None,
    form: Form,
    moments: bool,
    halves_of: "Callable[[str], tuple[Statistics, Statistics] | None] | None",
    bits: Sequence[Bits],
) -> ScaledCurve:
    curve: LossCurve | None = None
    rounding: dict[Bits, FloatArray] = {}
    factors: dict[str, float] = {}
    values: list[FloatArray | None] = []
    for member in layer.members:
        weight = weight_of(member)
        apart = moments and halves_of is not None and not recomputable(backend)
        halves = halves_of(member) if apart and halves_of is not None else None
        statistics = statistics_of(member) if halves is None else together(*halves)
        shape = (weight.shape[0], weight.shape[1])
        try:
            largest = layer.largest_rank(form)
            made = backend.decompose(weight, statistics, largest)
            own = {name: scale.factor(shape, statistics) for name, scale in backend.scales.items()}
            mine = _checked(layer, backend, made)
            if halves is not None:
                nats = cross_fitted(backend, weight, statistics, made, halves, largest)
            else:
                # The backend kronecker has this loss as its own.
                of_others = moments and backend.name != kronecker.BACKEND.name
                nats = valued(backend, weight, statistics, made) if of_others else None
            values.append(None if nats is None else nats.cpu().numpy())
            if bits and not mine.on_grid:
                at = layer.rounded_ranks(form)
                lost = rounding_losses(backend, weight, statistics, made, at, form, bits)
                rounding = {width: each.cpu().numpy() for width, each in lost.items()}
        except (RankoptError, MemoryError):
            raise
        except Exception as error:
            said = str(error).strip().splitlines()
            why = ": ".join([type(error).__name__, *said[:1]])
            raise ModelError(f"layer {member}: backend {backend.name}: {why}") from error
        if curve is None:
            curve, factors = mine, own
        else:
            first = next(iter(backend.scales))
            value = own[first] / factors[first] if factors[first] > 0.0 else 1.0
            curve = dataclasses.replace(curve, losses=curve.losses + value * mine.losses)
        if store is not None:
            for kind, array in made.kept.items():
                plain = array.to(torch.float32).cpu().contiguous().numpy()
                store[f"{member}/{kind}.{backend.name}"] = plain
    assert curve is not None
    known = [value for value in values if value is not None]
    whole = np.sum(known, 0) if len(known) == len(values) else None
    return ScaledCurve(curve, factors, whole, rounding)


def _checked(layer: Layer, backend: Backend, made: Decomposition) -> LossCurve:
    curve, complete = made.curve(), min(layer.out_features, layer.in_features) + 1
    wanted = curve.ranks.size if curve.on_grid else complete
    if curve.losses.shape != (wanted,) or not np.isfinite(curve.losses).all():
        raise ModelError(
            f"layer {layer.name}: backend {backend.name} returned losses of shape "
            f"{curve.losses.shape} that should be {wanted} finite numbers"
        )
    return curve
