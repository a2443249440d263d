"""One pass over the data: raw sums of statistics, shared among processes, resumable.

Batches are hashed in order, each onto the one before, by every process; each process measures those
that are its own. At the end the sums are added up over processes, so that all hold the whole.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rankopt.backends.statistics import Statistics, together
from rankopt.data.digest import chained
from rankopt.errors import DataError, NotFiniteError
from rankopt.measure import resume
from rankopt.measure.collector import Collector
from rankopt.measure.fisher import Sums
from rankopt.measure.loss import Loss
from rankopt.measure.processes import Processes
from rankopt.measure.resume import Checkpoint, Seen
from rankopt.measure.taps import first_not_finite
from rankopt.model.weights import device_of
from rankopt.progress import bar


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What one pass over the data gave, of all processes together.

    Attributes:
        sums: layer name -> its raw sums; of even batches only if there are odd ones.
        owners: layer name -> the layer that holds its second moment.
        seen: how much; batches, totals and units in the order of the data.
        units: what the sums are divided by to be means.
        names: of the layers, in the order of the totals.
        odd: layer name -> raw sums of the batches of odd numbers, if these were summed apart.
    """

    sums: Mapping[str, Sums]
    owners: Mapping[str, str]
    seen: Seen
    units: float
    names: tuple[str, ...]
    odd: Mapping[str, Sums] | None = None

    @property
    def banks(self) -> list[Mapping[str, Sums]]:
        """Whose sums are those of all data."""
        return [self.sums] if self.odd is None else [self.sums, self.odd]

    def heard(self, name: str) -> bool:
        """Whether a gradient reached the layer in any batch."""
        return any(name in bank and bank[name].seen > 0 for bank in self.banks)

    def statistics(self, name: str) -> Statistics:
        """Of one layer; moments are assembled anew at each call."""
        return functools.reduce(together, self._apart(name))

    def halves(self, name: str) -> tuple[Statistics, Statistics] | None:
        """The same of the batches of even and of odd numbers, if both are there."""
        if self.odd is None or not all(self._units):
            return None
        even, odd = self._apart(name)
        return even, odd

    @property
    def _units(self) -> list[float]:
        """Of each bank."""
        if self.odd is None:
            return [self.units]
        pairs = list(zip(self.seen.numbers, self.seen.units, strict=True))
        return [sum(units for n, units in pairs if n % 2 == half) for half in range(2)]

    def _apart(self, name: str) -> list[Statistics]:
        return [
            _statistics(bank[name], bank[self.owners[name]], units)
            for bank, units in zip(self.banks, self._units, strict=True)
        ]


def _statistics(sums: Sums, owner: Sums, units: float) -> Statistics:
    positions, inputs, gradients = sums.traces.tolist()
    return Statistics(
        units=units,
        rows=sums.rows,
        columns=sums.columns,
        elements=sums.elements,
        second_moment=None if owner.second is None else owner.second.full(),
        gradient_moment=None if sums.gradient is None else sums.gradient.full(),
        positions=positions,
        input_energy=inputs,
        gradient_energy=gradients,
    )


#: Called after a batch with what has been gathered so far, and with what it found when it was
#: called before: what it finds now, and why to stop, or None. The same for all processes.
Stop = Callable[[Gathered, list[float]], tuple[list[float], str | None]]


