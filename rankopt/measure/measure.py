"""From a model and batches to a profile."""

import dataclasses
import functools
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from rankopt.backends import find_backend
from rankopt.backends.base import Backend, recomputable
from rankopt.errors import DataError, InfeasibleBudgetError
from rankopt.layers import Layer, fingerprint
from rankopt.measure.accumulate import Gathered, Stop, gather
from rankopt.measure.assemble import Parts, assembled
from rankopt.measure.decompose import Curve, Kept, decompose_layers
from rankopt.measure.estimators import Estimator, Kind, Unit
from rankopt.measure.loss import Objective
from rankopt.measure.processes import Processes
from rankopt.measure.resume import Checkpoint
from rankopt.measure.sums import bytes_of_sums
from rankopt.model.selection import Found, find_layers
from rankopt.model.size import model_size
from rankopt.model.tasks import LossFunction, task_of
from rankopt.model.weights import device_of, memory_for, unwrapped, weight_of, weight_shape
from rankopt.plan.planner import make_plan
from rankopt.plan.stability import Stability
from rankopt.profile.profile import Profile

#: Bases are kept while they fit in this many bytes; beyond, ``apply_plan`` decomposes again.
BASES_LIMIT = 2 * 2**30


def profile_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    backends: Sequence[str] = ("fwsvd",),
    loss_fn: LossFunction | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    untie: bool = False,
    estimator: Kind = "empirical",
    unit: Unit = "example",
    draws: int = 1,
    seed: int = 0,
    until_stable: Stability | None = None,
    keep_bases: bool = True,
    kept: Kept | None = None,
    layers_at_a_time: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 32,
    workers: int | None = None,
    progress: bool | None = None,
) -> Profile:
    """Measure what every rank of every layer retains.

    Runs each batch forward and backward once (no gradients of weights, eval mode; the model is left
    as it was), then decomposes every layer once for each backend. Started by ``torchrun``, every
    process measures its share of the batches and returns the same profile.

    Args:
        model: a transformers model with a head and its own loss, or any module with ``loss_fn``;
            weights loaded.
        batches: dictionaries of tensors as the model takes them, ``(B, T)`` inputs and labels.
            Causal language models shift labels themselves: give ``labels`` equal to ``input_ids``,
            or leave them out. Labels of padding are ignored. With ``loss_fn``, anything.
        backends: ``fwsvd``, ``fwsvd_two_sided``, ``kronecker``, ``svd``, ``tfwsvd``, ``whitened``,
            or any that is installed; only what they need is measured.
        loss_fn: (model, batch) -> the loss of each example, summed over its terms, ``(B,)``.
        include: globs of the layers to plan, instead of those inside the transformer blocks.
        exclude: globs of layers to leave alone.
        untie: plan a head and an embedding that share their weight, as one group.
        estimator: ``empirical`` or ``sampled`` (see estimators).
        unit: ``example`` or ``token``.
        draws: of labels or signs for each example.
        seed: of what is drawn.
        until_stable: stop when the ranks have settled.
        keep_bases: store singular vectors too, so that applying a plan is fast. What a backend
            needs and could not compute again without the data is always stored.
        kept: where these arrays go; memory by default. ``files.SpilledArrays`` is a folder.
        layers_at_a_time: collect statistics of so many layers in one pass over the data, and take
            several: for moments that do not fit in memory together.
        checkpoint: file for what has been measured so far; if it is there, go on from it.
        checkpoint_every: batches.
        workers: layers that are decomposed at a time, on the CPU; by default as many as cores.
        progress: a bar on stderr; by default if it is a terminal.

    Raises:
        ModelError: no plannable layers, an unknown kind of loss, or a layer that saw no gradient.
        DataError: no batches, no labels or targets, or options that do not go together.
        BudgetError: an unknown backend.
    """
    if not backends:
        raise DataError("at least one backend is needed")
    chosen = {name: find_backend(name) for name in backends}
    how = Estimator(estimator, unit, draws, seed)
    if loss_fn is not None and how.random:
        raise DataError(
            "loss_fn gives one loss for an example: labels cannot be drawn from it, nor tokens "
            "taken apart; use the empirical estimator per example"
        )
    model = unwrapped(model)
    objective = Objective("custom" if loss_fn else task_of(model), how, loss_fn)
    found = find_layers(model, include=include, exclude=exclude, untie=untie)
    processes = Processes.join()
    needs = frozenset[str]().union(*(backend.needs for backend in chosen.values()))
    part = len(found.layers) if layers_at_a_time is None else layers_at_a_time
    parts = [found.layers[k : k + part] for k in range(0, len(found.layers), max(part, 1))]
    _require_together(len(parts), part, until_stable, checkpoint)
    if checkpoint_every < 1:
        raise DataError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    _warn_of_memory(model, found, needs, part)
    if len(parts) > 1:
        batches = list(batches)
    architecture = type(model).__name__
    settings = {
        "model": fingerprint(architecture, found.layers),
        "task": objective.task,
        "loss_fn": loss_fn and f"{loss_fn.__module__}.{getattr(loss_fn, '__qualname__', '')}",
        "needs": sorted(needs),
        "dtype": str(next(model.parameters()).dtype),
        "until_stable": until_stable and [*dataclasses.astuple(until_stable), backends[0]],
        **{field.name: getattr(how, field.name) for field in dataclasses.fields(how)},
    }
    keep = _keeper(found, chosen.values(), keep_bases)
    arrays: Kept = {} if kept is None else kept
    count = _workers(model, workers)
    whole: Parts = Parts()
    decomposed = functools.partial(_decomposed, found, processes, backends, count)
    for layers in parts:
        stop = None
        if until_stable is not None:
            stop = _stable(model, found, objective, until_stable, processes, backends, count)
        gathered = gather(
            model,
            {member: found.modules[member] for layer in layers for member in layer.members},
            batches,
            objective,
            needs,
            processes=processes,
            checkpoint=None
            if checkpoint is None
            else Checkpoint(Path(checkpoint), checkpoint_every, settings),
            stop=stop,
            progress=progress,
        )
        curves = decomposed(layers, gathered, kept=arrays, keep=keep, progress=progress)
        whole.add(layers, gathered, curves)
    return assembled(model, found, objective, whole, backends, processes, arrays)


