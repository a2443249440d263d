"""Through a model block by block: what each is given, and what it gives back, on every batch.

The model itself is run, up to a block, so that masks, positions and whatever else an architecture
hands to its blocks are what they are. The blocks before it are not computed again: each gives back
what the last of them gave, which is what the next one sees. Where an architecture lets a block see
more than that, the first batch tells: there the model is run whole as well, and what differs by a
bit makes all further runs whole.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.errors import ModelError
from rankopt.model.lowrank import LowRank
from rankopt.model.tasks import Batch
from rankopt.refinement.activations import Activations, tensors_in
from rankopt.refinement.divergence import logits_of


class _ReachedError(Exception):
    """The block has been reached, and nothing after it matters."""


def blocks_of(model: nn.Module, ready: Batch) -> dict[str, str]:
    """The repeated layers, in the order in which they run, and the list that each is in.

    Args:
        model: compressed.
        ready: a prepared batch.

    Raises:
        ModelError: none has a low-rank layer, or one is used several times in a run.
    """
    try:
        found = repeated(model, ready)
    except ModelError as error:
        raise ModelError(f"{error}: take the method distill") from error
    if not any(is_low_rank(model.get_submodule(name)) for name in found):
        raise ModelError(
            f"{type(model).__name__} has no repeated block (a child of an nn.ModuleList) with "
            "low-rank layers: take the method distill"
        )
    return found


def repeated(model: nn.Module, ready: Batch) -> dict[str, str]:
    """As blocks_of, whatever is in them.

    Raises:
        ModelError: one is used several times in a run.
    """
    outermost: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in outermost)
        if isinstance(module, nn.ModuleList) and not inside:
            outermost.append(name)
    lists = {
        f"{name}.{own}": name
        for name in outermost
        for own, _ in model.get_submodule(name).named_children()
    }
    ran: list[str] = []
    with contextlib.ExitStack() as hooks:
        for name in lists:
            block = model.get_submodule(name)
            note = _noting(ran, name)
            hooks.enter_context(block.register_forward_pre_hook(note))
        with torch.no_grad():
            logits_of(model, ready)
    again = next((name for name in ran if ran.count(name) > 1), None)
    if again is not None:
        raise ModelError(
            f"{again} is used several times in one run, so it cannot be refined by itself"
        )
    return {name: lists[name] for name in ran}


def _noting(ran: list[str], name: str) -> Callable[..., None]:
    def note(*_: Any) -> None:
        ran.append(name)

    return note


def is_low_rank(block: nn.Module) -> bool:
    """Whether there is a low-rank layer in it."""
    return any(isinstance(module, LowRank) for module in block.modules())


class Walk:
    """Runs a model to one block after the other.

    Args:
        model: frozen.
        blocks: all of its blocks, see blocks_of.
        batches: prepared.
        store: for what blocks give back.
        kind: of this in the store.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, str],
        batches: Sequence[Batch],
        store: Activations,
        kind: str,
    ) -> None:
        self._model, self._blocks, self._batches = model, dict(blocks), batches
        self._store, self._kind = store, kind
        self._places = {name: place for place, name in enumerate(blocks)}
        #: List of blocks -> the last of it whose outputs are stored.
        self._passed: dict[str, str] = {}
        self._whole = False

    @torch.no_grad()
    def given(self, name: str, number: int) -> tuple[Any, Any]:
        """What a block is given on a batch, ``(args, kwargs)``."""
        found: list[Any] = []

        def look(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.append((args, kwargs))
            raise _ReachedError

        block = self._model.get_submodule(name)
        with block.register_forward_pre_hook(look, with_kwargs=True):
            self._run(name, number, found)
        given: tuple[Any, Any] = found[0]
        return given

    @torch.no_grad()
    def gives(self, name: str, number: int) -> Any:
        """What a block gives back on a batch."""
        found: list[Any] = []

        def look(_: nn.Module, args: Any, output: Any) -> None:
            found.append(output)
            raise _ReachedError

        with self._model.get_submodule(name).register_forward_hook(look):
            self._run(name, number, found)
        return found[0]

    def passed(self, name: str, number: int, output: Any) -> None:
        """Store what a block gives back on a batch; after the last, the next runs begin there."""
        self._store.put(f"{self._kind}.{self._blocks[name]}", number, output)
        if number + 1 == len(self._batches):
            self._passed[self._blocks[name]] = name

    def _run(self, name: str, number: int, found: list[Any]) -> None:
        """Run as far as a block; what a hook found there is the first that is found."""
        if not self._whole and self._passed:
            with self._skipping(number):
                self._reach(number)
            if number:
                return
            self._reach(number)
            self._whole = not _same(*found)
            if self._whole:
                del found[0]
            return
        self._reach(number)

    def _reach(self, number: int) -> None:
        with contextlib.suppress(_ReachedError):
            logits_of(self._model, self._batches[number])

    @contextlib.contextmanager
    def _skipping(self, number: int) -> Iterator[None]:
        skipped: list[tuple[nn.Module, Any]] = []
        for name, group in self._blocks.items():
            last = self._passed.get(group)
            if last is None or self._places[name] > self._places[last]:
                continue
            block = self._model.get_submodule(name)
            skipped.append((block, block.__dict__.get("forward")))
            block.forward = self._stand_in(group, number)
        try:
            yield
        finally:
            for block, before in skipped:
                del block.forward
                if before is not None:  # accelerate's, that fetches what is offloaded
                    block.forward = before

    def _stand_in(self, group: str, number: int) -> Callable[..., Any]:
        def forward(*_: Any, **__: Any) -> Any:
            return self._store.get(f"{self._kind}.{group}", number)

        return forward


def _same(a: Any, b: Any) -> bool:
    ours, theirs = tensors_in(a), tensors_in(b)
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
