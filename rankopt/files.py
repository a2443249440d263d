"""Files and folders that are either whole or not there, and arrays too many for the memory.

A safetensors file is eight bytes with the length of the header (little-endian), the header (JSON:
name -> dtype, shape, offsets into the data), and the data of all arrays without gaps. So it can be
written one array at a time, once dtypes and shapes are known.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rankopt.errors import RankoptError

Array = npt.NDArray[Any]

#: numpy's dtypes by their name in safetensors files.
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
#: A longer header is refused by the library that reads the file.
_LONGEST_HEADER = 100_000_000


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync it and rename it into place.

    Raises:
        RankoptError: the folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise RankoptError(f"cannot write {target}: the folder {target.parent} does not exist")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def require_free(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """The folder as a Path, if something may be written there.

    Raises:
        RankoptError: it exists, is not an empty folder, and overwrite is not set; or its parent
            does not exist.
    """
    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise RankoptError(f"cannot write {target}: the folder {target.parent} does not exist")
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not overwrite:
        raise RankoptError(
            f"{target} exists and is not empty: name another folder, or replace it with --force "
            "(overwrite=True in Python)"
        )
    return target


@contextmanager
def whole_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes the place of ``path``.

    Raises:
        RankoptError: see require_free.
    """
    target = require_free(path, overwrite).absolute()
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.is_dir():
            replaced = temporary.with_name(temporary.name + ".old")
            os.replace(target, replaced)
            os.replace(temporary, target)
            shutil.rmtree(replaced)
        else:
            target.unlink(missing_ok=True)
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array that is read when it is written, and not kept.

    Attributes:
        dtype: known beforehand.
        shape: known beforehand.
        read: gives the array.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Array]


def write_safetensors(
    path: str | os.PathLike[str],
    entries: Mapping[str, Array | LazyArray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, one array in memory at a time; a reader never sees half of it.

    The library's own ``save_file`` (0.8) is given the addresses of all arrays, so that all of them
    must be in memory, or mapped, at once.

    Args:
        path: of the file.
        entries: name -> array; the mapping may load arrays when it is asked for them.
        metadata: of the header, text only.

    Raises:
        ValueError: a dtype that the format has not, a name that it reserves, a header that is too
            long, or an array that is not what its entry said. Names the array.
        RankoptError: the folder does not exist.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    described: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    for name in entries:
        entry = entries[name]
        dtype = entry.dtype.newbyteorder("<")
        if dtype not in codes:
            raise ValueError(f"{name}: safetensors files have no arrays of {entry.dtype}")
        if name == "__metadata__":
            raise ValueError(f"{name}: this name belongs to the header")
        described[name] = dtype, tuple(map(int, entry.shape))
        del entry
    # Wide types first: with the header padded to 8 bytes, every array is aligned.
    order = sorted(described, key=lambda name: -described[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = described[name]
        start, end = end, end + dtype.itemsize * int(np.prod(shape, dtype=object))
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise ValueError(f"{path}: {len(order):,} arrays: the header takes {len(text):,} bytes")
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            entry = entries[name]
            array = entry.read() if isinstance(entry, LazyArray) else entry
            dtype, shape = described[name]
            if (array.dtype.newbyteorder("<"), array.shape) != (dtype, shape):
                raise ValueError(
                    f"{name}: announced as {dtype} {shape}, got {array.dtype} {array.shape}"
                )
            file.write(np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8).data)
            # Before the next one is read.
            del entry, array


class SpilledArrays(MutableMapping[str, Array]):
    """A mapping of arrays that lie in a temporary folder and are memory-mapped when asked for.

    Put arrays from several threads, if they like. ``close``, leaving the ``with``, or the end of
    the program removes the folder; arrays that were taken out stay readable.

    Args:
        folder: where the temporary folder is made: beside what is written, where there is room.

    Raises:
        RankoptError: the folder does not exist.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not Path(folder).is_dir():
            raise RankoptError(f"cannot keep arrays in {folder}: the folder does not exist")
        self.folder = Path(tempfile.mkdtemp(prefix=".rankopt.", dir=folder))
        self._places: dict[str, Path] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def __setitem__(self, name: str, array: Array) -> None:
        with self._lock:
            self._require_open()
            self._count += 1
            place = self.folder / f"{self._count}.npy"
        # Outside the lock: several threads write at the same time.
        np.save(place, array, allow_pickle=False)
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