def _decomposed(
    found: Found,
    processes: Processes,
    backends: Sequence[str],
    workers: int,
    layers: Sequence[Layer],
    gathered: Gathered,
    **how: Any,
) -> dict[str, dict[str, Curve]]:
    """Each process decomposes its share of the layers; all get all curves."""
    mine = decompose_layers(
        layers[processes.rank :: processes.count],
        lambda name: weight_of(found.modules[name]),
        gathered.statistics,
        backends,
        workers=workers,
        **how,
    )
    shared = {name: processes.together(curves) for name, curves in mine.items()}
    if "kept" in how:
        processes.exchange(how["kept"])
    return {b: {x.name: curves[x.name] for x in layers} for b, curves in shared.items()}


def _require_together(
    parts: int, part: int, until_stable: Stability | None, checkpoint: object
) -> None:
    if part < 1:
        raise DataError(f"layers_at_a_time must be at least 1, got {part}")
    if parts > 1 and until_stable is not None:
        raise DataError("until_stable looks at all layers: it does not go with layers_at_a_time")
    if parts > 1 and checkpoint is not None:
        raise DataError("a checkpoint holds one pass: it does not go with layers_at_a_time")


def _warn_of_memory(model: nn.Module, found: Found, needs: Collection[str], part: int) -> None:
    memory = memory_for(model)
    members = [weight_shape(module) for module in found.modules.values()]
    sums = bytes_of_sums(members, needs) * min(part / len(found.layers), 1.0)
    if memory is None or model_size(model).model_bytes + sums <= memory:
        return
    tqdm.write(
        f"warning: the statistics of {min(part, len(found.layers))} layers take up to "
        f"{sums / 1e9:.3g} GB beside the model, and there are {memory / 1e9:.3g} GB in all: "
        "layers_at_a_time (--layers-at-a-time) takes several passes over the data instead",
        file=sys.stderr,
    )


def _workers(model: nn.Module, workers: int | None) -> int:
    if workers is not None:
        if workers < 1:
            raise DataError(f"workers must be at least 1, got {workers}")
        return workers
    if device_of(model).type != "cpu":
        return 1
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _keeper(
    found: Found, backends: Iterable[Backend], keep_bases: bool
) -> "functools.partial[bool]":
    spare = [backend for backend in backends if recomputable(backend)]
    size = sum(
        4 * min(x.out_features, x.in_features) * x.largest_rank * len(x.members)
        for x in found.layers
    )
    # fwsvd_two_sided keeps two arrays where the others keep one.
    arrays = sum(1 + ("columns" in backend.needs) for backend in spare)
    fits = keep_bases and size * arrays <= BASES_LIMIT
    return functools.partial(_kept, fits=fits)


def _kept(backend: Backend, fits: bool) -> bool:
    return fits or not recomputable(backend)


def _stable(
    model: nn.Module,
    found: Found,
    objective: Objective,
    wanted: Stability,
    processes: Processes,
    backends: Sequence[str],
    workers: int,
) -> Stop:
    """Says, at 4, 8, 16, ... batches, whether the ranks have settled."""

    def stop(gathered: Gathered, before: list[float]) -> tuple[list[float], str | None]:
        first = backends[:1]
        curves = _decomposed(
            found, processes, first, workers, found.layers, gathered, progress=False
        )
        parts = Parts()
        parts.add(found.layers, gathered, curves)
        profile = assembled(model, found, objective, parts, first, processes, {})
        try:
            plan = make_plan(profile, keep=wanted.keep)
        except InfeasibleBudgetError as error:
            raise DataError(f"no ranks to settle: {error}") from error
        # What one process decides is decided: solvers may run out of time, and not on all alike.
        spent = processes.decided([float(entry.parameters) for entry in plan.layers])
        if not before:
            return spent, None
        # What one layer gives another takes: half the sum of the changes has moved.
        changes = sum(abs(now - then) for now, then in zip(spent, before, strict=True))
        moved = changes / 2 / plan.budget.parameters
        if moved > wanted.tolerance:
            return spent, None
        batches = gathered.seen.batches
        return spent, (
            f"ranks have settled: {moved:.2%} of the parameters at keep {wanted.keep:g} moved "
            f"between {batches // 2} and {batches} batches"
        )

    return stop
