"""One pass over the data: raw sums of statistics, shared among processes, resumable.

Batches are hashed in order, each onto the one before, by every process; each process measures those
that are its own. At the end the sums are added up over processes, so that all hold the whole.
"""

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from rankopt.backends.statistics import Statistics
from rankopt.data.digest import digest_of
from rankopt.errors import DataError, ModelError
from rankopt.measure import resume
from rankopt.measure.checks import check_batch
from rankopt.measure.collector import Collector
from rankopt.measure.estimators import Estimator
from rankopt.measure.loss import Objective, losses_of, tokens_of
from rankopt.measure.padding import masks_of, told_apart
from rankopt.measure.processes import Processes
from rankopt.measure.resume import Checkpoint, Seen
from rankopt.measure.sums import Sums
from rankopt.model.tasks import (
    Batch,
    loss_terms,
    prepare,
    task_of,
    to_device,
)
from rankopt.model.weights import device_of
from rankopt.progress import bar


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What one pass over the data gave, of all processes together.

    Attributes:
        sums: layer name -> its raw sums.
        owners: layer name -> the layer that holds its second moment.
        seen: how much; batches, totals and units in the order of the data.
        units: what the sums are divided by to be means.
        names: of the layers, in the order of the totals.
    """

    sums: Mapping[str, Sums]
    owners: Mapping[str, str]
    seen: Seen
    units: float
    names: tuple[str, ...]

    def statistics(self, name: str) -> Statistics:
        """Of one layer; moments are assembled anew at each call."""
        sums, owner = self.sums[name], self.sums[self.owners[name]]
        positions, inputs, gradients = sums.traces.tolist()
        return Statistics(
            self.units,
            sums.rows,
            sums.columns,
            sums.elements,
            None if owner.second is None else owner.second.full(),
            None if sums.gradient is None else sums.gradient.full(),
            positions,
            inputs,
            gradients,
        )


#: Called after a batch with what has been gathered so far, and with what it found when it was
#: called before: what it finds now, and why to stop, or None. The same for all processes.
Stop = Callable[[Gathered, list[float]], tuple[list[float], str | None]]


def gather(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    objective: Objective,
    needs: Collection[str],
    *,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
    checkpoint: Checkpoint | None = None,
    stop: Stop | None = None,
    first_check: int = 4,
    progress: bool | None = None,
) -> Gathered:
    """Run the model over the data and add up.

    Args:
        model: unwrapped; left as it was.
        modules: layer name -> module.
        batches: the same for all processes.
        objective: what is back-propagated.
        needs: statistics beyond the rows.
        processes: that share the data.
        checkpoint: go on from it if it is there, and write it.
        stop: asked after ``first_check`` batches, and each time their number has doubled.
        first_check: see stop.
        progress: a bar on stderr; by default if it is a terminal.

    Raises:
        DataError: no batches, fewer than processes, or not those of the checkpoint.
        ModelError: a loss that is not what its task says, NaN, or a layer without a gradient.
    """
    seen, check = Seen(), first_check
    checkpoint = None if checkpoint is None else checkpoint.of(processes)
    with _eager(model), Collector(model, modules, needs) as collector:
        if checkpoint is not None:
            seen = _resumed(checkpoint, collector)
        resumed, started, chain, number = seen.batches, False, "", -1
        # Where some have passed a check, the others need not wait for them there.
        passed, seen.looked = processes.furthest(resumed, seen.looked)
        for number, batch in enumerate(bar(batches, "Fisher", "batch", progress)):
            ready, digest = _ready(model, objective, batch)
            chain = hashlib.sha256(f"{chain} {digest}".encode()).hexdigest()
            while number + 1 > check:
                check *= 2
            if number + 1 < resumed:
                continue
            if number + 1 == resumed and chain != seen.chain:
                raise _other_data(checkpoint)
            if number + 1 > resumed:
                if processes.takes(number):
                    if not started:
                        check_batch(model, modules, objective, ready)
                        started = True
                    _measure(collector, model, objective, ready, number, seen)
                seen.batches, seen.chain = number + 1, chain
                due = checkpoint is not None and len(seen.units) % checkpoint.every == 0
                if checkpoint is not None and due and processes.takes(number):
                    _save(checkpoint, collector, seen)
            if stop is not None and number + 1 == check >= max(passed, processes.count):
                whole = _added_up(collector, objective, seen, processes)
                seen.looked, seen.stopped = stop(whole, seen.looked)
                if seen.stopped is not None:
                    break
    if number + 1 < resumed:
        raise _other_data(checkpoint)
    if seen.batches < processes.count or not seen.batches:
        given = f"{seen.batches} batches for {processes.count} processes"
        raise DataError("no batches were given" if not seen.batches else given)
    found = _added_up(collector, objective, seen, processes)
    silent = [name for name in modules if name not in found.sums or not found.sums[name].seen]
    if silent:
        raise ModelError(
            f"{len(silent)} planned layers never took part in the loss ({', '.join(silent[:3])}): "
            "their Fisher information is unknown; leave them out with exclude"
        )
    return found


def _eager(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Compiled parts run as they were written: hooks come after their compilation."""
    compiled = any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def _other_data(checkpoint: Checkpoint | None) -> DataError:
    path = checkpoint.path if checkpoint is not None else ""
    return DataError(
        f"the checkpoint {path} was measured with other data: give the same to go on, or delete it "
        "to start again"
    )


