"""From a model and batches to a profile."""

import contextlib
import dataclasses
import functools
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from rankopt.backends import find_backends, rounding, valued
from rankopt.data.mixtures import Mixture
from rankopt.errors import OptionError, few
from rankopt.layers import Bits, Form, Layer
from rankopt.measure.accumulate import Gathered, eager, gather
from rankopt.measure.assemble import Parts, Subject, assembled
from rankopt.measure.checks import check_options, warn_of_fitted, warn_of_memory, warn_of_zeros
from rankopt.measure.decompose import (
    ScaledCurve,
    Store,
    decompose_layers,
    put_together,
    roundable,
    storing,
    workers_of,
)
from rankopt.measure.estimators import Estimator, Kind, Unit
from rankopt.measure.loss import find_loss, name_of
from rankopt.measure.processes import Processes
from rankopt.measure.resume import Checkpoint
from rankopt.measure.rounds import Compress, second_round
from rankopt.measure.taps import copied_inputs, differentiable, probe, require_gradients
from rankopt.model.inputs import listed
from rankopt.model.selection import find_layers
from rankopt.model.sharded import as_itself, has_shards
from rankopt.model.tasks import LossFunction
from rankopt.model.weights import device_of, unwrapped, weight_of
from rankopt.profile.profile import Profile

#: (the profile of the data so far, what it found when it was asked before) -> what it finds now, a
#: few numbers that a checkpoint keeps, and why to stop, or None.
Stop = Callable[[Profile, Sequence[float]], tuple[Sequence[float], str | None]]

_SILENT = "are silent on the first batch, and left alone if they are on all"


