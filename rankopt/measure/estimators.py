"""Which Fisher information: whose labels, and what is squared as one.

``empirical``
    at the labels that are given. Cheap, and what FWSVD uses; not the Fisher information of the
    model's own distribution (Kunstner et al., Limitations of the Empirical Fisher, NeurIPS 2019).
``sampled``
    at labels drawn from the model, ``draws`` times for each unit: an unbiased estimate of the true
    Fisher information.

The unit is what one gradient belongs to before it is squared. ``example``: the sum of all terms of
an example. ``token``: each term by itself. With labels drawn from the model both have the same
expectation, because terms are independent. With given labels they have not; the terms are then
added with random signs, whose products vanish in expectation, so that one backward pass still
serves a whole example.

What is random depends on the seed and the batch's number alone: not on how batches are shared
among processes, nor on an interruption.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rankopt.errors import OptionError
from rankopt.measure.checks import no_plain_mean
from rankopt.model.inputs import OF_TOKENS
from rankopt.model.tasks import (
    Batch,
    draw_labels,
    loss_terms,
    mean_loss,
    off,
    term_losses,
    tolerance,
)

Kind = Literal["empirical", "sampled"]
Unit = Literal["example", "token"]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """How Fisher information is estimated.

    Attributes:
        kind: ``empirical`` or ``sampled``.
        unit: ``example`` or ``token``.
        draws: of labels, or of signs, for each example.
        seed: of everything random.

    Raises:
        OptionError: an unknown kind or unit, or draws where nothing is random.
    """

    kind: Kind = "empirical"
    unit: Unit = "example"
    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("estimator", self.kind, get_args(Kind)),
            ("unit", self.unit, get_args(Unit)),
        ):
            if value not in known:
                raise OptionError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if self.draws < 1:
            raise OptionError(f"draws must be at least 1, got {self.draws}")
        if self.draws > 1 and not self.random:
            raise OptionError(
                f"draws={self.draws} with given labels would measure the same again: draws are for "
                "the sampled estimator, or the token unit"
            )

    @property
    def random(self) -> bool:
        """Whether anything is drawn."""
        return self.kind == "sampled" or self.unit == "token"

    def units(self, examples: int, targets: int) -> int:
        """What the sums over so many examples are divided by to be means."""
        return self.draws * (targets if self.unit == "token" else examples)

    def losses(
        self, model: nn.Module, task: str, batch: Batch, number: int, *, fits: bool = False
    ) -> Iterator[tuple[Tensor, bool]]:
        """Run the model, and yield what is to be back-propagated: a sum over the units' losses.

        Args:
            model: with its own loss.
            task: see tasks.
            batch: prepared.
            number: of the batch, for the seed.
            fits: the likelihood was the model's own loss on the first batch. Where that is seen at
                little cost, of labels of whole examples, it must be so on every batch.

        Yields:
            The loss, and whether another on the same graph follows.

        Raises:
            ModelError: it is not.
        """
        loss, output = mean_loss(model, batch)
        labels = batch["labels"]
        if fits and task not in OF_TOKENS:
            with torch.no_grad():
                apart, _ = off(task, loss, output, labels)
            if apart > tolerance(model):
                raise no_plain_mean(model, task)
        if not self.random:
            yield loss * loss_terms(task, labels).sum(), False
            return
        logits: Tensor = output.logits
        generator = torch.Generator(logits.device)
        generator.manual_seed(1_000_003 * self.seed + number)
        for draw in range(self.draws):
            target = labels
            if self.kind == "sampled":
                target = draw_labels(task, logits.detach(), labels, generator)
            terms = term_losses(task, logits, target)
            if self.kind == "empirical":
                coins = torch.rand(terms.shape, generator=generator, device=terms.device)
                terms = torch.where(coins < 0.5, -terms, terms)
            yield terms.sum(), draw + 1 < self.draws


#: What FWSVD uses, and what everything is measured with unless something else is asked for.
EMPIRICAL = Estimator()
