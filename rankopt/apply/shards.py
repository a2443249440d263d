"""The weights of a transformers folder, written a piece at a time and gone on with after a kill.

All names, shapes and dtypes are known before the first value is, so every tensor's place in its
file is: the files are laid out first, as transformers and safetensors lay them out, and a piece (a
tensor, or all those of one layer) is put where it belongs when it is made. A journal beside them
has the sha256 of each tensor of a piece that is written whole. Who goes on reads those again, and
believes nothing else: what a killed process or a crash has left half-written is made anew.
"""

import contextlib
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rankopt.errors import ModelError, RankoptError, WriteError
from rankopt.files import LIST_OF_FILES, MODEL, format_of, told, whole_file
from rankopt.profile.tensors import DTYPES, header_of
from rankopt.temporary import MARK, hold

PARTIAL = "rankopt-partial-model"
#: In the folder until all is written.
JOURNAL = "rankopt_partial.jsonl"
_METADATA, _INDEX = {"format": "pt"}, "model.safetensors.index.json"
#: torch's dtypes -> their name in safetensors files.
_CODES: dict[torch.dtype, str] = {
    torch.from_numpy(np.empty(0, kind)).dtype: code for code, kind in DTYPES.items()
} | {torch.bfloat16: "BF16", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3"}
#: Of one size, in this order within a file, and then by name: safetensors sorts so.
_ORDER = [
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
]


class Shards:
    """Files of weights that are being written into a folder; used as a context manager.

    Args:
        folder: ``NAME.partial``, made if it is not there.
        tensors: name -> a tensor of the shape and dtype to come, in the order of the model.
        settings: that must be the same when it is gone on.

    Raises:
        RankoptError: the folder is somebody else's, of other settings, or being written by another
            process.
        WriteError: the system refuses, or there is too little room.
        ModelError: a dtype that the files cannot have.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> None:
        self.folder, self._settings = folder, json.loads(json.dumps(dict(settings)))
        self._tensors = dict(tensors)
        largest = inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"]
        split = split_torch_state_dict_into_shards(
            self._tensors,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=largest.default,
        )
        self._index = split.metadata if split.is_sharded else None
        self._file_of: dict[str, str] = dict(split.tensor_to_filename)
        self._headers: dict[str, bytes] = {}
        self._starts: dict[str, int] = {}
        for file, names in split.filename_to_tensors.items():
            described = {name: self._described(name) for name in sorted(names)}
            described = dict(sorted(described.items(), key=lambda entry: _ORDER.index(entry[1][0])))
            self._headers[file], starts = header_of(described, _METADATA)
            self._starts |= starts
        self._digests: dict[str, str] = {}
        self._whole: set[str] = set()
        self._begun = False
        self._open: dict[str, BinaryIO] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Shards":
        require_partial(self.folder)
        try:
            with told(self.folder, looking=True):
                self.folder.mkdir(exist_ok=True)
                self._begin()
        except BaseException:
            self._abandon(True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._abandon(kind is not None)

    def _abandon(self, failed: bool) -> None:
        """Close the files; of what was begun here and has nothing to go on with, nothing stays."""
        if failed and self._begun and not self._whole:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._stack.close()

    @property
    def whole(self) -> int:
        """Pieces that are there."""
        return len(self._whole)

    def has(self, piece: str) -> bool:
        """Whether a piece is written whole."""
        return piece in self._whole

    def put(self, piece: str, tensors: Mapping[str, Tensor]) -> None:
        """Write all tensors of a piece, and take note of it.

        Raises:
            ModelError: one is not what was announced; names it.
            WriteError: the system refuses.
        """
        digests = {}
        for name, tensor in tensors.items():
            wanted = self._tensors[name]
            if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
                raise ModelError(
                    f"{name} is {tuple(tensor.shape)} {tensor.dtype}, where {tuple(wanted.shape)} "
                    f"{wanted.dtype} should be: the checkpoint is not what its config.json says"
                )
            content = _bytes(tensor)
            digests[name] = hashlib.sha256(content).hexdigest()
            with told(self.folder):
                file = self._open[self._file_of[name]]
                file.seek(self._starts[name])
                file.write(content)
        with told(self.folder):
            for file in self._open.values():
                file.flush()
            self._note({"piece": piece, "sha256": digests})
        self._digests |= digests
        self._whole.add(piece)

    def intact(self, name: str) -> bool:
        """Whether the file has, at a tensor's place, what was written there; reads it again."""
        return self._digest(name) == self._digests.get(name)

    def finish(self, parameters: int) -> None:
        """Write the index, if there are several files, and have the system write all of it.

        Args:
            parameters: of the model, for the index.

        Raises:
            ModelError: tensors are missing.
        """
        missing = self._tensors.keys() - self._digests.keys()
        if missing:
            raise ModelError(f"{len(missing)} weights were not written, {min(missing)} among them")
        if self._index is not None:
            index = {
                "metadata": {"total_parameters": parameters, **self._index},
                "weight_map": self._file_of,
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            with told(self.folder):
                (self.folder / _INDEX).write_text(text, encoding="utf-8")
        with told(self.folder):
            for file in self._open.values():
                os.fsync(file.fileno())

    def _described(self, name: str) -> tuple[str, int, tuple[int, ...]]:
        tensor = self._tensors[name]
        code = _CODES.get(tensor.dtype)
        if code is None:
            raise ModelError(f"{name}: safetensors files have no {tensor.dtype}")
        return code, tensor.element_size(), tuple(tensor.shape)

    def _begin(self) -> None:
        try:
            lock = hold(self.folder)
        except OSError:  # no locks here
            lock = None
        else:
            if lock is None:
                raise RankoptError(
                    f"{self.folder} is being written by another process: wait for it"
                )
            self._stack.callback(os.close, lock)
        noted = self._journal()
        # Of a run that was killed when all was done.
        (self.folder / LIST_OF_FILES).unlink(missing_ok=True)
        if noted is None:
            self._begun = True
            with whole_file(self.folder / JOURNAL) as temporary:
                about = {"format": PARTIAL, "settings": self._settings}
                temporary.write_text(json.dumps(about), encoding="utf-8")
        needed = sum(self._size(file) for file in self._headers)
        needed -= sum(_blocks(self.folder / file) for file in self._headers)
        free = os.statvfs(self.folder)
        if needed > free.f_bavail * free.f_frsize:
            raise WriteError(
                f"cannot write {self.folder}: the weights need {needed / 1e9:,.1f} GB, and "
                f"{free.f_bavail * free.f_frsize / 1e9:,.1f} GB are free: make room, or name a "
                "place elsewhere"
            )
        for file, header in self._headers.items():
            self._open[file] = self._stack.enter_context(_laid_out(self.folder / file, header))
            self._open[file].truncate(self._size(file))
        for piece, digests in (noted or {}).items():
            if all(self._digest(name) == digest for name, digest in digests.items()):
                self._digests |= digests
                self._whole.add(piece)
        if self._whole:
            tqdm.write(
                f"going on after {len(self._whole)} pieces of the model ({self.folder})",
                file=sys.stderr,
            )

    def _journal(self) -> dict[str, dict[str, str]] | None:
        """Piece -> its tensors' sha256; None if nothing is there."""
        path = self.folder / JOURNAL
        if not path.exists():
            return None
        first, *lines = path.read_text(encoding="utf-8").split("\n")
        about = json.loads(first)
        other = [x for x in self._settings if about["settings"].get(x) != self._settings[x]]
        if other:
            raise RankoptError(
                f"{self.folder} was begun with another {', another '.join(other)}: give the same "
                "to go on, or delete it to start again"
            )
        found = {}
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                # The last one, where the process was killed.
                entry = json.loads(line)
                if entry["sha256"].keys() <= self._tensors.keys():
                    found[entry["piece"]] = entry["sha256"]
        return found

    def _note(self, entry: Mapping[str, Any]) -> None:
        with open(self.folder / JOURNAL, "a", encoding="utf-8") as file:
            # A line that a kill has cut short ends here.
            file.write("\n" + json.dumps(entry))

    def _size(self, file: str) -> int:
        ends = [
            self._starts[name] + _bytes_of(self._tensors[name])
            for name, where in self._file_of.items()
            if where == file
        ]
        return max([len(self._headers[file]), *ends])

    def _digest(self, name: str) -> str:
        """Sha256 of what the file has at a tensor's place."""
        file, digest = self._open[self._file_of[name]], hashlib.sha256()
        file.seek(self._starts[name])
        left = _bytes_of(self._tensors[name])
        while left:
            content = file.read(min(left, 2**24))
            if not content:
                break
            digest.update(content)
            left -= len(content)
        return digest.hexdigest()


def require_partial(folder: Path) -> None:
    """Refuse a folder that is not one to go on with; nothing is made or changed.

    Raises:
        RankoptError: it is a file, a link, or a folder of somebody else's.
    """
    with told(folder, looking=True):
        if not os.path.lexists(folder):
            return
        ours = folder.is_dir() and not folder.is_symlink()
        names = {path.name for path in folder.iterdir()} if ours else set()
        # Killed before there was a journal, or when there was one no more.
        early = all(name.startswith(MARK) for name in names)
        if ours and not early and format_of(folder / LIST_OF_FILES) != MODEL:
            try:
                first = (folder / JOURNAL).read_text(encoding="utf-8").split("\n")[0]
                about = json.loads(first)
                ours = about["format"] == PARTIAL and isinstance(about["settings"], dict)
            except (OSError, ValueError, KeyError, TypeError):
                ours = False
        if not ours:
            raise RankoptError(
                f"{folder} exists and is no model that rankopt has begun to write, or is damaged: "
                "it is not gone on with: move it, or name another folder"
            )


@contextlib.contextmanager
def _laid_out(path: Path, header: bytes) -> Iterator[BinaryIO]:
    """A file that begins with its header, for reading and writing."""
    if path.is_symlink():
        raise RankoptError(f"{path} is a link, and links are not followed: delete it")
    with open(path, "r+b" if path.exists() else "w+b") as file:
        if file.read(len(header)) != header:
            file.seek(0)
            file.write(header)
        yield file


def _bytes_of(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _blocks(path: Path) -> int:
    """Bytes that a file takes already."""
    return path.stat().st_blocks * 512 if path.exists() else 0
