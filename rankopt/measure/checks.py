"""Checks of what is asked, and of the first batch: loss and layers are what sums take them for."""

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rankopt.errors import ModelError, OptionError, few
from rankopt.layers import BITS, FORMS, Bits
from rankopt.measure.collector import Collector
from rankopt.measure.fisher import bytes_of_sums
from rankopt.measure.layout import Layout, widened
from rankopt.measure.taps import largest_scale, tap
from rankopt.model.inputs import IGNORED, OF_TOKENS
from rankopt.model.likelihood import likelihood
from rankopt.model.selection import Selection
from rankopt.model.size import model_size
from rankopt.model.tasks import (
    Batch,
    loss_terms,
    mean_loss,
    off,
    positions_of,
    rows_of,
    tolerance,
)
from rankopt.model.weights import memory_for, weight_shape
from rankopt.profile.profile import Profile

_MIXED = (
    "which example an input belongs to is lost (batches not in the first dimension? a loss or a "
    "layer that couples examples?); profile with batch size 1, or leave it out with exclude"
)
#: At most so many examples are taken one by one, where that is the only way.
_SINGLY = 8
#: Labels are said to be fitted where the loss is below this share of the entropy. The two are near
#: each other on text, and on labels as the model would draw them. Of two classes and a label that
#: is found more likely, the loss is 0.76 of the entropy if that is 0.6 sure, 0.32 if it is 0.9,
#: and 0.18 if it is 0.99.
_FITTED = 2 / 3


def check_options(
    form: str,
    moments: bool,
    cross_fit: bool,
    layers_at_a_time: int | None,
    bits: Collection[int],
) -> tuple[Bits, ...]:
    """Refuse what no model can make good; see profile_model.

    Returns:
        The bits, most of them first, each once.

    Raises:
        OptionError: an unknown form, a number below 1, or options that do not go together.
    """
    if form not in FORMS:
        raise OptionError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    if layers_at_a_time is not None and layers_at_a_time < 1:
        raise OptionError(f"layers_at_a_time must be at least 1, got {layers_at_a_time}")
    if cross_fit and not moments:
        raise OptionError("cross_fit values factors by second moments: not with moments=False")
    unknown = [each for each in bits if each not in BITS]
    if unknown:
        known = " or ".join(map(str, BITS))
        raise OptionError(f"weights are rounded to {known} bits, not to {unknown[0]!r}")
    if bits and not moments:
        raise OptionError("losses of rounding take second moments: no bits with moments=False")
    return tuple(each for each in BITS if each in bits)


