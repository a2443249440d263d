"""Checks of the first batch: that the loss and the layers are what the sums take them for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.errors import ModelError
from rankopt.measure.collector import Collector
from rankopt.model.tasks import (
    Batch,
    loss_terms,
    mean_loss,
    positions_of,
    rows_of,
    term_losses,
)


def check_examples(
    model: nn.Module, modules: Mapping[str, nn.Module], task: str, batch: Batch
) -> None:
    """Verify on two examples that each is seen as one: some layouts mix them unnoticed.

    Raises:
        ModelError: the Fisher information of both together is not that of each.
    """
    if len(batch["labels"]) < 2:
        return
    with Collector(model, modules) as probe:

        def total(rows: slice) -> Tensor:
            part = rows_of(batch, rows)
            terms = loss_terms(task, part["labels"])
            probe.begin(len(terms), positions_of(part))
            probe.backward(mean_loss(model, part)[0] * terms.sum())
            return probe.totals

        together = total(slice(0, 2))
        apart = total(slice(0, 1)) + total(slice(1, 2))
    precision = torch.finfo(next(model.parameters()).dtype).eps
    other = (together - apart).abs() > max(0.01, 32 * precision) * apart
    if bool(other.any()):
        name = list(modules)[int(other.nonzero()[0])]
        raise ModelError(
            f"layer {name}: the Fisher information of two examples together is not that of each by "
            "itself: which example an input belongs to is lost (batches not in the first "
            "dimension?); profile with batch size 1, or leave it out with exclude"
        )


def check_terms(model: nn.Module, task: str, batch: Batch) -> None:
    """Verify that the model's loss is the likelihood that term_losses states.

    Raises:
        ModelError: it is not (label smoothing, say).
    """
    with torch.no_grad():
        loss, output = mean_loss(model, batch)
        stated = term_losses(task, output.logits, batch["labels"]).sum()
        given = loss.double() * loss_terms(task, batch["labels"]).sum()
    precision = torch.finfo(next(model.parameters()).dtype).eps
    if abs(float(stated) - float(given)) > max(1e-4, 16 * precision) * abs(float(given)):
        raise ModelError(
            f"the loss of {type(model).__name__} is {float(given):.6g} for a batch where the "
            f"likelihood of {task} says {float(stated):.6g}: labels cannot be drawn from it, nor "
            "tokens taken apart; use the empirical estimator per example"
        )


def check_loss(model: nn.Module, task: str, batch: Batch, examples: int = 3) -> None:
    """Verify on a few examples that the loss is the mean that the task says.

    Raises:
        ModelError: the loss of the examples together is not that of each, weighted by its terms.
    """

    def total(part: dict[str, Any]) -> float:
        loss, _ = mean_loss(model, part)
        return float(loss.double() * loss_terms(task, part["labels"]).sum())

    size = len(batch["labels"])
    with torch.no_grad():
        together = total(rows_of(batch, slice(0, examples)))
        apart = sum(total(rows_of(batch, slice(n, n + 1))) for n in range(min(examples, size)))
    precision = torch.finfo(next(model.parameters()).dtype).eps
    if abs(together - apart) > max(1e-4, 16 * precision) * abs(apart):
        raise ModelError(
            f"the loss of {type(model).__name__} is not a plain mean over its {task} terms: "
            f"{together:.6g} for {examples} examples together, {apart:.6g} one by one. Fisher "
            "information per example cannot be read off it (auxiliary losses? weights per class?)"
        )
