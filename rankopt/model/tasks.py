"""Tasks: what a model's own loss is a mean of.

transformers' models return a mean: over predicted tokens, over examples, or over numbers. Fisher
information needs the loss of one example, summed over its terms, so the mean is multiplied by the
number of its terms, which depends on the task (and, for causal language models, on who shifts the
labels: most heads do it themselves, BART's and its relatives' do not). ``settled`` finds that out
on the first batch, by comparing the model's loss with the likelihood.

The loss of every term is a negative log-likelihood, up to a constant: of a class (cross-entropy),
of several yes-or-no answers, or of a number under a normal distribution of variance 1/2 (squared
error). ``term_losses`` and ``draw_labels`` state that likelihood.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from rankopt.errors import DataError, ModelError
from rankopt.model.inputs import IGNORED as IGNORED
from rankopt.model.inputs import (
    OF_TOKENS,
    UNKNOWN,
    UNSHIFTED,
    Limits,
    as_batch,
    check_tokens,
    copied,
    document_starts,
    fitting_labels,
    limits_of,
    links,
    real_positions,
    require_unmoved,
    without_placeholders,
)
from rankopt.model.weights import device_of

Batch = Mapping[str, Any]
#: (model, batch) -> loss of each example, shape (B,), for models whose own loss is not known.
LossFunction = Callable[[nn.Module, Any], Tensor]

_ENDINGS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "EncoderDecoderModel": "seq2seq-lm",
    "ForSpeechToText": "seq2seq-lm",
    "ForTextToText": "seq2seq-lm",
    "MarianMTModel": "seq2seq-lm",
    "ForVisionText2Text": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForNextSentencePrediction": "sequence-classification",
    "ForMultipleChoice": "multiple-choice",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForVideoClassification": "video-classification",
}
#: Tasks with one label an example, unless a model's ``problem_type`` says otherwise.
_OF_EXAMPLES = (
    "sequence-classification",
    "image-classification",
    "audio-classification",
    "video-classification",
)


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
    """The task of a model; a classifier of one output is a regression, unless it says otherwise.

    A model that generates from pictures or sound is an encoder-decoder if its configuration says
    so, and a causal language model otherwise.
    """
    task = task_of_architecture(type(model).__name__)
    config: Any = model.config
    if task == "seq2seq-lm" and not getattr(config, "is_encoder_decoder", False):
        return "causal-lm"
    if task not in _OF_EXAMPLES:
        return task
    kind = getattr(config, "problem_type", None)
    if kind is None and getattr(config, "num_labels", 2) == 1:
        kind = "regression"
    if kind == "multi_label_classification":
        return "multi-label-classification"
    return "regression" if kind == "regression" else task


def settled(model: nn.Module, task: str, batch: Any) -> tuple[str, bool]:
    """What only a batch can tell of a task: run once, on the first.

    Returns:
        The task: of a causal language model whose head does not shift the labels another, and of a
        classifier whose ``problem_type`` is left to the labels. And whether its likelihood
        (``term_losses``) is the model's own loss.

    Raises:
        DataError: see prepare; or labels that teach a model to copy what it sees.
        ModelError: the model returned no loss.
    """
    labels = as_batch(batch, 0).get("labels")
    if task in _OF_EXAMPLES and isinstance(labels, Tensor) and labels.is_floating_point():
        config: Any = model.config
        free = getattr(config, "problem_type", None) is None
        if free and labels.dim() == 2 and labels.shape[1] == getattr(config, "num_labels", 0) > 1:
            task = "multi-label-classification"
    ready = prepare(task, batch, device_of(model), 0, limits_of(model, task))
    with torch.no_grad(), in_eval(model):
        try:
            loss, output = mean_loss(model, ready)
        except (TypeError, ValueError) as error:
            what = str(error).partition("\n")[0]
            raise DataError(
                f"{type(model).__name__} does not take the first batch: {what}"
            ) from error
        possible = (task, UNSHIFTED) if task == "causal-lm" else (task,)
        apart = {each: off(each, loss, output, ready["labels"])[0] for each in possible}
        task = min(apart, key=lambda each: apart[each])
        fits = apart[task] <= tolerance(model)
        if task == UNSHIFTED and not fits:
            task = "causal-lm"
        if task == "causal-lm" and fits and labels is not None:
            require_unmoved(type(model).__name__, labels, ready.get("input_ids"))
        if task == UNSHIFTED and _sees_ahead(model, ready, output):
            if labels is None or bool(copied(labels, ready["input_ids"])):
                raise DataError(
                    f"{type(model).__name__} predicts the label at a position from all tokens, "
                    "that one included: labels equal to the input would teach it to copy; mask "
                    "tokens and give the labels of those, -100 elsewhere"
                )
            task = "masked-lm"
    return task, fits


@contextlib.contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module's mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def tolerance(model: nn.Module) -> float:
    """How far, relative, two ways to compute a loss may be apart."""
    return max(1e-4, 4 * torch.finfo(next(model.parameters()).dtype).eps)


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


def off(task: str, loss: Tensor, output: Any, labels: Tensor) -> tuple[float, Tensor | None]:
    """How far a model's loss is from its likelihood, relative, and the terms of the likelihood.

    Infinitely far if there is none.
    """
    terms = likelihood(task, output, labels)
    if terms is None:
        return math.inf, None
    count, given = loss_terms(task, labels).sum(), float(loss.detach())
    apart = abs(float(terms.detach().sum(dtype=torch.float64) / count) - given)
    apart /= max(abs(given), 1e-30)
    return (math.inf if math.isnan(apart) else apart), terms


def _sees_ahead(model: nn.Module, ready: Batch, output: Any) -> bool:
    """Whether what is predicted at a position depends on later ones."""
    ids = ready["input_ids"]
    other = ids.clone()
    other[:, -1] = torch.where(ids[:, -1] == ids[:, 0], ids[:, -1] ^ 1, ids[:, 0])
    mask = ready.get("attention_mask")
    seen = torch.ones_like(ids[:, -1], dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        seen = mask[:, -1] != 0
    _, changed = mean_loss(model, {**ready, "input_ids": other})
    before, after = output.logits[seen, :-1], changed.logits[seen, :-1]
    return not torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max() or 1))


def loss_terms(task: str, labels: Tensor) -> Tensor:
    """How many terms of the mean each example has; labels ``(B, ...)`` -> ``(B,)``."""
    if task == "causal-lm":
        return (labels[:, 1:] != IGNORED).flatten(1).sum(1)
    if labels.is_floating_point():
        return torch.full((len(labels),), labels[0].numel(), device=labels.device)
    return (labels != IGNORED).reshape(len(labels), -1).sum(1)


def prepare(
    task: str, batch: Any, device: torch.device, number: int = 0, limits: Limits = UNKNOWN
) -> dict[str, Any]:
    """A batch on the device, with labels where the model's padding is left out.

    Causal language models may omit ``labels``: they are the input itself. Labels of padding
    (attention_mask 0; of a decoder, decoder_attention_mask) are ignored, and so are those of a
    causal model that would be predicted from padding, or from another document of the same row.
    Where the head does not shift labels, those equal to the input are shifted here.

    Args:
        task: see settled.
        batch: a dictionary of tensors, or what ``as_batch`` makes one of.
        device: of the model.
        number: of the batch, from 0, for errors.
        limits: of token ids and labels.

    Raises:
        DataError: no batch, no labels, labels that do not fit, or nothing to predict.
    """
    ready = as_batch(batch, number)
    check_tokens(ready, limits, number)
    ids, causal = ready.get("input_ids"), task in ("causal-lm", UNSHIFTED)
    if ready.get("labels") is None:
        if not causal or not isinstance(ids, Tensor):
            has = ", ".join(ready)
            raise DataError(f"batch {number + 1}: a batch needs 'labels', it has: {has}")
        ready["labels"] = without_placeholders(ids, ready, limits)
    labels = fitting_labels(task, ready["labels"], ready, limits, number)
    moved = task == UNSHIFTED and isinstance(ids, Tensor) and bool(copied(labels, ids))
    if labels.dim() == 2 and task in OF_TOKENS:
        name = "decoder_attention_mask" if task == "seq2seq-lm" else "attention_mask"
        labels = _without_padding(labels, ready, name, joined=task == "causal-lm" or moved)
    if moved:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
    ready["labels"] = labels
    empty = loss_terms(task, labels) == 0
    if bool(empty.any()):
        raise DataError(
            f"batch {number + 1}, example {int(empty.nonzero()[0]) + 1} has nothing to predict: it "
            "is too short or all labels are ignored"
        )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in ready.items()}


def _without_padding(labels: Tensor, batch: Batch, name: str, *, joined: bool) -> Tensor:
    """Labels ignored at padding; if joined, also where the position before is no context."""
    mask = batch.get(name)
    if isinstance(mask, Tensor):
        counted = real_positions(mask)
        if counted is not None and counted.shape[1] == labels.shape[1]:
            labels = labels.masked_fill(~counted, IGNORED)
            context = links(mask) if joined else None
            if context is not None:
                rest = labels[:, 1:].masked_fill(~context, IGNORED)
                labels = torch.cat([labels[:, :1], rest], 1)
    starts = document_starts(batch, labels.shape[1]) if joined else None
    return labels if starts is None else labels.masked_fill(starts, IGNORED)


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
    config: Any = model.config
    extra = {"use_cache": False} if hasattr(config, "use_cache") else {}
    kind = getattr(config, "problem_type", None)
    try:
        output = model(**batch, **extra)
    finally:
        # transformers' classifiers write there what they take the labels of this batch for.
        if getattr(config, "problem_type", None) != kind:
            config.problem_type = kind
    if getattr(output, "loss", None) is None:
        raise ModelError(f"{type(model).__name__} returned no loss for labels")
    return output.loss, output


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


def rows_of(batch: Batch, rows: slice) -> dict[str, Any]:
    """Some examples of a batch."""
    size = (len(batch["labels"]),)
    return {
        name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == size else value
        for name, value in batch.items()
    }
