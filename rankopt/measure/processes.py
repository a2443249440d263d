"""Several processes that share the data, as ``torchrun`` starts them.

Every process has the whole model, without a wrapper (DDP would average gradients before they can be
squared), takes every n-th batch, and adds up in float64. One sum over all processes at the end is
the sum over the data, up to rounding of float64.
"""

import dataclasses
import datetime
import os
from collections.abc import Iterable, MutableMapping
from typing import Any, TypeVar

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

#: Processes wait for the slowest; the default of half an hour is short for a long profile.
_PATIENCE = datetime.timedelta(days=2)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Who shares the work.

    Attributes:
        rank: number of this process.
        count: of processes.
        group: of torch.distributed; gloo, because sums are added on the CPU.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def join(cls) -> "Processes":
        """The processes that torchrun started, or this one alone."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if not dist.is_available() or (count == 1 and not dist.is_initialized()):
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        group = None
        if dist.get_backend() != "gloo":
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size(), group)

    def takes(self, number: int) -> bool:
        """Whether a batch is this process's."""
        return number % self.count == self.rank

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes."""
        if self.count == 1:
            return
        for tensor in tensors:
            if tensor.device.type == "cpu":
                dist.all_reduce(tensor, group=self.group)
            else:
                copy = tensor.cpu()
                dist.all_reduce(copy, group=self.group)
                tensor.copy_(copy)

    def agree(self, decision: T) -> T:
        """The first process's decision, for all."""
        if self.count == 1:
            return decision
        said = [decision]
        dist.broadcast_object_list(said, 0, group=self.group)
        return said[0]

    def latest(self, batches: int, found: list[float]) -> tuple[int, list[float]]:
        """Batches and findings of the process that has seen most batches."""
        if self.count == 1:
            return batches, found
        tables = self.together({str(self.rank): (batches, found)})
        return max(tables.values())

    def together(self, mine: dict[str, T]) -> dict[str, T]:
        """The tables of all processes in one; small values only."""
        if self.count == 1:
            return mine
        tables: list[dict[str, T]] = [{} for _ in range(self.count)]
        dist.all_gather_object(tables, mine, group=self.group)
        return {name: value for table in tables for name, value in table.items()}

    def exchange(self, arrays: MutableMapping[str, npt.NDArray[Any]]) -> None:
        """Give every process the float32 arrays of every other, one at a time."""
        if self.count == 1:
            return
        shapes = {name: (self.rank, arrays[name].shape) for name in arrays}
        for name, (owner, shape) in sorted(self.together(shapes).items()):
            sent = torch.from_numpy(arrays[name]) if owner == self.rank else torch.empty(shape)
            dist.broadcast(sent, owner, group=self.group)
            if owner != self.rank:
                arrays[name] = sent.numpy()
