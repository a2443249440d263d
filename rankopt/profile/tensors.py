"""Arrays in a profile's file: one at a time, and believed only if their sha256 is right.

A safetensors file is eight bytes with the length of the header (little-endian), the header (JSON:
name -> dtype, shape, offsets into the data), and the data of all arrays without gaps. So it can be
written one array at a time, once dtypes and shapes are known.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rankopt.errors import ProfileError
from rankopt.files import is_format, whole_file

Array = npt.NDArray[Any]
KeptArray = npt.NDArray[np.float32]


#: numpy's dtypes by their name in safetensors files.
DTYPES: dict[str, np.dtype[Any]] = {
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

#: Measures of the largest models take a few GiB; more are not read.
MOST_BYTES = 16 * 2**30

#: Kinds of tensors that belong to a backend and are measures; all others are kept arrays.
MEASURES = ("losses", "ranks", "rounding")


class Renamed(Mapping[str, KeptArray]):
    """Some arrays of a mapping under shorter names, each taken when it is asked for."""

    def __init__(self, arrays: Mapping[str, KeptArray], names: Mapping[str, str]) -> None:
        self._arrays, self._names = arrays, names

    def __getitem__(self, kind: str) -> KeptArray:
        return self._arrays[self._names[kind]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class StoredArrays(Mapping[str, KeptArray]):
    """Kept arrays of a file, read and checked against their sha256 when they are asked for."""

    def __init__(self, path: Path, digests: Mapping[str, str]) -> None:
        self._path, self._digests = path, digests

    def __getitem__(self, name: str) -> KeptArray:
        wanted = self._digests[name]
        found: KeptArray | None = read(self._path, name)[0].get(name)
        if found is None or found.dtype != np.float32 or sha256_of(name, found) != wanted:
            raise ProfileError(f"{self._path}: {name} is damaged; profile again")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)


def sha256_of(name: str, array: Array) -> str:
    """Of an array's name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{name} {array.dtype.str} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _is_kept(name: str) -> bool:
    kind, dot, _ = name.rpartition("/")[2].partition(".")
    return bool(dot) and kind not in MEASURES


def read(path: Path, only: str | None) -> tuple[dict[str, Array], dict[str, str]]:
    """One array, or all but the kept ones; and the metadata.

    Raises:
        ProfileError: missing, truncated, not a safetensors file, of a dtype that profiles have not,
            or too large.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ProfileError(f"no profile at {path}: make one with `rankopt profile`")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            names = [
                name
                for name in file.keys()  # noqa: SIM118 (a safe_open is no dict)
                if (name == only if only is not None else not _is_kept(name))
            ]
            _require_readable(path, {name: file.get_slice(name) for name in names})
            return {name: file.get_tensor(name) for name in names}, metadata
    except MemoryError as error:
        raise ProfileError(f"{path} has arrays that do not fit in memory") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ProfileError(
            f"{path} is truncated or not a profile ({error}); run `rankopt profile` again"
        ) from error


def _require_readable(path: Path, announced: Mapping[str, Any]) -> None:
    """Look at dtypes and shapes before anything is read."""
    size = 0
    for name, entry in announced.items():
        dtype = DTYPES.get(entry.get_dtype())
        if dtype is None:
            raise ProfileError(
                f"{path}: {name} is of dtype {entry.get_dtype()}, which no profile has; profile "
                "again"
            )
        size += dtype.itemsize * math.prod(entry.get_shape())
    if size > MOST_BYTES:
        raise ProfileError(
            f"{path}: the measures take {size / 2**30:,.0f} GiB, those of a profile at most "
            f"{MOST_BYTES >> 30}: not a profile"
        )


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


def header_of(
    described: Mapping[str, tuple[str, int, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, int]]:
    """What stands before the arrays of a safetensors file, and where in the file each one starts.

    Args:
        described: name -> the format's name of the dtype, bytes of an element, shape.
        metadata: text only.

    Returns:
        The bytes with their length; and name -> place, in the order of the places.
    """
    # Wide types first: with the header padded to 8 bytes, every array is aligned.
    order = sorted(described, key=lambda name: -described[name][1])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = dict[str, int](), 0
    for name in order:
        code, itemsize, shape = described[name]
        starts[name], end = end, end + itemsize * int(np.prod(shape, dtype=object))
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (starts[name], end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    before = len(text).to_bytes(8, "little") + text
    return before, {name: len(before) + start for name, start in starts.items()}


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
        RankoptError: the folder does not exist, or the file is there and of another ``format``.
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
    text, starts = header_of(
        {name: (codes[dtype], dtype.itemsize, shape) for name, (dtype, shape) in described.items()},
        metadata,
    )
    if len(text) > _LONGEST_HEADER:
        raise ValueError(f"{path}: {len(starts):,} arrays: the header takes {len(text):,} bytes")
    ours = is_format(metadata["format"]) if metadata and "format" in metadata else None
    with whole_file(path, ours) as temporary, temporary.open("wb") as file:
        file.write(text)
        for name in starts:
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