def _resumed(checkpoint: Checkpoint, collector: Collector) -> Seen:
    found = resume.load(checkpoint.path, checkpoint.settings)
    if found is None:
        return Seen()
    seen, tensors, layers = found
    collector.restore(tensors, layers["owners"], layers["seen"])
    tqdm.write(f"going on after {seen.batches} batches ({checkpoint.path})", file=sys.stderr)
    return seen


def _save(checkpoint: Checkpoint, collector: Collector, seen: Seen) -> None:
    tensors = {
        f"{name}/{kind}": tensor
        for name, sums in collector.sums.items()
        for kind, tensor in sums.tensors().items()
    }
    layers = {
        "owners": collector.owners,
        "seen": {name: sums.seen for name, sums in collector.sums.items()},
    }
    resume.save(checkpoint.path, seen, tensors, layers, checkpoint.settings)


def _ready(model: nn.Module, objective: Objective, batch: Any) -> tuple[Any, str]:
    """The batch on the device, and its digest."""
    device = device_of(model)
    if objective.loss_fn is not None:
        ready = to_device(batch, device)
    else:
        ready = prepare(objective.task, batch, device)
    return ready, digest_of(ready)


def data_digest(model: nn.Module, batches: Iterable[Batch]) -> str:
    """The digest that a profile of these batches has, without measuring."""
    chain = ""
    objective = Objective(task_of(model), Estimator())
    for batch in batches:
        chain = hashlib.sha256(f"{chain} {_ready(model, objective, batch)[1]}".encode()).hexdigest()
    return chain


def _measure(
    collector: Collector,
    model: nn.Module,
    objective: Objective,
    ready: Any,
    number: int,
    seen: Seen,
) -> None:
    if objective.loss_fn is not None:
        # How many examples there are is known only afterwards; taps need it in backward.
        collector.begin(0, 1, masks_of(objective.task, ready) if isinstance(ready, Mapping) else ())
        losses = losses_of(objective.loss_fn, model, ready)
        examples = targets = len(losses)
        collector.expect(examples, 1)
        collector.backward(losses.sum())
    else:
        if "second_moment" in collector.needs:
            ready = told_apart(model, objective.task, ready)
        terms = loss_terms(objective.task, ready["labels"])
        examples, targets = len(terms), int(terms.sum())
        collector.begin(examples, tokens_of(ready), masks_of(objective.task, ready))
        for loss, again in objective.estimator.losses(model, objective.task, ready, number):
            collector.backward(loss, again=again)
    seen.examples += examples
    seen.targets += targets
    seen.totals.append(collector.totals)
    seen.units.append(float(objective.estimator.units(examples, targets)))
    seen.numbers.append(number)


def _added_up(
    collector: Collector, objective: Objective, seen: Seen, processes: Processes
) -> Gathered:
    """The sums of all processes; the collector's own stay what they were.

    Raises:
        DataError: the processes were given different batches.
    """
    names = tuple(collector.modules)
    if processes.count == 1:
        return Gathered(collector.sums, collector.owners, seen, sum(seen.units), names)
    chains = processes.together({str(processes.rank): f"{seen.batches} {seen.chain}"})
    if len(set(chains.values())) > 1:
        raise DataError(
            "the processes were given different batches: give all of them the same, each takes "
            "its share itself"
        )
    sums = collector.copies()
    counts = torch.zeros(len(sums) + 2, dtype=torch.float64)
    for k, held in enumerate(sums.values()):
        processes.add_up(held.tensors().values())
        counts[k] = held.seen
    counts[-2], counts[-1] = seen.examples, seen.targets
    totals = torch.zeros(seen.batches, len(collector.modules) + 1, dtype=torch.float64)
    for number, total, units in zip(seen.numbers, seen.totals, seen.units, strict=True):
        totals[number, :-1], totals[number, -1] = total, units
    processes.add_up([counts, totals])
    for k, held in enumerate(sums.values()):
        held.seen = int(counts[k])
    whole = dataclasses.replace(
        seen,
        examples=int(counts[-2]),
        targets=int(counts[-1]),
        totals=list(totals[:, :-1]),
        units=totals[:, -1].tolist(),
        numbers=list(range(seen.batches)),
    )
    return Gathered(sums, collector.owners, whole, sum(whole.units), names)