def check_apart(
    model: nn.Module, modules: Mapping[str, nn.Module], tokens: int, run: Callable[[], Tensor]
) -> None:
    """Verify for all examples that each is seen as one: some layouts and losses mix them unnoticed.

    The examples' losses are multiplied by powers of two and back-propagated again: where examples
    are apart, the gradients of each are multiplied by just its own. Four powers tell four examples
    from each other, two passes sixteen.

    Args:
        model: whose layers they are; in eval mode, weights frozen.
        modules: layer name -> module.
        tokens: positions of an example.
        run: runs the model; the loss of each example ``(B,)``, with its graph.

    Raises:
        ModelError: the gradient of one example's loss is found where another is.
    """
    layout, found = Layout.of(0, tokens), dict[str, Tensor]()

    def hook(name: str) -> Callable[..., Tensor]:
        def sink(_: Tensor, gradient: Tensor) -> None:
            by_example = layout.by_example(name, widened(gradient)).flatten(1)
            energy = torch.linalg.vector_norm(by_example, dim=1).double().square().cpu()
            found[name] = found[name] + energy if name in found else energy

        return lambda module, args, output: tap(output, output.new_zeros(()), sink)

    def energies(weights: Tensor, *, again: bool) -> dict[str, Tensor]:
        found.clear()
        torch.autograd.backward(losses, weights.to(losses.dtype), retain_graph=again)
        return dict(found)

    def fits(scale: float) -> bool:
        scaled = energies(torch.full_like(losses, scale), again=True)
        return all(bool(energy.isfinite().all()) for energy in scaled.values())

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(hook(name)))
        losses = run()
        count = len(losses)
        if count < 2 or not losses.requires_grad:
            return
        layout = Layout.of(count, tokens)
        half = any(x.get_parameter("weight").dtype == torch.float16 for x in modules.values())
        # The largest of the weights below is eight.
        scale = (largest_scale(fits) or 8.0) / 8.0 if half else 1.0
        plain = energies(torch.full_like(losses, scale), again=True)
        digits = [4**k for k in range(count.bit_length()) if 4**k < count]
        for digit in digits:
            weights = 2.0 ** (torch.arange(count, device=losses.device) // digit % 4)
            scaled = energies(scale * weights, again=digit != digits[-1])
            for name, energy in plain.items():
                wanted = energy * weights.double().cpu().square()
                slack = 10 * tolerance(model) * (wanted + 1e-6 * wanted.max())
                if bool(((scaled[name] - wanted).abs() > slack).any()):
                    raise ModelError(f"layer {name}: {_MIXED}")


def stated_losses(model: nn.Module, task: str, batch: Batch) -> Tensor:
    """The loss of each example by its likelihood, which is verified to be the model's own.

    Raises:
        ModelError: it is not.
    """
    loss, output = mean_loss(model, batch)
    apart, terms = off(task, loss, output, batch["labels"])
    if terms is None or apart > tolerance(model):
        raise no_plain_mean(model, task)
    return terms.sum(1)


def warn_of_fitted(task: str, loss: float, entropy: float, targets: int) -> None:
    """Say on stderr that given labels hardly produce gradients, because they are predicted.

    Args:
        task: see tasks.
        loss: on the given labels, summed over the targets, nats.
        entropy: of the model's own prediction of the same targets, summed, nats.
        targets: how many; 0 if it is not known.
    """
    if loss >= _FITTED * entropy or not targets:
        return
    better = "sampled" if task in OF_TOKENS else "expected"
    tqdm.write(
        f"warning: the loss on the given labels is {loss / targets:.3g} nats per target, far below "
        f"the {entropy / targets:.3g} that the model itself expects (its entropy): the labels are "
        "fitted and hardly produce gradients, so their Fisher information is that of a few "
        "examples; give rows that the model was not trained on, or use "
        f'--estimator {better} (estimator="{better}")',
        file=sys.stderr,
    )


def no_plain_mean(model: nn.Module, task: str) -> ModelError:
    """What is said of a loss that is another than that of other batches."""
    return ModelError(
        f"the loss of {type(model).__name__} is not a plain mean over its {task} terms: for some "
        "batches it is the likelihood, for this one it is not. Fisher information per example "
        "cannot be read off it (weights per class? auxiliary losses?); profile with loss_fn"
    )


def check_likelihood(model: nn.Module, task: str, batch: Batch) -> None:
    """Refuse to draw labels where the model's loss is no likelihood.

    Raises:
        ModelError: says what both are.
    """
    with torch.no_grad():
        loss, output = mean_loss(model, batch)
        terms = likelihood(task, output, batch["labels"])
        count = loss_terms(task, batch["labels"]).sum()
    says = "cannot be told" if terms is None else f"says {float(terms.sum() / count):.6g}"
    raise ModelError(
        f"the loss of {type(model).__name__} is {float(loss):.6g} for a batch where the "
        f"likelihood of {task} {says}: labels cannot be drawn from it, nor tokens taken apart; "
        "use the empirical estimator per example"
    )


def check_loss(model: nn.Module, task: str, batch: Batch) -> None:
    """Verify that a loss of which no likelihood is known is the mean that the task says.

    The terms of the batch are parted, into examples and, of tokens, into those at even and at odd
    places: the loss of all is that of the parts, weighted by their terms.

    Raises:
        ModelError: it is not, or an auxiliary loss is added to it.
    """

    def total(part: Batch) -> float:
        loss, output = mean_loss(model, part)
        if getattr(output, "aux_loss", None) is not None:
            raise ModelError(_not_plain(model, task, "an auxiliary loss is added to it"))
        return float(loss.double() * loss_terms(task, part["labels"]).sum())

    with torch.no_grad():
        for whole, parts in _partings(model, task, batch):
            together, apart = total(whole), sum(total(part) for part in parts)
            if abs(together - apart) > tolerance(model) * abs(apart):
                what = f"{together:.6g} for all together, {apart:.6g} for its {len(parts)} parts"
                raise ModelError(_not_plain(model, task, what))


def _not_plain(model: nn.Module, task: str, what: str) -> str:
    return (
        f"the loss of {type(model).__name__} is not a plain mean over its {task} terms: {what}. "
        "Fisher information per example cannot be read off it (auxiliary losses? weights per "
        "class?)"
    )


def _partings(
    model: nn.Module, task: str, batch: Batch
) -> Iterator[tuple[Batch, list[dict[str, Any]]]]:
    labels = batch["labels"]
    if len(labels) > 1:
        size = min(len(labels), _SINGLY)
        yield _few(model, batch, size), [rows_of(batch, slice(n, n + 1)) for n in range(size)]
    if task in OF_TOKENS:
        places = torch.arange(labels.shape[1], device=labels.device) % 2
        places = places.reshape(1, -1, *(1,) * (labels.dim() - 2))
        parts = [{**batch, "labels": labels.masked_fill(places == k, IGNORED)} for k in (0, 1)]
        if all(bool(loss_terms(task, part["labels"]).any()) for part in parts):
            yield batch, parts
    else:
        yield batch, [dict(batch)]


def _few(model: nn.Module, batch: Batch, size: int) -> dict[str, Any]:
    """The first examples.

    Raises:
        ModelError: some tensor does not have one row an example.
    """
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dim() and len(value) != len(batch["labels"]):
            raise ModelError(
                f"the loss of {type(model).__name__} is no likelihood that is known, and {name} of "
                f"shape {tuple(value.shape)} cannot be parted into examples to see what it is a "
                "mean of; profile with batch size 1"
            )
    return rows_of(batch, slice(0, size))


def check_examples(
    model: nn.Module, modules: Mapping[str, nn.Module], task: str, batch: Batch
) -> None:
    """The same as check_apart, one by one: for a loss that is known as a mean only.

    Raises:
        ModelError: the Fisher information of several together is not that of each.
    """
    size = min(len(batch["labels"]), _SINGLY)
    if size < 2:
        return
    with Collector(model, modules) as probe:

        def total(rows: slice) -> Tensor:
            part = rows_of(batch, rows)
            terms = loss_terms(task, part["labels"])
            probe.begin(len(terms), positions_of(part))
            probe.backward(mean_loss(model, part)[0] * terms.sum())
            return probe.totals

        together = total(slice(0, size))
        apart = torch.stack([total(slice(n, n + 1)) for n in range(size)]).sum(0)
    precision = torch.finfo(next(model.parameters()).dtype).eps
    other = (together - apart).abs() > max(0.01, 32 * precision) * apart
    if bool(other.any()):
        raise ModelError(f"layer {list(modules)[int(other.nonzero()[0])]}: {_MIXED}")


def warn_of_zeros(profile: Profile) -> None:
    """Say which layers the loss does not depend on."""
    members = [member for layer in profile.info.layers for member in layer.members]
    zero = [name for name in members if not profile.fisher_rows[name].any()]
    if zero:
        tqdm.write(
            f"warning: the Fisher information of {len(zero)} layers is exactly zero "
            f"({few(zero)}): the loss does not depend on them, and any rank is as good as dense",
            file=sys.stderr,
        )


def warn_of_memory(
    model: nn.Module, selection: Selection, needs: Collection[str], part: int, times: int
) -> None:
    """Say so where the sums of a pass do not fit beside the model.

    Args:
        model: that is measured.
        selection: its planned layers.
        needs: statistics beyond the rows.
        part: layers of a pass.
        times: that the same sums are kept: of halves of the data, of rounds.
    """
    memory = memory_for(model)
    sums = bytes_of_pass(selection, needs, times) * part / len(selection.layers)
    if memory is None or model_size(model).model_bytes + sums <= memory:
        return
    tqdm.write(
        f"warning: the statistics of {part} layers take up to "
        f"{sums / 1e9:.3g} GB beside the model, and there are {memory / 1e9:.3g} GB in all: "
        "one round and no cross-fitting (--rounds 1 --no-cross-fit) take less, "
        "layers_at_a_time (--layers-at-a-time) takes several passes over the data instead, and "
        "backends that need no moments do with less without them (moments=False, --no-moments)",
        file=sys.stderr,
    )


def bytes_of_pass(selection: Selection, needs: Collection[str], times: int) -> int:
    """Memory that the sums of all planned layers take at most.

    Args:
        selection: the planned layers.
        needs: statistics beyond the rows.
        times: that the same sums are kept: of halves of the data, of rounds.
    """
    shapes = (weight_shape(module) for module in selection.modules.values())
    return times * bytes_of_sums(shapes, needs)
