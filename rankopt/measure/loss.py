"""The loss that is back-propagated: a model's own, or one that is given.

Both classes answer the same questions: what a batch looks like when it is ready, what can be
checked on the first one, how its loss goes backward through a collector, what it sums up to.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.errors import DataError, OptionError
from rankopt.measure.checks import check_examples, check_loss, check_terms
from rankopt.measure.collector import Collector
from rankopt.measure.estimators import EMPIRICAL, Estimator
from rankopt.measure.padding import masks_of, separated, warn_of_padding
from rankopt.model.tasks import (
    Batch,
    LossFunction,
    loss_terms,
    mean_loss,
    positions_of,
    prepare,
    task_of,
    to_device,
)


@dataclasses.dataclass(frozen=True)
class Summed:
    """The loss of a batch.

    Attributes:
        loss: sum over the terms.
        examples: in the batch.
        targets: terms.
        output: of the model, if the loss is its own.
    """

    loss: float
    examples: int
    targets: int
    output: Any = None


@dataclasses.dataclass(frozen=True)
class ModelLoss:
    """The model's own loss: a mean over the terms that its task has (see tasks).

    Attributes:
        task: see tasks.
        estimator: whose labels, and what is squared as one.
    """

    task: str
    estimator: Estimator = EMPIRICAL

    @property
    def name(self) -> str | None:
        """None: it is the model's."""
        return None

    def ready(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """The batch on the device, with labels where the model's padding is left out."""
        return prepare(self.task, batch, device)

    def check(self, model: nn.Module, modules: Mapping[str, nn.Module], ready: Batch) -> None:
        """Verify on a batch that the loss and the layers are what the sums take them for.

        Raises:
            ModelError: they are not; says in what.
        """
        warn_of_padding(model, ready)
        check_loss(model, self.task, ready)
        check_examples(model, modules, self.task, ready)
        if self.estimator.random:
            check_terms(model, self.task, ready)

    def backward(
        self, collector: Collector, model: nn.Module, ready: Batch, number: int
    ) -> tuple[int, int]:
        """Run a batch forward and backward; how many examples and targets it has."""
        if "second_moment" in collector.needs:
            ready = separated(model, self.task, ready)
        terms = loss_terms(self.task, ready["labels"])
        collector.begin(len(terms), positions_of(ready), masks_of(self.task, ready))
        for loss, again in self.estimator.losses(model, self.task, ready, number):
            collector.backward(loss, again=again)
        return len(terms), int(terms.sum())

    def summed(self, model: nn.Module, ready: Batch) -> Summed:
        """The loss of a batch, without its graph if there is none."""
        terms = loss_terms(self.task, ready["labels"])
        loss, output = mean_loss(model, ready)
        return Summed(float(loss.double() * terms.sum()), len(terms), int(terms.sum()), output)


@dataclasses.dataclass(frozen=True)
class GivenLoss:
    """A loss_fn: (model, batch) -> the loss of each example, ``(B,)``. Nothing of it is known.

    Raises:
        OptionError: an estimator that draws labels, or takes tokens apart.
    """

    function: LossFunction
    estimator: Estimator = EMPIRICAL
    task: str = "custom"

    def __post_init__(self) -> None:
        if self.estimator.random:
            raise OptionError(
                "loss_fn gives one loss for an example: labels cannot be drawn from it, nor tokens "
                "taken apart; use the empirical estimator per example"
            )

    @property
    def name(self) -> str | None:
        """Module and name of the function."""
        return name_of(self.function)

    def ready(self, batch: Any, device: torch.device) -> Any:
        """The batch on the device."""
        return to_device(batch, device)

    def check(self, model: nn.Module, modules: Mapping[str, nn.Module], ready: Any) -> None:
        """Nothing can be checked."""

    def backward(
        self, collector: Collector, model: nn.Module, ready: Any, number: int
    ) -> tuple[int, int]:
        """Run a batch forward and backward; how many examples and targets it has."""
        # How many examples there are is known only afterwards; taps need it in backward.
        collector.begin(0, 1, masks_of(self.task, ready) if isinstance(ready, Mapping) else ())
        losses = losses_of(self.function, model, ready)
        if not losses.requires_grad:
            raise DataError(
                "loss_fn(model, batch) must return losses with their graph; it returned a tensor "
                "with requires_grad=False (detached, or computed under no_grad)"
            )
        collector.expect(len(losses), 1)
        collector.backward(losses.sum())
        return len(losses), len(losses)

    def summed(self, model: nn.Module, ready: Any) -> Summed:
        """The loss of a batch, without its graph if there is none."""
        losses = losses_of(self.function, model, ready)
        return Summed(float(losses.double().sum()), len(losses), len(losses))


Loss = ModelLoss | GivenLoss


def find_loss(
    model: nn.Module, loss_fn: LossFunction | None, estimator: Estimator = EMPIRICAL
) -> Loss:
    """The given loss, or the model's own.

    Raises:
        ModelError: none is given, and the model has none that is known.
        OptionError: see GivenLoss.
    """
    if loss_fn is not None:
        return GivenLoss(loss_fn, estimator)
    return ModelLoss(task_of(model), estimator)


def name_of(function: Callable[..., object]) -> str:
    """Module and name of a user's function: a checkpoint goes on with the same one only."""
    return f"{function.__module__}.{getattr(function, '__qualname__', '')}"


def losses_of(function: LossFunction, model: nn.Module, batch: object) -> Tensor:
    """A user's losses, one for each example.

    Raises:
        DataError: another shape than ``(B,)``.
    """
    losses = function(model, batch)
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.numel():
        shape = isinstance(losses, Tensor) and f"a tensor of shape {tuple(losses.shape)}"
        raise DataError(
            "loss_fn(model, batch) must return the loss of each example, summed over its terms, "
            f"as a tensor of shape (B,); it returned {shape or type(losses).__name__}"
        )
    return losses
