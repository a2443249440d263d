"""How far a model's predictions are from those of the dense one.

The loss of a target is KL(p || q) = sum over classes of p (log p - log q), p of the dense model and
q of the compressed one: what the likelihood of labels drawn from the dense model loses, in nats.
Yes-or-no answers have two classes each. A regression's numbers have the squared error, which is
what that is for normal distributions of variance 1/2. Targets are the terms of the task's own loss,
so padding and ignored labels are none.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rankopt.errors import ModelError
from rankopt.measure.loss import Loss
from rankopt.model.inputs import IGNORED, limits_of
from rankopt.model.likelihood import aligned, likelihood
from rankopt.model.tasks import Batch, in_eval, mean_loss, task_of, to_device
from rankopt.model.weights import device_of

#: Number of a batch, and the batch as it is ready -> the dense model's logits.
DenseLogits = Callable[[int, Batch], Tensor]


def divergences(task: str, logits: Tensor, dense: Tensor, labels: Tensor) -> Tensor:
    """The loss of every target, in float32 or wider, shape ``(targets,)``.

    Args:
        task: see tasks.
        logits: of the compressed model, as term_losses takes them.
        dense: of the dense model, likewise.
        labels: as prepare returns them; only which are ignored is read.
    """
    kept = torch.promote_types(logits.dtype, torch.float32)
    # A small divergence is what is left of larger terms; a vocabulary is too wide for float64.
    wide = kept if task.endswith("-lm") else torch.float64
    logits, dense = logits.to(wide), dense.to(wide)
    if task == "regression":
        return (logits - dense).square().flatten().to(kept)
    if labels.is_floating_point():
        chance = dense.sigmoid()
        yes = chance * (logsigmoid(dense) - logsigmoid(logits))
        no = (1.0 - chance) * (logsigmoid(-dense) - logsigmoid(-logits))
        return (yes + no).flatten().to(kept)
    logits, targets = aligned(task, logits, labels)
    dense, _ = aligned(task, dense, labels)
    counted = targets != IGNORED
    q, p = logits[counted].log_softmax(-1), dense[counted].log_softmax(-1)
    # What a model never predicts (-inf) is no term.
    return (p.exp() * (p - q).masked_fill(p == -torch.inf, 0.0)).sum(-1).to(kept)


def logits_of(model: nn.Module, ready: Batch) -> tuple[Tensor, Any]:
    """Of a prepared batch, and the whole output."""
    _, output = mean_loss(model, to_device(ready, device_of(model)))
    return output.logits, output


def distillable(task: str, output: Any, labels: Tensor) -> bool:
    """Whether a model's output has logits for its labels."""
    return likelihood(task, output, labels.to(output.logits.device)) is not None


def divergence(model: nn.Module, dense: nn.Module, task: str, ready: Batch) -> Tensor:
    """The loss of every target of a batch, with its graph; see divergences."""
    with torch.no_grad():
        target, _ = logits_of(dense, ready)
    logits, _ = logits_of(model, ready)
    return divergences(task, logits, target.to(logits.device), ready["labels"].to(logits.device))


@torch.no_grad()
def kept_logits(dense: nn.Module, batches: Iterable[Any], loss: Loss) -> DenseLogits | None:
    """Logits of every batch, in main memory, to measure the divergence of many models from.

    Args:
        dense: in eval mode while it runs.
        batches: held-out data.
        loss: the model's own, settled.

    Returns:
        None of language models, whose logits are as many as targets times tokens of the
        vocabulary, and where the output has no logits for its labels.
    """
    if loss.task.endswith("-lm"):
        return None
    device, found = device_of(dense), list[Tensor]()
    with in_eval(dense):
        for number, batch in enumerate(batches):
            ready = loss.ready(batch, device, number)
            logits, output = logits_of(dense, ready)
            if not distillable(loss.task, output, ready["labels"]):
                return None
            found.append(logits.cpu())
    return lambda number, ready: found[number]


def require_alike(model: nn.Module, dense: nn.Module) -> None:
    """Refuse a dense model whose predictions are of something else.

    Raises:
        ModelError: another task, vocabulary or number of labels; says which.
    """
    task, of_dense = task_of(model), task_of(dense)
    named = ("tokens", "classes", "answers")
    ours, theirs = limits_of(model, task), limits_of(dense, task)
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in named}
    different = [
        f"it has {its} {name}, not {own}"
        for name, (own, its) in pairs.items()
        if None not in (own, its) and own != its
    ]
    if task != of_dense:
        different = [f"its task is {of_dense}, not {task}"]
    if different:
        raise ModelError(
            f"the dense model is not what the model was compressed from: {'; '.join(different)}"
        )


def divergence_of(task: str, output: Any, dense: Tensor, labels: Tensor) -> float:
    """The loss of a batch, summed over its targets.

    Args:
        task: see tasks.
        output: of the compressed model.
        dense: logits of the dense model.
        labels: as prepare returns them.

    Raises:
        ModelError: the models have logits of different shapes, or none for these labels.
    """
    if not distillable(task, output, labels):
        raise ModelError(
            f"no divergence of a {type(output).__name__} can be measured: it has no logits for its "
            "labels; leave the dense model out"
        )
    logits = output.logits
    if logits.shape != dense.shape:
        raise ModelError(
            f"logits of this model have the shape {tuple(logits.shape)}, of the dense one "
            f"{tuple(dense.shape)}: give the model that it was compressed from"
        )
    each = divergences(task, logits, dense.to(logits.device), labels)
    return float(each.sum(dtype=torch.float64))