def gather(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss: Loss,
    needs: Collection[str],
    *,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
    checkpoint: Checkpoint | None = None,
    stop: Stop | None = None,
    first_check: int = 4,
    weights: Mapping[str, Tensor] | None = None,
    halves: bool = False,
    in_step: bool = False,
    progress: bool | None = None,
) -> Gathered:
    """Run the model over the data and add up.

    Args:
        model: unwrapped; left as it was.
        modules: layer name -> module.
        batches: the same for all processes.
        loss: what is back-propagated.
        needs: statistics beyond the rows.
        processes: that share the data.
        checkpoint: go on from it if it is there, and write it.
        stop: asked after ``first_check`` batches, and each time their number has doubled.
        first_check: see stop.
        weights: see Collector.
        halves: sum batches of even and of odd numbers apart.
        in_step: every pass over the model needs all processes: a sharded one; without checkpoint
            and stop.
        progress: a bar on stderr; by default if it is a terminal.

    Raises:
        DataError: no batches, fewer than processes, or not those of the checkpoint.
        ModelError: a loss that is not what its task says, or NaN.
    """
    seen, check, device = Seen(), first_check, device_of(model)
    checkpoint = None if checkpoint is None else checkpoint.of(processes)
    with eager(model), Collector(model, modules, needs, weights, halves=halves) as collector:
        if in_step:
            assert checkpoint is None and stop is None
            _gather_in_step(collector, model, batches, loss, seen, processes, progress)
            _require_enough(seen, processes)
            return _added_up(collector, seen, processes)
        if checkpoint is not None:
            seen = _resumed(checkpoint, collector)
        resumed, checked, chain, number = seen.batches, 0, "", -1
        # Where some have passed a check, the others need not wait for them there.
        passed, seen.last_check = processes.latest(resumed, seen.last_check)
        for number, batch in enumerate(bar(batches, "Fisher", "batch", progress)):
            loss = loss if number else loss.settled(model, batch)
            ready = loss.ready(batch, device, number)
            chain = chained(chain, ready)
            while number + 1 > check:
                check *= 2
            if number + 1 < resumed:
                continue
            if number + 1 == resumed and chain != seen.chain:
                raise _other_data(checkpoint)
            if number + 1 > resumed:
                if processes.takes(number):
                    collector.banks.turn(number)
                    with _located(model, loss, ready, number):
                        found = loss.backward(collector, model, ready, number)
                        if checked < min(2, found.examples):
                            # One example alone tells nothing of how several are kept apart.
                            loss.check(model, modules, ready)
                            checked = found.examples
                    units = loss.estimator.units(found.examples, found.targets)
                    seen.add(number, found, units, collector.totals)
                seen.batches, seen.chain = number + 1, chain
                due = checkpoint is not None and len(seen.units) % checkpoint.every == 0
                if checkpoint is not None and due and processes.takes(number):
                    _save(checkpoint, collector, seen)
            if stop is not None and number + 1 == check >= max(passed, processes.count):
                whole = _added_up(collector, seen, processes)
                seen.last_check, seen.stopped = stop(whole, seen.last_check)
                if seen.stopped is not None:
                    break
        if checkpoint is not None and checkpoint.whole and seen.batches > resumed:
            _save(checkpoint, collector, seen)
    if number + 1 < resumed:
        raise _other_data(checkpoint)
    _require_enough(seen, processes)
    return _added_up(collector, seen, processes)


def _require_enough(seen: Seen, processes: Processes) -> None:
    if seen.batches < processes.count or not seen.batches:
        given = f"{seen.batches} batches for {processes.count} processes"
        raise DataError("no batches were given" if not seen.batches else given)


def _gather_in_step(
    collector: Collector,
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    seen: Seen,
    processes: Processes,
    progress: bool | None,
) -> None:
    """Each process runs its own of as many batches as there are processes, all at the same time.

    What any batch needs besides, all run on that batch; who has none of the last ones runs
    another's, of which nothing is added.
    """
    device, modules, chain, checked = device_of(model), collector.modules, "", 0
    numbered = enumerate(bar(batches, "Fisher", "batch", progress))
    while group := list(itertools.islice(numbered, processes.count)):
        readies = {}
        for number, batch in group:
            loss = loss if number else loss.settled(model, batch)
            readies[number] = loss.ready(batch, device, number)
            seen.chain = chain = chained(chain, readies[number])
            seen.batches = number + 1
        # At once: whose number is another would wait for ever.
        _require_same_batches(seen, processes)
        for ready in readies.values():
            loss.look(collector, model, ready)
        mine = next((number for number in readies if processes.takes(number)), None)
        number = min(readies) if mine is None else mine
        with contextlib.ExitStack() as stack:
            into = collector
            if mine is None:
                into = stack.enter_context(Collector(model, modules, collector.needs))
                into.sides = collector.sides
            into.banks.turn(number)
            try:
                found = loss.backward(into, model, readies[number], number)
            except NotFiniteError as error:
                raise NotFiniteError(f"batch {number + 1}: {error}") from error
        if mine is not None:
            units = loss.estimator.units(found.examples, found.targets)
            seen.add(number, found, units, collector.totals)
        if checked < 2:
            examples = {} if mine is None else {str(number): found.examples}
            examples = processes.together(examples)
            for number, ready in readies.items():
                if checked < min(2, examples[str(number)]):
                    loss.check(model, modules, ready)
                    checked = examples[str(number)]


