"""The likelihood that a task's loss states: its terms, draws, entropy and Fisher information.

The loss of every term is a negative log-likelihood, up to a constant: of a class (cross-entropy),
of several yes-or-no answers, or of a number under a normal distribution of variance 1/2 (squared
error).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from rankopt.model.inputs import IGNORED, OF_TOKENS


def likelihood(task: str, output: Any, labels: Tensor) -> Tensor | None:
    """``term_losses`` of a model's output, ``(B, terms)``; None if it has no logits for them."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        return None
    if task in ("regression", "multi-label-classification"):
        alike = logits.numel() == labels.numel()
    elif task in OF_TOKENS and logits.dim() == 2:
        alike = labels.dim() == 2 and len(logits) == int((labels != IGNORED).sum())
    elif task in OF_TOKENS:
        alike = logits.dim() == 3 and labels.dim() == 2 and len(logits) == len(labels)
        alike = alike and logits.shape[1] >= labels.shape[1]
    else:
        alike = logits.dim() == 2 and len(logits) == len(labels)
    inside = labels.is_floating_point() or int(labels.max()) < logits.shape[-1]
    return term_losses(task, logits, labels) if alike and inside else None


def term_losses(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of every term, in float32 or wider; 0 where the label is ignored.

    Args:
        task: see task_of.
        logits: as the model returns them, ``(B, ..., classes)`` or ``(B, numbers)``; of tokens,
            also only those that have a label, ``(targets, classes)``.
        labels: as prepare returns them.

    Returns:
        Shape ``(B, terms)``.
    """
    logits, size = logits.to(torch.promote_types(logits.dtype, torch.float32)), len(labels)
    if task == "regression":
        return (logits.reshape(size, -1) - labels.reshape(size, -1).to(logits.dtype)).square()
    if labels.is_floating_point():
        targets = labels.to(logits.dtype)
        answers: Tensor = binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return answers
    logits, labels = aligned(task, logits, labels)
    losses = cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.reshape(size, -1)


@torch.no_grad()
def draw_labels(task: str, logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Labels drawn from the model's own distribution, where there are labels; shaped like labels.

    Tokens are drawn one by one given the true text before them, not as a text of their own.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if task == "regression":
        noise = torch.randn(
            logits.shape, generator=generator, device=logits.device, dtype=logits.dtype
        )
        numbers: Tensor = logits + noise * 0.5**0.5
        return numbers.reshape(labels.shape)
    if labels.is_floating_point():
        drawn = torch.bernoulli(logits.sigmoid(), generator=generator)
        return drawn.to(labels.dtype)
    scores, targets = aligned(task, logits, labels)
    chances = scores.flatten(0, -2).softmax(-1)
    drawn = torch.multinomial(chances, 1, generator=generator).reshape(targets.shape)
    drawn = torch.where(targets == IGNORED, targets, drawn)
    return torch.cat([labels[:, :1], drawn], 1) if task == "causal-lm" else drawn


def aligned(task: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Causal language models predict the next token; all others the label at the same place."""
    if task in OF_TOKENS and logits.dim() == 2:
        counted = labels != IGNORED
        whole = logits.new_zeros(*labels.shape, logits.shape[-1])
        logits = whole.index_put((counted,), logits)
    elif task in OF_TOKENS:
        # Pictures or prompts may stand before the text.
        logits = logits[:, -labels.shape[1] :]
    return (logits[:, :-1], labels[:, 1:]) if task == "causal-lm" else (logits, labels)


@torch.no_grad()
def entropies(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """What the model itself expects each of ``term_losses`` to be; 0 where the label is ignored.

    Args:
        task: not a regression: what its loss is depends on the unit of the numbers.
        logits: as for term_losses.
        labels: only where they are ignored is looked at.

    Returns:
        Shape ``(B, terms)``, nats.
    """
    if labels.is_floating_point():
        chances = torch.stack([logits.double().sigmoid(), (-logits.double()).sigmoid()])
        both: Tensor = torch.special.entr(chances)
        return both.sum(0)
    logits, labels = aligned(task, logits, labels)
    # One example at a time: probabilities of a vocabulary are large.
    found = torch.stack([_entropy(each) for each in logits])
    return found.masked_fill(labels == IGNORED, 0.0).reshape(len(labels), -1)


def _entropy(logits: Tensor) -> Tensor:
    """Of classes, over the last dimension: log sum exp z - E[z]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # What has no chance may have the logit -inf.
    finite = logits.clamp_min(torch.finfo(logits.dtype).min)
    mean: Tensor = torch.linalg.vecdot(logits.softmax(-1), finite)
    return logits.logsumexp(-1) - mean


@torch.no_grad()
def fisher_roots(task: str, logits: Tensor) -> Iterator[Tensor]:
    """The Fisher information of each example's outputs, F, as a sum of few squares.

    F is the expectation of g g^T over the labels that the model itself would draw, g the gradient
    of the example's loss with respect to its outputs. It is 2 for each number of variance 1/2, and
    p (1 - p) for each yes or no. Of one of C classes it is diag(p) - p p^T; the columns here are
    those of its Cholesky factor (Tanabe & Sagae, J. R. Statist. Soc. B 54, 1992, theorem 1): class
    k or a later one is a yes-or-no question, weighted with the chance that it comes to that. So
    there is one fewer than classes, and one for two.

    Args:
        task: with one target an example, or several that are independent; none of tokens.
        logits: ``(B, outputs)``.

    Yields:
        a_k, shape ``(B, outputs)``, float64; sum_k a_k a_k^T = F. At least one.
    """
    assert task not in OF_TOKENS
    logits = logits.double()
    count = logits.shape[1]
    if task in ("regression", "multi-label-classification"):
        spread = torch.full_like(logits, 2.0)
        if task != "regression":
            # 1 - p would be rounded to 0.
            spread = logits.sigmoid() * (-logits).sigmoid()
        for k in range(count):
            yield spread.sqrt() * (torch.arange(count, device=logits.device) == k)
        return
    chances = logits.softmax(-1)
    # Chance of class k or a later one, and of none at the end.
    reached = torch.cat([chances.flip(-1).cumsum(-1).flip(-1), torch.zeros_like(chances[:, :1])], 1)
    for k in range(max(count - 1, 1)):
        chance, later = chances[:, k], reached[:, k + 1]
        spread = (chance * (later / reached[:, k])).sqrt()
        column = torch.zeros_like(chances)
        column[:, k] = spread
        column[:, k + 1 :] = -spread.unsqueeze(1) * chances[:, k + 1 :] / later.unsqueeze(1)
        # 0/0 where it never comes to that.
        yield column.masked_fill(((chance == 0.0) | (later == 0.0)).unsqueeze(1), 0.0)
