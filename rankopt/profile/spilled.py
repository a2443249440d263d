"""Arrays that are too many for the memory."""

import os
import threading
import types
import weakref
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from rankopt.errors import RankoptError
from rankopt.files import told
from rankopt.profile.tensors import Array
from rankopt.temporary import make_temporary_folder


class SpilledArrays(MutableMapping[str, Array]):
    """A mapping of arrays that lie in a temporary folder and are memory-mapped when asked for.

    Put arrays from several threads, if they like. ``close``, leaving the ``with``, or the end of
    the program removes the folder; arrays that were taken out stay readable.

    Args:
        folder: where the temporary folder is made: beside what is written, where there is room.

    Raises:
        RankoptError: the folder does not exist.
        WriteError: the system refuses to write there, now or when an array is put.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not Path(folder).is_dir():
            raise RankoptError(f"cannot keep arrays in {folder}: the folder does not exist")
        with told(folder):
            self.folder, remove = make_temporary_folder(Path(folder))
        self._places: dict[str, Path] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._remove = weakref.finalize(self, remove)

    def __setitem__(self, name: str, array: Array) -> None:
        with self._lock:
            self._require_open()
            self._count += 1
            place = self.folder / f"{self._count}.npy"
        # Outside the lock: several threads write at the same time.
        with told(self.folder.parent):
            _write(place, array)
        with self._lock:
            replaced = self._places.get(name)
            self._places[name] = place
        if replaced is not None:
            replaced.unlink()

    def __getitem__(self, name: str) -> Array:
        self._require_open()
        place = self._places[name]
        try:
            array: Array = np.load(place, mmap_mode="r")
        except ValueError:
            # Nothing of an empty array can be mapped.
            array = np.load(place)
        return array

    def __delitem__(self, name: str) -> None:
        with self._lock:
            place = self._places.pop(name)
        place.unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __enter__(self) -> "SpilledArrays":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder and all that is in it."""
        self._remove()

    def _require_open(self) -> None:
        if not self._remove.alive:
            raise RankoptError(f"{self.folder} is closed: its arrays are gone")


def _write(place: Path, array: Array) -> None:
    with open(place, "wb") as file:
        # Not the file itself: what numpy does with one does not say why it fails.
        opaque: Any = types.SimpleNamespace(write=file.write)
        np.save(opaque, array, allow_pickle=False)
