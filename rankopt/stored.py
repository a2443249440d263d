"""Arrays in a profile's file: read one at a time, and believed only if their sha256 is right."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rankopt.errors import ProfileError
from rankopt.files import Array

KeptArray = npt.NDArray[np.float32]

#: Kinds of tensors that belong to a backend and are measures; all others are kept arrays.
MEASURES = ("losses", "ranks")


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
        if found is None or sha256_of(name, found) != wanted:
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
        ProfileError: missing, truncated, or not a safetensors file.
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
            return {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise ProfileError(
            f"{path} is truncated or not a profile ({error}); run `rankopt profile` again"
        ) from error
