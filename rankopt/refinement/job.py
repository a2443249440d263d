"""What both methods work on, and what they do alike."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rankopt.refinement.divergence import divergence
from rankopt.refinement.fit import Recipe
from rankopt.refinement.state import Checkpoint, RefinedBlock, Saved
from rankopt.refinement.subject import Data


@dataclasses.dataclass(frozen=True)
class Job:
    """A refinement that has been looked through.

    Attributes:
        model: compressed, frozen.
        dense: frozen.
        data: prepared.
        parameters: that learn, by name.
        recipe: how.
        checkpoint: where it is saved, or None.
        folder: for what does not fit in memory.
        progress: show a bar; by default if stderr is a terminal.
    """

    model: nn.Module
    dense: nn.Module
    data: Data
    parameters: Mapping[str, nn.Parameter]
    recipe: Recipe
    checkpoint: Checkpoint | None
    folder: Path
    progress: bool | None

    def loss(self, number: int) -> Tensor:
        """Mean divergence of the targets of a batch that is fitted, with its graph."""
        ready = self.data.fitted[number]
        return divergence(self.model, self.dense, self.data.task, ready).mean()

    @torch.no_grad()
    def held_out(self) -> float:
        """Mean divergence of the held-out targets."""
        total, count = 0.0, 0
        for ready in self.data.held_out:
            found = divergence(self.model, self.dense, self.data.task, ready)
            total, count = total + float(found.double().sum()), count + found.numel()
        return total / count

    def resumed(self) -> Saved:
        """What the checkpoint holds."""
        found = None if self.checkpoint is None else self.checkpoint.load(self.parameters)
        if found is None:
            return Saved()
        steps = sum(block.steps for block in found.done)
        steps += 0 if found.state is None else found.state.step
        tqdm.write(f"going on after {steps} steps", file=sys.stderr)
        return found


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a method has made of the parameters.

    Attributes:
        before: held-out divergence before.
        after: the same of what was kept.
        steps: taken.
        seen: numbers of the batches that what was kept is fitted to.
        blocks: one by one.
    """

    before: float
    after: float
    steps: int
    seen: frozenset[int]
    blocks: tuple[RefinedBlock, ...] = ()


@contextlib.contextmanager
def learning(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Some parameters of a frozen model have gradients."""
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


@torch.no_grad()
def put(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Values into the parameters of their names."""
    for name, value in values.items():
        parameters[name].copy_(value)
