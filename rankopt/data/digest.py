"""What a model was measured on, as a digest: batches hashed in order, each onto the one before."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.model.inputs import limits_of, listed
from rankopt.model.tasks import Batch, prepare, settled, task_of
from rankopt.model.weights import device_of


def digest_of(value: Any) -> str:
    """sha256 of a batch: of its tensors, and of texts and numbers, in any nesting."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def chained(before: str, ready: Any) -> str:
    """The digest of all batches up to this one, from that of those before it ("" for none)."""
    return hashlib.sha256(f"{before} {digest_of(ready)}".encode()).hexdigest()


def data_digest(model: nn.Module, batches: Iterable[Batch]) -> str:
    """The digest that a profile of these batches has; runs the model on the first only.

    Args:
        model: with its own loss; its task says which labels are left out.
        batches: as profile_model takes them.
    """
    task, device, chain = task_of(model), device_of(model), ""
    for number, batch in enumerate(listed(batches)):
        if not number:
            task, *_ = settled(model, task, batch)
            limits = limits_of(model, task)
        chain = chained(chain, prepare(task, batch, device, number, limits))
    return chain


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
