"""Tasks: what a model's own loss is a mean of.

transformers' models return a mean: over predicted tokens, over examples, or over numbers. Fisher
information needs the loss of one example, summed over its terms, so the mean is multiplied by the
number of its terms, which depends on the task (and, for causal language models, on the shift of
the labels that the model itself does). ``check_loss`` verifies the assumption on real data.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.errors import DataError, ModelError

Batch = Mapping[str, Any]
IGNORED = -100

_ENDINGS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
}


def task_of_architecture(architecture: str) -> str:
    """The task by the ending of a transformers class name.

    Raises:
        ModelError: the class has no head with a loss that is known here.
    """
    for ending, task in _ENDINGS.items():
        if architecture.endswith(ending):
            return task
    raise ModelError(
        f"{architecture} has no head whose loss is known; known endings: {', '.join(_ENDINGS)}"
    )


def task_of(model: nn.Module) -> str:
    """The task of a model; a classifier with one output is a regression."""
    task = task_of_architecture(type(model).__name__)
    if task == "sequence-classification" and getattr(model.config, "num_labels", 2) == 1:
        return "regression"
    return task


def loss_terms(task: str, labels: Tensor) -> Tensor:
    """How many terms of the mean each example has; labels ``(B, ...)`` -> ``(B,)``."""
    if task == "causal-lm":
        return (labels[:, 1:] != IGNORED).sum(1)
    if task in ("seq2seq-lm", "masked-lm", "token-classification"):
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
    if mask is not None and task != "seq2seq-lm" and labels.shape == mask.shape:
        ready["labels"] = labels.masked_fill(mask == 0, IGNORED)
    if not bool((loss_terms(task, ready["labels"]) > 0).all()):
        raise DataError("an example has nothing to predict: it is too short or all labels ignored")
    return ready


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


def check_loss(model: nn.Module, task: str, batch: Batch, examples: int = 3) -> None:
    """Verify on a few examples that the loss is the mean that the task says.

    Raises:
        ModelError: the loss of the examples together is not that of each, weighted by its terms.
    """

    def total(part: dict[str, Any]) -> float:
        loss, _ = mean_loss(model, part)
        return float(loss.double() * loss_terms(task, part["labels"]).sum())

    size = len(batch["labels"])
    few = {k: _rows(v, slice(0, examples), size) for k, v in batch.items()}
    with torch.no_grad():
        together = total(few)
        apart = sum(
            total({k: _rows(v, slice(n, n + 1), size) for k, v in batch.items()})
            for n in range(min(examples, size))
        )
    precision = torch.finfo(next(model.parameters()).dtype).eps
    if abs(together - apart) > max(1e-4, 16 * precision) * abs(apart):
        raise ModelError(
            f"the loss of {type(model).__name__} is not a plain mean over its {task} terms: "
            f"{together:.6g} for {examples} examples together, {apart:.6g} one by one. Fisher "
            "information per example cannot be read off it (auxiliary losses? weights per class?)"
        )


def _rows(value: Any, rows: slice, size: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
