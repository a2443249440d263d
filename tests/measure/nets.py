"""A small module of nobody's library, its data and its loss; and its Fisher rows by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rankopt import Profile, profile_model

Batch = tuple[Tensor, Tensor]


def data(count: int = 3, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 12, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


class Net(nn.Module):
    """Two layers and a head; ``between`` is what is done between the two."""

    def __init__(self, between: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.between(self, x)))
        return found


def measured(model: nn.Module, batches: Any = None, **options: Any) -> Profile:
    batches = data() if batches is None else batches
    return profile_model(model, batches, loss_fn=losses, progress=False, **options)


def left(profile: Profile) -> dict[str, str]:
    return {entry.name: entry.reason for entry in profile.info.left_alone}


def names(profile: Profile) -> list[str]:
    return [layer.name for layer in profile.info.layers]


def exact(model: nn.Module, name: str, batches: list[Batch]) -> np.ndarray:
    """Squared gradients of a weight by autograd, an example at a time, summed over outputs."""
    weight = model.get_parameter(f"{name}.weight")
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for x, labels in batches:
        for n in range(len(x)):
            loss = losses(model, (x[n : n + 1], labels[n : n + 1])).sum()
            total += torch.autograd.grad(loss, weight)[0].double().square().sum(0)
    return total.numpy()
