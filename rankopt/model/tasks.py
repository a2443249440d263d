"""Tasks: what a model's own loss is a mean of.

transformers' models return a mean: over predicted tokens, over examples, or over numbers. Fisher
information needs the loss of one example, summed over its terms, so the mean is multiplied by the
number of its terms, which depends on the task (and, for causal language models, on the shift of
the labels that the model itself does). ``check_loss`` verifies the assumption on real data.

The loss of every term is a negative log-likelihood, up to a constant: of a class (cross-entropy),
of several yes-or-no answers, or of a number under a normal distribution of variance 1/2 (squared
error). ``term_losses`` and ``draw_labels`` state that likelihood.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from rankopt.errors import DataError, ModelError

Batch = Mapping[str, Any]
#: (model, batch) -> loss of each example, shape (B,), for models whose own loss is not known.
LossFunction = Callable[[nn.Module, Any], Tensor]
IGNORED = -100

_ENDINGS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}
#: Tasks with a label at every position.
_OF_TOKENS = ("causal-lm", "seq2seq-lm", "masked-lm", "token-classification")


def task_of_architecture(architecture: str) -> str:
    """The task by the ending of a transformers class name.

    Raises:
        ModelError: the class has no head with a loss that is known here.
    """
    for ending, task in _ENDINGS.items():
        if architecture.endswith(ending):
            return task
    raise ModelError(
        f"{architecture} has no head whose loss is known; known endings: {', '.join(_ENDINGS)}; in "
        "Python, profile_model(..., loss_fn=...) takes the loss of any module"
    )


def task_of(model: nn.Module) -> str:
    """The task of a model; a classifier of one output is a regression, unless it says otherwise."""
    task = task_of_architecture(type(model).__name__)
    if task not in ("sequence-classification", "image-classification"):
        return task
    kind = getattr(model.config, "problem_type", None)
    if kind is None and getattr(model.config, "num_labels", 2) == 1:
        kind = "regression"
    return "regression" if kind == "regression" else task


def loss_terms(task: str, labels: Tensor) -> Tensor:
    """How many terms of the mean each example has; labels ``(B, ...)`` -> ``(B,)``."""
    if task == "causal-lm":
        return (labels[:, 1:] != IGNORED).sum(1)
    if task in _OF_TOKENS:
        return (labels != IGNORED).sum(1)
    return torch.full((len(labels),), labels[0].numel(), device=labels.device)


def prepare(task: str, batch: Batch, device: torch.device) -> dict[str, Any]:
    """A batch on the device, with labels where the model's padding is left out.

    Causal language models may omit ``labels``: they are the input itself. Labels of padding
    (attention_mask 0) are ignored, so that padding is never learnt from.

    Raises:
        DataError: no labels, or nothing to predict.
    """
    ready = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    if "labels" not in ready:
        if task != "causal-lm" or "input_ids" not in ready:
            raise DataError(f"a batch needs 'labels', it has: {', '.join(ready)}")
        ready["labels"] = ready["input_ids"]
    labels, mask = ready["labels"], ready.get("attention_mask")
    inputs_too = task in _OF_TOKENS and task != "seq2seq-lm"
    if mask is not None and inputs_too and labels.shape == mask.shape:
        ready["labels"] = labels.masked_fill(mask == 0, IGNORED)
    if not bool((loss_terms(task, ready["labels"]) > 0).all()):
        raise DataError("an example has nothing to predict: it is too short or all labels ignored")
    return ready


def positions_of(batch: Batch) -> int:
    """Positions of each example, 1 if it has none."""
    ids = batch.get("input_ids")
    return int(ids.shape[1]) if isinstance(ids, Tensor) and ids.dim() > 1 else 1


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors on the device, also those inside dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [to_device(item, device) for item in value]
        # A named tuple takes its fields one by one.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def mean_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
    """The model's own loss and its full output.

    Raises:
        ModelError: the model returned no loss.
    """
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    output = model(**batch, **extra)
    if getattr(output, "loss", None) is None:
        raise ModelError(f"{type(model).__name__} returned no loss for labels")
    return output.loss, output


def term_losses(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of every term, in float32 or wider; 0 where the label is ignored.

    Args:
        task: see task_of.
        logits: as the model returns them, ``(B, ..., classes)`` or ``(B, numbers)``.
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
    logits, labels = _aligned(task, logits, labels)
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
    aligned, targets = _aligned(task, logits, labels)
    chances = aligned.flatten(0, -2).softmax(-1)
    drawn = torch.multinomial(chances, 1, generator=generator).reshape(targets.shape)
    drawn = torch.where(targets == IGNORED, targets, drawn)
    return torch.cat([labels[:, :1], drawn], 1) if task == "causal-lm" else drawn


def _aligned(task: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Causal language models predict the next token; all others the label at the same place."""
    return (logits[:, :-1], labels[:, 1:]) if task == "causal-lm" else (logits, labels)


def rows_of(batch: Batch, rows: slice) -> dict[str, Any]:
    """Some examples of a batch."""
    size = (len(batch["labels"]),)
    return {
        name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == size else value
        for name, value in batch.items()
    }
