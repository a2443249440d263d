"""The measured loss, the task's metric and the size of a model."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.errors import DataError, MissingExtraError, ModelError
from rankopt.layers import Layer
from rankopt.measure.loss import Loss, Summed, find_loss
from rankopt.model.inputs import IGNORED, listed
from rankopt.model.size import model_size
from rankopt.model.tasks import LossFunction, in_eval
from rankopt.model.weights import device_of, unwrapped
from rankopt.progress import bar
from rankopt.refinement.divergence import DenseLogits, divergence_of, logits_of, require_alike


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        task: see ProfileInfo.
        loss: mean of the model's own loss over all targets; nats for likelihoods, squared error
            for regressions. Where it is NaN or infinite, measuring ended with that batch.
        metrics: ``perplexity`` of language models, ``accuracy`` of classifiers (``f1`` and
            ``matthews`` too if there are two classes), ``pearson`` and ``spearman`` of regressions;
            none of ``custom`` losses. None where a metric is not defined. Where the dense model is
            given, and of plans that are compared but for language models, ``divergence`` too: how
            far the predictions are from the dense model's, mean over all targets (KL in nats, or
            the squared distance of regressions). That is what a profile predicts.
        examples: seen.
        targets: predicted tokens, or labels.
        planned_parameters: weights of the planned layers, as they are now.
        model_parameters: of the whole model, tied ones once.
        model_bytes: the same in bytes.
        notes: where the loss is not finite, and why metrics are None.
        example_losses: of each example, summed over its targets, in the order of the data: what a
            paired comparison of two models needs. None unless they were asked for.
        example_targets: how many targets each example has, with example_losses.
        example_correct: how many of them a classifier gets right, with example_losses.
        also: by name, the same model on other data.
    """

    task: str
    loss: float
    metrics: dict[str, float | None]
    examples: int
    targets: int
    planned_parameters: int
    model_parameters: int
    model_bytes: int
    notes: tuple[str, ...] = ()
    example_losses: tuple[float, ...] | None = None
    example_targets: tuple[int, ...] | None = None
    example_correct: tuple[int, ...] | None = None
    also: Mapping[str, "Evaluation"] = dataclasses.field(default_factory=dict)

    @property
    def of_others(self) -> dict[str, float | None]:
        """``loss of NAME``, and the metrics likewise, of the other data; plain values for JSON."""
        return {
            f"{what} of {name}": value
            for name, found in self.also.items()
            for what, value in {"loss": found.loss, **found.metrics}.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the other data the losses, metrics and counts of targets."""
        plain = dataclasses.asdict(dataclasses.replace(self, also={}))
        del plain["also"]
        targets = {f"targets of {name}": found.targets for name, found in self.also.items()}
        return {**plain, **self.of_others, **targets}


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: LossFunction | None = None,
    layers: Iterable[Layer] | None = None,
    per_example: bool = False,
    also: Mapping[str, Iterable[Any]] | None = None,
    dense: nn.Module | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Measure a dense or compressed model; in eval mode, the model is left as it was.

    Args:
        model: a transformers model with a head, or any module with ``loss_fn``.
        batches: as for profile_model. Perplexity is that of the batches' windows: each starts
            without context, and its first token is not predicted.
        loss_fn: (model, batch) -> loss of each example ``(B,)``, as for profile_model.
        layers: what counts as planned, ``profile.info.layers``; by default what is planned if
            nothing is included or excluded, and what is low rank.
        per_example: also the loss of each example. Of a loss that is not known to be a likelihood
            (label smoothing), each example is run by itself for that.
        also: name -> batches of other domains, measured beside: what is compressed on one domain
            may be broken on another.
        dense: the model that this one was compressed from: measures the divergence, too.
        progress: a bar on stderr; by default if it is a terminal.

    Raises:
        DataError: no batches, or batches without targets.
        ModelError: ``dense`` is another model, or there are no logits to compare.
    """
    loss = find_loss(unwrapped(model), loss_fn)
    if dense is not None:
        if loss_fn is not None:
            raise ModelError("of a loss_fn no predictions are known to compare: leave dense out")
        require_alike(unwrapped(model), unwrapped(dense))
    layers = None if layers is None else list(layers)

    def on(data: Iterable[Any], per_example: bool = False) -> Evaluation:
        return measured(
            model,
            data,
            loss,
            layers=layers,
            per_example=per_example,
            dense=None if dense is None else lambda _, ready: logits_of(dense, ready)[0],
            progress=progress,
        )

    with contextlib.nullcontext() if dense is None else in_eval(dense):
        found = on(batches, per_example)
        others = {name: on(data) for name, data in (also or {}).items()}
    return dataclasses.replace(found, also=others)


@torch.no_grad()
def measured(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    layers: Iterable[Layer] | None = None,
    per_example: bool = False,
    dense: DenseLogits | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """See evaluate; of a loss that was settled, the first batch is run once.

    Args:
        model: see evaluate.
        batches: see evaluate.
        loss: whose likelihood ``dense`` is of, if that is given.
        layers: see evaluate.
        per_example: see evaluate.
        dense: then the divergence is among the metrics.
        progress: see evaluate.
    """
    model = unwrapped(model)
    device = device_of(model)
    summed, apart, examples, targets = 0.0, 0.0, 0, 0
    notes: list[str] = []
    truths: list[Tensor] = []
    guesses: list[Tensor] = []
    losses: list[float] = []
    terms: list[int] = []
    correct: list[int] = []
    with in_eval(model):
        for number, batch in enumerate(bar(listed(batches), "Evaluate", "batch", progress)):
            loss = loss if number else loss.settled(model, batch)
            ready = loss.ready(batch, device, number)
            found = loss.summed(model, ready, apart=per_example)
            if found.losses is not None and found.terms is not None:
                losses += found.losses.tolist()
                terms += [int(count) for count in found.terms.tolist()]
            summed += found.loss
            examples, targets = examples + found.examples, targets + found.targets
            if not math.isfinite(summed):
                where = _where(found, number + 1, examples - found.examples)
                notes.append(f"loss is {'NaN' if math.isnan(summed) else summed} ({where})")
                break
            if dense is not None:
                logits = dense(number, ready)
                apart += divergence_of(loss.task, found.output, logits, ready["labels"])
            if found.output is not None and not loss.task.endswith("-lm"):
                truth, guess = _answers(loss.task, ready["labels"], found.output.logits)
                truths.append(truth.cpu())
                guesses.append(guess.cpu())
                if per_example and loss.task != "regression":
                    correct += _correct(ready["labels"], found.output.logits)
    if not examples:
        raise DataError("no batches were given")
    loss_mean, task = summed / targets, loss.task
    metrics: dict[str, float | None] = {}
    if notes:
        metrics = dict.fromkeys(_names(task))
    elif task.endswith("-lm"):
        metrics = {"perplexity": _exp(loss_mean)}
        if metrics["perplexity"] == math.inf:
            notes.append(f"perplexity is infinite: exp({loss_mean:.6g}) is beyond all numbers")
    elif truths:
        metrics, undefined = _metrics(task, torch.cat(truths), torch.cat(guesses))
        notes += undefined
    if dense is not None:
        metrics["divergence"] = apart / targets if math.isfinite(summed) else None
    size = model_size(model, layers)
    return Evaluation(
        task,
        loss_mean,
        metrics,
        examples,
        targets,
        size.planned,
        size.model,
        size.model_bytes,
        tuple(notes),
        tuple(losses) if per_example else None,
        tuple(terms) if per_example else None,
        tuple(correct) if len(correct) == examples else None,
    )


def _where(found: Summed, batch: int, before: int) -> str:
    """The batch, and the first row whose predictions are not finite, if there is one to see."""
    logits = getattr(found.output, "logits", None)
    if isinstance(logits, Tensor) and len(logits) == found.examples:
        # Some models have -inf for what they never predict: NaN is the better witness.
        for bad in (logits.isnan(), ~logits.isfinite()):
            rows = bad.flatten(1).any(1).nonzero()
            if len(rows):
                row = int(rows[0]) + 1
                return f"batch {batch}, row {row}: example {before + row}"
    return f"batch {batch}: examples {before + 1} to {before + found.examples}"


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _names(task: str) -> tuple[str, ...]:
    """Metrics that every evaluation of a task has."""
    if task.endswith("-lm"):
        return ("perplexity",)
    if task == "custom":
        return ()
    return ("pearson", "spearman") if task == "regression" else ("accuracy",)


def _answers(task: str, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """True and predicted labels, flat; classes of token classifiers without the ignored ones."""
    if task == "regression":
        return labels.reshape(-1).float(), logits.reshape(-1).float()
    truth, guess, counted = _classes(labels, logits)
    return truth[counted], guess[counted]


def _classes(labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """True and predicted classes, and which of them count."""
    if labels.is_floating_point():
        return labels.long(), (logits > 0).long(), torch.ones_like(labels, dtype=torch.bool)
    return labels, logits.argmax(-1), labels != IGNORED


def _correct(labels: Tensor, logits: Tensor) -> list[int]:
    """How many labels of each example are predicted."""
    truth, guess, counted = _classes(labels, logits)
    right = ((truth == guess) & counted).reshape(len(labels), -1).sum(1)
    return [int(count) for count in right.tolist()]


def _metrics(task: str, truth: Tensor, guess: Tensor) -> tuple[dict[str, float | None], list[str]]:
    """The task's metrics; None where one is not defined, and why."""
    try:
        from scipy import stats
        from sklearn import metrics
    except ImportError as error:
        missing = str(error.name).split(".")[0]
        raise MissingExtraError("measuring a task's metric", missing, "eval") from error
    if task == "regression":
        why = _uncorrelated(truth, guess)
        if why is not None:
            return dict.fromkeys(_names(task)), [f"pearson and spearman are not defined: {why}"]
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        # One class, or predictions that hardly differ: the figure is all that there is to say.
        warnings.simplefilter("ignore")
        if task == "regression":
            found["pearson"] = stats.pearsonr(truth, guess).statistic
            found["spearman"] = stats.spearmanr(truth, guess).statistic
        else:
            found["accuracy"] = metrics.accuracy_score(truth, guess)
            if int(torch.cat([truth, guess]).max()) <= 1:
                found["f1"] = metrics.f1_score(truth, guess, zero_division=0.0)
                found["matthews"] = metrics.matthews_corrcoef(truth, guess)
    return {name: float(value) for name, value in found.items()}, []


def _uncorrelated(truth: Tensor, guess: Tensor) -> str | None:
    """Why two columns have no correlation."""
    if len(truth) < 2:
        return "a correlation takes two rows or more"
    for name, values in (("labels", truth), ("predictions", guess)):
        if bool((values == values[0]).all()):
            return f"all {name} are {float(values[0]):.6g}"
    return None
