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
from rankopt.measure.checks import (
    check_apart,
    check_examples,
    check_likelihood,
    check_loss,
    stated_losses,
)
from rankopt.measure.collector import Collector
from rankopt.measure.estimators import EMPIRICAL, Estimator
from rankopt.measure.layout import Frames, Layout
from rankopt.measure.padding import (
    Run,
    any_padding,
    frames_of,
    masks_of,
    sides_of,
    warn_of_rows,
    warn_of_unmasked,
)
from rankopt.model.inputs import OF_TOKENS, UNKNOWN, Limits, limits_of
from rankopt.model.likelihood import entropies, likelihood
from rankopt.model.tasks import (
    Batch,
    LossFunction,
    loss_terms,
    mean_loss,
    off,
    positions_of,
    prepare,
    rows_of,
    settled,
    task_of,
    to_device,
    tolerance,
)
from rankopt.model.weights import device_of


@dataclasses.dataclass(frozen=True)
class Summed:
    """The loss of a batch.

    Attributes:
        loss: sum over the terms.
        examples: in the batch.
        targets: terms.
        output: of the model, if the loss is its own.
        entropy: what the model itself expects the loss to be; None where that was not asked, or is
            not known.
        losses: of each example, ``(B,)``; None if they were not asked for.
        terms: how many of the targets are each example's, ``(B,)``, with the losses.
    """

    loss: float
    examples: int
    targets: int
    output: Any = None
    entropy: float | None = None
    losses: Tensor | None = None
    terms: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class ModelLoss:
    """The model's own loss: a mean over the terms that its task has (see tasks).

    Attributes:
        task: see tasks.
        estimator: whose labels, and what is squared as one.
        terms: the task whose terms are counted, where the first batch has told; see settled.
        fits: the likelihood of the task is the model's own loss, as far as is known.
        limits: of token ids and labels.
        why: the estimator is what it is, where that was left open.

    Raises:
        OptionError: labels are to be enumerated that an example has too many of.
    """

    task: str
    estimator: Estimator = EMPIRICAL
    terms: str = ""
    fits: bool = False
    limits: Limits = UNKNOWN
    why: str | None = None

    def __post_init__(self) -> None:
        if self.estimator.kind == "expected" and self.task in OF_TOKENS:
            raise OptionError(
                "the expected estimator goes through all labels of an example, and "
                f"{self.task} has one at every position: use the sampled estimator, which draws "
                "them"
            )

    @property
    def name(self) -> str | None:
        """None: it is the model's."""
        return None

    def settled(self, model: nn.Module, batch: Any) -> "ModelLoss":
        """With what only the first batch can tell.

        Raises:
            ModelError: the estimator needs a likelihood, and there is none that is known.
        """
        if self.terms:
            return self
        terms, fits, outputs = settled(model, self.task, batch)
        estimator, why = self.estimator.chosen(terms, outputs)
        if estimator.stated and not fits:
            check_likelihood(model, terms, self.ready(batch, device_of(model)))
        return dataclasses.replace(
            self,
            estimator=estimator,
            why=why,
            # Who shifts the labels of a language model is nobody else's business.
            task=self.task if self.task.endswith("-lm") else terms,
            terms=terms,
            fits=fits,
            limits=limits_of(model, terms),
        )

    @property
    def _counted(self) -> str:
        return self.terms or self.task

    def ready(self, batch: Any, device: torch.device, number: int = 0) -> dict[str, Any]:
        """The batch on the device, with labels where the model's padding is left out."""
        return prepare(self._counted, batch, device, number, self.limits)

    def check(self, model: nn.Module, modules: Mapping[str, nn.Module], ready: Batch) -> None:
        """Verify on a batch that the loss and the layers are what the sums take them for.

        Raises:
            ModelError: they are not; says in what.
        """
        warn_of_rows(model, ready)
        if self.fits:
            tokens = positions_of(ready)
            check_apart(model, modules, tokens, lambda: stated_losses(model, self._counted, ready))
            return
        check_loss(model, self._counted, ready)
        check_examples(model, modules, self._counted, ready)

    def look(self, collector: Collector, model: nn.Module, ready: Batch) -> None:
        """Run what ``backward`` runs on the first batch with padding, if this is one."""
        run = lambda each: mean_loss(model, each)  # noqa: E731
        _look(collector, model, self._counted, run, ready)

    def backward(self, collector: Collector, model: nn.Module, ready: Batch, number: int) -> Summed:
        """Run a batch forward and backward; its loss, and the entropy where labels are given."""
        task, labels = self._counted, ready["labels"]
        terms = loss_terms(task, labels)
        _begin(collector, model, task, lambda each: mean_loss(model, each), ready, len(terms))
        found = mean_loss(model, ready)
        entropy = None
        if self.fits and self.estimator.kind == "empirical" and task != "regression":
            entropy = float(entropies(task, found[1].logits, labels).sum(dtype=torch.float64))
        losses = self.estimator.losses(model, task, found, labels, number, fits=self.fits)
        for loss, again in losses:
            collector.backward(loss, again=again)
        total = float(found[0].detach().double() * terms.sum())
        return Summed(total, len(terms), int(terms.sum()), entropy=entropy)

    def summed(self, model: nn.Module, ready: Batch, *, apart: bool = False) -> Summed:
        """The loss of a batch, without its graph if there is none; of each example if asked."""
        terms = loss_terms(self._counted, ready["labels"])
        loss, output = mean_loss(model, ready)
        total = loss.double() * terms.sum()
        if self.fits and torch.finfo(loss.dtype).bits < 32:
            # A mean of few digits; its terms have more.
            stated = likelihood(self._counted, output, ready["labels"])
            total = total if stated is None else stated.sum(dtype=torch.float64)
        found = Summed(float(total), len(terms), int(terms.sum()), output)
        if not apart:
            return found
        different, stated = off(self._counted, loss, output, ready["labels"])
        if stated is not None and different <= tolerance(model):
            each = stated.sum(1, dtype=torch.float64)
        else:
            # A mean of which no terms are known: of one example after the other.
            parts = [rows_of(ready, slice(n, n + 1)) for n in range(len(terms))]
            each = torch.stack([mean_loss(model, part)[0].double() for part in parts]) * terms
        return dataclasses.replace(found, losses=each, terms=terms)


