"""What blocks are given and give back, batch by batch: in memory, or on disk where it is too much.

Arguments of a block are any nesting of tensors and of other things; the tensors are copied, the
rest is kept as it is.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from rankopt.temporary import make_temporary_folder

#: Bytes that are kept in memory; what comes beyond lies in files.
LIMIT = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class _Held:
    """Stands in a nesting for a tensor of a list, which belongs on a device."""

    number: int
    device: torch.device


class Activations:
    """Nestings of tensors by kind and number; on disk, a file each, beyond a limit.

    Args:
        parent: folder for a temporary folder, which is removed at the end, or by who comes after a
            kill.
        limit: bytes in memory.
    """

    def __init__(self, parent: Path, limit: int = LIMIT) -> None:
        self._parent, self._limit, self._bytes = parent, limit, 0
        self._nestings: dict[tuple[str, int], Any] = {}
        self._tensors: dict[tuple[str, int], list[Tensor]] = {}
        self._folder: Path | None = None
        self._remove: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def put(self, kind: str, number: int, nesting: Any) -> None:
        """Keep a copy, in the place of an older one."""
        from safetensors.torch import save_file

        self._drop(kind, number)
        tensors: list[Tensor] = []

        def hold(tensor: Tensor) -> _Held:
            # Layouts like those of expanded masks are not kept: a copy is whole.
            tensors.append(tensor.detach().to("cpu", copy=True).contiguous())
            return _Held(len(tensors) - 1, tensor.device)

        self._nestings[kind, number] = mapped(hold, nesting, Tensor)
        size = sum(tensor.nbytes for tensor in tensors)
        if self._bytes + size <= self._limit:
            self._bytes += size
            self._tensors[kind, number] = tensors
            return
        if self._folder is None:
            self._folder, self._remove = make_temporary_folder(self._parent)
        save_file({str(k): tensor for k, tensor in enumerate(tensors)}, self._path(kind, number))

    def get(self, kind: str, number: int) -> Any:
        """A copy: a block may change in place what it is given."""
        from safetensors.torch import load_file

        tensors = self._tensors.get((kind, number))
        if tensors is None:
            found = load_file(self._path(kind, number))
            tensors = [found[str(k)] for k in range(len(found))]

        def give(held: _Held) -> Tensor:
            return tensors[held.number].to(held.device, copy=True)

        return mapped(give, self._nestings[kind, number], _Held)

    def _drop(self, kind: str, number: int) -> None:
        self._nestings.pop((kind, number), None)
        for tensor in self._tensors.pop((kind, number), ()):
            self._bytes -= tensor.nbytes

    def _path(self, kind: str, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{kind}.{number}.safetensors"


def mapped(function: Callable[[Any], Any], nesting: Any, kind: type) -> Any:
    """A nesting with a function's values in the place of all that is of a kind."""
    if isinstance(nesting, kind):
        return function(nesting)
    if isinstance(nesting, Mapping):
        items = {key: mapped(function, value, kind) for key, value in nesting.items()}
        if type(nesting) is dict:
            return items
        found = copy.copy(nesting)  # outputs of transformers are dictionaries with attributes
        for key, value in items.items():
            found[key] = value  # type: ignore[index]
        return found
    if isinstance(nesting, list | tuple):
        values = [mapped(function, value, kind) for value in nesting]
        # A named tuple takes its fields one by one.
        return type(nesting)(*values) if hasattr(nesting, "_fields") else type(nesting)(values)
    return nesting


def tensors_in(nesting: Any) -> list[Tensor]:
    """All tensors of a nesting, in order."""
    found: list[Tensor] = []
    mapped(found.append, nesting, Tensor)
    return found
