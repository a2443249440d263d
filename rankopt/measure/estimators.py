"""Which Fisher information: whose labels, and what is squared as one.

``empirical``
    at the labels that are given. Cheap, and what FWSVD uses; not the Fisher information of the
    model's own distribution (Kunstner et al., Limitations of the Empirical Fisher, NeurIPS 2019).
``expected``
    the true Fisher information, the expectation over the labels that the model would draw: exactly,
    for tasks with one target an example or several that are independent. Everything that is
    measured is a sum over units of g g^T, g the gradients with respect to outputs, or quadratic in
    it, so labels need not be gone through one by one: the backward passes are as many as squares
    whose sum is the Fisher information of the outputs (``fisher_roots``), one fewer than classes.
``sampled``
    at labels drawn from the model, ``draws`` times for each unit: an unbiased estimate of that.
``auto``
    ``expected`` for numbers, yes-or-no answers and up to 16 classes, ``sampled`` for more of them
    and for the labels of tokens; ``empirical`` for language models and for losses of which no
    likelihood is known. Labels of fitted classifiers are predicted: their gradients are nearly
    zero, with (1 - p)^2 where the true Fisher information is near 1 - p, and are those of a few
    examples that the model has wrong. The text that a language model sees is not.

The unit is what one gradient belongs to before it is squared. ``example``: the sum of all terms of
an example. ``token``: each term by itself. With the model's own labels both have the same
expectation, because terms are independent. With given labels they have not; the terms are then
added with random signs, whose products vanish in expectation, so that one backward pass still
serves a whole example.

What is random depends on the seed and the batch's number alone: not on how batches are shared
among processes, nor on an interruption.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rankopt.errors import OptionError
from rankopt.measure.checks import no_plain_mean
from rankopt.model.inputs import OF_TOKENS
from rankopt.model.likelihood import draw_labels, fisher_roots, term_losses
from rankopt.model.tasks import loss_terms, off, tolerance

Kind = Literal["auto", "empirical", "expected", "sampled"]
Unit = Literal["example", "token"]

#: More outputs of an example are not gone through one by one unless that is asked for.
FEW_OUTPUTS = 16


@dataclasses.dataclass(frozen=True)
class Estimator:
    """How Fisher information is estimated.

    Attributes:
        kind: see above; ``auto`` until the task is known.
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
            which = "all labels" if self.kind == "expected" else "given labels"
            raise OptionError(
                f"draws={self.draws} with {which} would measure the same again: draws are for "
                "the sampled estimator, or the token unit"
            )

    @property
    def random(self) -> bool:
        """Whether anything is drawn."""
        return self.kind == "sampled" or (self.unit == "token" and self.kind != "expected")

    @property
    def stated(self) -> bool:
        """Whether the loss must be a likelihood that is known."""
        return self.kind in ("expected", "sampled") or self.unit == "token"

    def chosen(self, task: str, outputs: int) -> tuple["Estimator", str | None]:
        """With the kind that ``auto`` is for a task, and why; itself if it is something else.

        Args:
            task: see tasks.
            outputs: classes, answers or numbers of the likelihood; 0 if none is known.
        """
        if self.kind != "auto":
            return self, None
        kind, why = _choice(task, outputs)
        return dataclasses.replace(self, kind=kind), why

    def units(self, examples: int, targets: int) -> int:
        """What the sums over so many examples are divided by to be means."""
        return self.draws * (targets if self.unit == "token" else examples)

    def losses(
        self,
        model: nn.Module,
        task: str,
        found: tuple[Tensor, Any],
        labels: Tensor,
        number: int,
        *,
        fits: bool = False,
    ) -> Iterator[tuple[Tensor, bool]]:
        """Yield what is to be back-propagated: a sum over the units' losses.

        Args:
            model: with its own loss.
            task: see tasks.
            found: the mean loss of a batch, and the model's output.
            labels: of the batch, prepared.
            number: of the batch, for the seed.
            fits: the likelihood was the model's own loss on the first batch. Where that is seen at
                little cost, of labels of whole examples, it must be so on every batch.

        Yields:
            The loss, and whether another on the same graph follows.

        Raises:
            ModelError: it is not.
        """
        loss, output = found
        if fits and task not in OF_TOKENS:
            with torch.no_grad():
                apart, _ = off(task, loss, output, labels)
            if apart > tolerance(model):
                raise no_plain_mean(model, task)
        if not self.stated:
            yield loss * loss_terms(task, labels).sum(), False
            return
        logits: Tensor = output.logits
        if self.kind == "expected":
            yield from _enumerated(task, logits.reshape(len(labels), -1))
            return
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


def _choice(task: str, outputs: int) -> tuple[Kind, str]:
    if not outputs:
        return "empirical", "the loss is no likelihood that is known, whose labels could be drawn"
    if task == "token-classification":
        return "sampled", f"a label at every position: it is drawn {_FITTED}"
    if task in OF_TOKENS:
        return "empirical", "the labels of a language model are text, and not fitted"
    if outputs > FEW_OUTPUTS:
        what = f"{outputs} outputs, more than {FEW_OUTPUTS}: each label is drawn"
        return "sampled", f"{what} {_FITTED}"
    what = "1 output" if outputs == 1 else f"{outputs} outputs"
    return "expected", f"{what}: every label is weighed {_FITTED}"


_FITTED = "as the model predicts it, since the given ones may be fitted"


def _enumerated(task: str, logits: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """Losses whose squared gradients add up to the expectation over labels."""
    # An output that has no chance may be -inf.
    outputs = logits.to(torch.promote_types(logits.dtype, torch.float32))
    outputs = outputs.masked_fill(outputs.isneginf(), 0.0)
    roots = fisher_roots(task, logits)
    root = next(roots)
    for following in roots:
        yield (root.to(outputs.dtype) * outputs).sum(), True
        root = following
    yield (root.to(outputs.dtype) * outputs).sum(), False


#: What FWSVD uses, and what everything is measured with unless something else is asked for.
EMPIRICAL = Estimator()