def profile_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    backends: Sequence[str] = ("kronecker",),
    loss_fn: LossFunction | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    untie: bool = False,
    moments: bool = True,
    estimator: Kind = "auto",
    unit: Unit = "example",
    draws: int = 1,
    seed: int = 0,
    stop: Stop | None = None,
    again: Compress | None = None,
    cross_fit: bool = False,
    form: Form = "pivoted",
    bits: Sequence[Bits] = (),
    keep_bases: bool | None = None,
    store: Store | None = None,
    layers_at_a_time: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 32,
    workers: int | None = None,
    progress: bool | None = None,
) -> Profile:
    """Measure what every rank of every layer retains.

    Runs each batch forward and backward once (no gradients of weights, eval mode, gradients on and
    autocast off; the model is left as it was), then decomposes every layer once for each backend.
    The first batch is run once more before, with the gradients of the planned layers' weights one
    at a time: layers whose weight is used where no hook sees it are left alone, and so are, in the
    end, those that no gradient reached. Started by ``torchrun``, every process measures its share
    of the batches and returns the same profile; the model may be sharded over all of them
    (``fully_shard``), each weight is put together once to be decomposed.

    Args:
        model: a transformers model with a head and its own loss, or any module with ``loss_fn``;
            weights loaded.
        batches: dictionaries of tensors as the model takes them, ``(B, T)`` inputs and labels; of
            lists of numbers or numpy arrays tensors are made. Of causal language models give
            ``labels`` equal to ``input_ids``, or leave them out: they are shifted by the head, or,
            where it does not, here. Labels of padding are ignored, and those that would be
            predicted from it. With ``loss_fn``, anything, examples first.
        backends: ``fwsvd``, ``fwsvd_two_sided``, ``kronecker``, ``svd``, ``tfwsvd``, ``whitened``,
            any that is installed, or ``module:object``; only what they need is measured.
        moments: sum both second moments for every backend, so that what its factors lose is valued
            with the Kronecker-factored Fisher information (the scale ``kronecker``, then the
            default). Without, a backend is planned on its own error, and the diagonal ones take no
            K x K memory for a layer.
        loss_fn: (model, batch) -> the loss of each example, summed over its terms, ``(B,)``.
        include: globs of the layers to plan, instead of those inside the transformer blocks.
        exclude: globs of layers to leave alone.
        untie: plan a head and an embedding that share their weight, as one group.
        estimator: ``empirical``, ``expected``, ``sampled``, or by the task (see estimators; the
            profile says which, and why).
        unit: ``example`` or ``token``.
        draws: of labels or signs for each example.
        seed: of what is drawn.
        stop: asked after 4, 8, 16, ... batches whether to stop; ``rankopt.Stability()`` stops when
            the ranks have settled.
        again: see the data once more, on the model that a plan of the first round would leave, and
            take the mean of both (see rounds): ``rankopt.Compressed()``. Batches are kept in memory
            for that; the second round has a checkpoint of its own, ``CHECKPOINT.again``.
        cross_fit: value what factors lose on data that did not make them, too (see
            rankopt.backends.valued): statistics of every other batch are summed apart, which takes
            twice their memory, and each layer is decomposed three times. Needs moments. Nothing
            changes for backends that read rows and columns only: they hardly fit the data.
        form: how matrices of lower rank will be kept: ``pivoted``, or as ``pairs`` of factors,
            which have more parameters at the same rank. Says what plans have by default, and how
            far singular vectors are stored: to full rank for ``pivoted``, about half of it for
            pairs. A profile for ``pivoted`` can be planned in pairs too.
        bits: 8, 4: also measure what rounding weights to so many bits loses, of linear layers that
            share their matrix with none: what ``make_plan(bits=...)`` needs. Needs moments.
        keep_bases: store singular vectors too, so that applying a plan is fast; by default if they
            take 2 GiB at most. What a backend could not compute again without the data is always
            stored.
        store: where these arrays go; memory by default. ``rankopt.SpilledArrays`` is a folder.
        layers_at_a_time: collect statistics of so many layers in one pass over the data, and take
            several: for moments that do not fit in memory together.
        checkpoint: file for what has been measured so far; if it is there, go on from it.
        checkpoint_every: batches.
        workers: layers that are decomposed at a time, on the CPU; by default as many as cores.
        progress: a bar on stderr; by default if it is a terminal.

    Raises:
        ModelError: no plannable layers, an unknown kind of loss, NaN or infinity (names the batch
            and the layer), or ``torch.inference_mode``.
        DataError: no batches, no labels or targets.
        OptionError: an unknown backend, estimator, unit or form, a number below 1, or options that
            do not go together.
    """
    if not backends:
        raise OptionError("at least one backend is needed")
    bits = check_options(form, moments, cross_fit, layers_at_a_time, bits)
    if checkpoint_every < 1:
        raise OptionError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    mixed = batches if isinstance(batches, Mixture) else None
    chosen = find_backends(backends)
    backends = tuple(chosen)
    model = unwrapped(model, sharded=True)
    require_gradients(model, "profile_model")
    with differentiable(model) as around:
        processes = Processes.join()
        sharded = around.enter_context(as_itself(model, processes.count))
        selection = find_layers(model, include=include, exclude=exclude, untie=untie)
        loss = find_loss(model, loss_fn, Estimator(estimator, unit, draws, seed))
        _passes(selection.layers, layers_at_a_time, stop, checkpoint)
        if again is not None and (stop is not None or layers_at_a_time is not None):
            raise OptionError("again sees all data and layers twice: no stop, no layers_at_a_time")
        if sharded and not (again is None and stop is None and checkpoint is None):
            raise OptionError("a sharded model takes no stop, no checkpoint, and no second round")
        cross_fit = cross_fit and valued.any_fitted(chosen.values())
        workers = workers_of(device_of(model), workers)
        needs = valued.needs_of(chosen.values(), moments)
        needs |= rounding.NEEDS if bits else frozenset()
        subject = Subject(model, selection, loss, processes, form)
        subject, silent, batches = _examined(subject, batches, around)
        selection = subject.selection
        passes = _passes(selection.layers, layers_at_a_time, stop, checkpoint, silent)
        times = (1 + cross_fit) * (1 + (again is not None))
        warn_of_memory(model, selection, needs, len(passes[0]), times)
        if len(passes) > 1 or again is not None:
            batches = list(batches)
        saved = None
        if checkpoint is not None:
            settings = _settings(subject, needs, stop, backends[0])
            settings |= {"cross_fit": True} if cross_fit else {}
            more = again is not None
            saved = Checkpoint(Path(checkpoint), checkpoint_every, settings, whole=more)
        arrays: Store = {} if store is None else store
        stored = storing(subject.selection.layers, chosen.values(), form, keep_bases)
        decomposed = functools.partial(_decomposed, subject, workers, moments)
        whole, lost = Parts(), dict[str, str]()
        for layers in passes:
            gathered = gather(
                model,
                {member: selection.modules[member] for x in layers for member in x.members},
                batches,
                subject.loss,
                needs,
                processes=subject.processes,
                checkpoint=saved,
                stop=None if stop is None else _asked(stop, subject, decomposed, backends[0]),
                halves=cross_fit,
                in_step=sharded,
                progress=progress,
            )
            lost |= _unheard(layers, gathered, silent)
            layers = [x for x in layers if lost.keys().isdisjoint(x.members)]
            how: Any = {"store": arrays, "stored": stored, "progress": progress}
            if again is not None:
                heard = dataclasses.replace(subject, selection=selection.without(lost))
                curves = decomposed(layers, gathered, backends[:1], **how)
                same: Any = {"needs": needs, "halves": cross_fit, "progress": progress}
                if saved is not None:
                    same["checkpoint"] = saved.again(_asked_for(again))
                first = gathered
                gathered = second_round(heard, again, first, curves, arrays, batches, **same)
                again = None if gathered is first else again
            how["bits_of"] = functools.partial(roundable, selection.modules, bits)
            curves = decomposed(layers, gathered, backends, **how)
            whole.add(layers, gathered, curves)
        if lost:
            subject = dataclasses.replace(subject, selection=selection.without(lost))
        profile = assembled(subject, whole, arrays)
    about: dict[str, Any] = {"again": None if again is None else _asked_for(again)}
    halved = whole.gathered is not None and whole.gathered.seen.batches > 1
    about |= {"cross_fit": cross_fit and halved, "bits": bits}
    if cross_fit and not halved:
        tqdm.write("note: one batch has no halves to cross-fit: give smaller ones", file=sys.stderr)
    if mixed is not None:
        about["sources"] = mixed.sources(profile.examples)
    profile = dataclasses.replace(profile, info=profile.info.model_copy(update=about))
    warn_of_zeros(profile)
    seen = None if whole.gathered is None else whole.gathered.seen
    if seen is not None and subject.processes.rank == 0:
        warn_of_fitted(profile.info.task, seen.loss, seen.entropy, seen.weighed)
    return profile