@dataclasses.dataclass(frozen=True)
class GivenLoss:
    """A loss_fn: (model, batch) -> the loss of each example, ``(B,)``. Nothing of it is known.

    Raises:
        OptionError: an estimator that draws or enumerates labels, or takes tokens apart.
    """

    function: LossFunction
    estimator: Estimator = EMPIRICAL
    task: str = "custom"
    why: str | None = None

    def __post_init__(self) -> None:
        if self.estimator.stated:
            raise OptionError(
                "loss_fn gives one loss for an example: labels cannot be drawn from it, nor tokens "
                "taken apart; use the empirical estimator per example"
            )

    @property
    def name(self) -> str | None:
        """Module and name of the function."""
        return name_of(self.function)

    def settled(self, model: nn.Module, batch: Any) -> "GivenLoss":
        """Itself: a batch tells nothing more."""
        return self

    def ready(self, batch: Any, device: torch.device, number: int = 0) -> Any:
        """The batch on the device."""
        return to_device(batch, device)

    def check(self, model: nn.Module, modules: Mapping[str, nn.Module], ready: Any) -> None:
        """Verify on a batch that examples are apart, in the layers and in the loss.

        Raises:
            ModelError: they are not; names the layer.
        """
        check_apart(model, modules, 1, lambda: losses_of(self.function, model, ready))

    def look(self, collector: Collector, model: nn.Module, ready: Any) -> None:
        """Run what ``backward`` runs on the first batch with padding, if this is one."""
        if isinstance(ready, Mapping):
            run = lambda each: self.function(model, each)  # noqa: E731
            _look(collector, model, self.task, run, ready)

    def backward(self, collector: Collector, model: nn.Module, ready: Any, number: int) -> Summed:
        """Run a batch forward and backward; its loss."""
        # How many examples there are is known only afterwards; taps need it in backward.
        if isinstance(ready, Mapping):
            _begin(collector, model, self.task, lambda each: self.function(model, each), ready, 0)
        else:
            collector.begin(0, 1)
        losses = losses_of(self.function, model, ready)
        if not losses.requires_grad:
            raise DataError(
                "loss_fn(model, batch) must return losses with their graph; it returned a tensor "
                "with requires_grad=False (detached, or computed under no_grad)"
            )
        collector.expect(len(losses), 1)
        collector.backward(losses.sum())
        return Summed(float(losses.detach().double().sum()), len(losses), len(losses))

    def summed(self, model: nn.Module, ready: Any, *, apart: bool = False) -> Summed:
        """The loss of a batch, without its graph if there is none; of each example if asked."""
        losses = losses_of(self.function, model, ready)
        found = Summed(float(losses.double().sum()), len(losses), len(losses))
        if not apart:
            return found
        return dataclasses.replace(found, losses=losses, terms=torch.ones_like(losses))


Loss = ModelLoss | GivenLoss


def _begin(
    collector: Collector, model: nn.Module, task: str, run: Run, ready: Batch, examples: int
) -> None:
    """Announce a batch to the collector, with its padding; look for whose it is if need be."""
    masks, frames, tokens = _look(collector, model, task, run, ready)
    collector.begin(examples, tokens, masks, frames)


def _look(
    collector: Collector, model: nn.Module, task: str, run: Run, ready: Batch
) -> tuple[list[Tensor | None], Frames | None, int]:
    """Padding masks of a batch, their frames, its positions; on the first batch whose they are."""
    masks = masks_of(model, task, ready)
    frames = frames_of(model, masks[0]) if any_padding(masks[:1]) else None
    tokens = 1 if task == "custom" else positions_of(ready)
    moments = collector.needs & {"second_moment", "gradient_moment"}
    if moments and collector.sides is None and any_padding(masks):
        collector.sides = sides_of(model, collector.modules, task, run, ready)
        rows = next(len(mask) for mask in masks if mask is not None)
        layout = Layout.of(rows, tokens, masks, collector.sides, frames)
        warn_of_unmasked(collector.modules, layout, run, ready)
    return masks, frames, tokens


def find_loss(
    model: nn.Module, loss_fn: LossFunction | None, estimator: Estimator = EMPIRICAL
) -> Loss:
    """The given loss, or the model's own.

    Raises:
        ModelError: none is given, and the model has none that is known.
        OptionError: see GivenLoss.
    """
    if loss_fn is not None:
        estimator, why = estimator.chosen("custom", 0)
        return GivenLoss(loss_fn, estimator, why=why)
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
