"""What a model was measured on, as a digest."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def digest_of(value: Any) -> str:
    """sha256 of a batch: of its tensors, and of texts and numbers, in any nesting."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous()
        digest.update(f"{array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            digest.update(f"{name} ".encode())
            _update(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} ".encode())
        for item in value:
            _update(digest, item)
    elif isinstance(value, np.ndarray):
        _update(digest, torch.from_numpy(np.ascontiguousarray(value)))
    elif isinstance(value, str | bytes | int | float | None):
        # Texts that a loss_fn tokenises are data too; what else there may be has no stable form.
        digest.update(f"{value!r} ".encode())