def _examined(
    subject: Subject, batches: Iterable[Any], around: contextlib.ExitStack
) -> tuple[Subject, dict[str, str], Iterable[Any]]:
    """What the first batch leaves of the subject, what was silent on it, and all the batches."""
    batches = listed(batches)
    rest = iter(batches)
    firsts = list(itertools.islice(rest, 1))
    if not isinstance(batches, Sequence):
        batches = itertools.chain(firsts, rest)
    if not firsts:
        return subject, {}, batches
    model, modules = subject.model, subject.selection.modules
    loss = subject.loss.settled(model, firsts[0])
    subject = dataclasses.replace(subject, loss=loss)
    ready = loss.ready(firsts[0], device_of(model))
    with eager(model):
        found = probe(model, modules, lambda one: loss.backward(one, model, ready, 0))
    found = subject.processes.agree(found)
    if found.copied:
        around.enter_context(copied_inputs(modules.values()))
    for names, what in ((found.refused, "are left alone"), (found.silent, _SILENT)):
        if names and subject.processes.rank == 0:
            why = Counter(names.values()).most_common(1)[0][0]
            tqdm.write(f"{len(names)} layers {what} ({few(names)}): {why}", file=sys.stderr)
    if found.refused:
        left = subject.selection.without(found.refused)
        subject = dataclasses.replace(subject, selection=left)
    return subject, found.silent, batches


