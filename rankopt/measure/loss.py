"""What is back-propagated."""

import dataclasses

from torch import Tensor, nn

from rankopt.errors import DataError
from rankopt.measure.estimators import Estimator
from rankopt.model.tasks import (
    Batch,
    LossFunction,
)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is back-propagated.

    Attributes:
        task: see tasks, or ``custom``.
        estimator: whose labels, and what is squared as one.
        loss_fn: for ``custom``.
    """

    task: str
    estimator: Estimator
    loss_fn: LossFunction | None = None


def tokens_of(batch: Batch) -> int:
    """Positions of each example, 1 if it has none."""
    ids = batch.get("input_ids")
    return int(ids.shape[1]) if isinstance(ids, Tensor) and ids.dim() > 1 else 1


def losses_of(function: LossFunction, model: nn.Module, batch: object) -> Tensor:
    """A user's losses, one for each example.

    Raises:
        DataError: another shape than ``(B,)``.
    """
    losses = function(model, batch)
    fine = isinstance(losses, Tensor) and losses.dim() == 1 and losses.numel() > 0
    if not fine or not losses.requires_grad:
        given = (
            f"a tensor of shape {tuple(losses.shape)}, requires_grad={losses.requires_grad}"
            if isinstance(losses, Tensor)
            else type(losses).__name__
        )
        raise DataError(
            "loss_fn(model, batch) must return the loss of each example, summed over its terms, "
            f"as a tensor of shape (B,) with its graph; it returned {given}"
        )
    return losses