@contextlib.contextmanager
def _located(model: nn.Module, loss: Loss, ready: Any, number: int) -> Iterator[None]:
    """Says of NaN and infinity in which batch they are, and which module made them first."""
    try:
        yield
    except NotFiniteError as error:
        first = first_not_finite(model, lambda: loss.summed(model, ready))
        where = "" if first is None else f"; the first to make NaN or infinity is {first}"
        raise NotFiniteError(f"batch {number + 1}: {error}{where}") from error


def eager(model: nn.Module) -> contextlib.AbstractContextManager[object]:
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
    try:
        counts, where = [layers["seen"], layers["odd"]], collector.modules
        collector.banks.restore(
            tensors, layers["owners"], counts, lambda name: device_of(where[name])
        )
    except ValueError as error:
        raise resume.unreadable(checkpoint.path, str(error)) from error
    tqdm.write(f"going on after {seen.batches} batches ({checkpoint.path})", file=sys.stderr)
    return seen


def _save(checkpoint: Checkpoint, collector: Collector, seen: Seen) -> None:
    banks = collector.banks
    layers = {"owners": banks.owners, **dict(zip(("seen", "odd"), banks.counts(), strict=False))}
    resume.save(checkpoint.path, seen, banks.tensors(), layers, checkpoint.settings)


def _require_same_batches(seen: Seen, processes: Processes) -> None:
    chains = processes.together({str(processes.rank): f"{seen.batches} {seen.chain}"})
    if len(set(chains.values())) > 1:
        raise DataError(
            "the processes were given different batches: give all of them the same, each takes "
            "its share itself"
        )


def _added_up(collector: Collector, seen: Seen, processes: Processes) -> Gathered:
    """The sums of all processes; the collector's own stay what they were.

    Raises:
        DataError: the processes were given different batches.
    """
    names = tuple(collector.modules)
    if processes.count == 1:
        sums, *odd = collector.banks.found()
        return Gathered(sums, collector.owners, seen, sum(seen.units), names, *odd)
    _require_same_batches(seen, processes)
    sums, *odd = copy.deepcopy(collector.banks.complete())
    every = [held for bank in (sums, *odd) for held in bank.values()]
    counts = torch.zeros(len(every), dtype=torch.float64)
    for k, held in enumerate(every):
        processes.add_up(held.tensors().values())
        counts[k] = held.seen
    of_all = ("examples", "targets", "loss", "entropy", "weighed")
    counted = torch.tensor([getattr(seen, name) for name in of_all], dtype=torch.float64)
    totals = torch.zeros(seen.batches, len(collector.modules) + 1, dtype=torch.float64)
    for number, total, units in zip(seen.numbers, seen.totals, seen.units, strict=True):
        totals[number, :-1], totals[number, -1] = total, units
    processes.add_up([counts, counted, totals])
    for k, held in enumerate(every):
        held.seen = int(counts[k])
    examples, targets, given, expected, weighed = counted.tolist()
    whole = dataclasses.replace(
        seen,
        examples=int(examples),
        targets=int(targets),
        loss=given,
        entropy=expected,
        weighed=int(weighed),
        totals=list(totals[:, :-1]),
        units=totals[:, -1].tolist(),
        numbers=list(range(seen.batches)),
    )
    return Gathered(sums, collector.owners, whole, sum(whole.units), names, *odd)