def _unheard(
    layers: Sequence[Layer], gathered: Gathered, silent: Mapping[str, str]
) -> dict[str, str]:
    """Members that no gradient reached, and why."""
    return {
        name: silent.get(name, "no gradient reached it")
        for layer in layers
        for name in layer.members
        if not gathered.heard(name)
    }


def _settings(
    subject: Subject, needs: Collection[str], stop: Stop | None, first: str
) -> dict[str, Any]:
    """What must be the same when a checkpoint is gone on from."""
    how = subject.loss.estimator
    asked = None
    if stop is not None:
        asked = [_asked_for(stop), first]
    return {
        "model": subject.fingerprint,
        "task": subject.loss.task,
        "loss_fn": subject.loss.name,
        "needs": sorted(needs),
        "dtype": str(next(subject.model.parameters()).dtype),
        "stop": asked,
        **{field.name: getattr(how, field.name) for field in dataclasses.fields(how)},
    }


def _asked_for(given: Callable[..., object]) -> str:
    """How a callable is called in files."""
    return repr(given) if dataclasses.is_dataclass(given) else name_of(given)


def _asked(
    stop: Stop,
    subject: Subject,
    decomposed: "functools.partial[dict[str, dict[str, ScaledCurve]]]",
    backend: str,
) -> Callable[[Gathered, list[float]], tuple[list[float], str | None]]:
    """Asks a stop about the profile of what has been gathered so far, under the first backend."""

    def ask(gathered: Gathered, before: list[float]) -> tuple[list[float], str | None]:
        lost = _unheard(subject.selection.layers, gathered, {})
        seen = dataclasses.replace(subject, selection=subject.selection.without(lost))
        layers, so_far = seen.selection.layers, Parts()
        so_far.add(layers, gathered, decomposed(layers, gathered, [backend], progress=False))
        # Where more layers have been heard since, what was found before says nothing.
        known = before[1:] if before[:1] == [float(len(layers))] else []
        found, why = stop(assembled(seen, so_far, {}), known)
        # One process decides: what is asked may run out of time, and not on all alike.
        return subject.processes.agree(([float(len(layers)), *found], why))

    return ask


def _decomposed(
    subject: Subject,
    workers: int,
    moments: bool,
    layers: Sequence[Layer],
    gathered: Gathered,
    backends: Sequence[str],
    **how: Any,
) -> dict[str, dict[str, ScaledCurve]]:
    """Each process decomposes its share of the layers; all get all curves."""
    processes, modules = subject.processes, subject.selection.modules
    own = layers[processes.rank :: processes.count]
    together = put_together(modules, layers, own) if has_shards(subject.model) else None
    mine = decompose_layers(
        own,
        together.__getitem__ if together else lambda name: weight_of(modules[name]),
        gathered.statistics,
        backends,
        halves_of=gathered.halves,
        form=subject.form,
        moments=moments,
        workers=workers,
        **how,
    )
    shared = {name: processes.together(curves) for name, curves in mine.items()}
    if "store" in how:
        processes.exchange(how["store"])
    return {b: {x.name: curves[x.name] for x in layers} for b, curves in shared.items()}


def _passes(
    layers: tuple[Layer, ...],
    part: int | None,
    stop: Stop | None,
    checkpoint: object,
    silent: Collection[str] = (),
) -> list[list[Layer]]:
    """The layers of each pass over the data; silent ones need no memory, and come with others."""
    if part is None or part >= len(layers):
        part = len(layers)
    if part < len(layers) and stop is not None:
        raise OptionError(
            "a stop (--until-stable) is asked about all layers: it does not go with "
            "layers_at_a_time"
        )
    if part < len(layers) and checkpoint is not None:
        raise OptionError("a checkpoint holds one pass: it does not go with layers_at_a_time")
    passes, heard = [list[Layer]()], 0
    for layer in layers:
        speaks = layer.name not in silent
        if speaks and heard == part:
            passes.append([])
            heard = 0
        passes[-1].append(layer)
        heard += speaks
    return passes
