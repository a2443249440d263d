"""Other ways to the same figures, and what they are measured against.

A way is prepared once and then called for one pass over the batch. Those that yield Fisher
information are asked for the same thing: for each planned layer the sum over examples of the
squared gradient, summed over outputs, shape ``(in,)``. That last sum is part of what is timed.

``plain`` is a training step without its optimizer: all weights get a gradient. The peers get one
for the planned weights only, which is in their favour.
"""

import dataclasses
import importlib
from collections.abc import Callable

import torch
from models import Case, planned, summed_loss
from torch import Tensor, nn

Rows = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way, prepared.

    Attributes:
        run: one pass over the batch.
        rows: the last pass' exact rows; None if there are none.
    """

    run: Callable[[], object]
    rows: Callable[[], Rows] | None = None


class MissingError(Exception):
    """A peer's package is not installed."""


def _imported(name: str, package: str) -> object:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(f"{package} is not installed ({error})") from error


def _without_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def plain(model: nn.Module, case: Case) -> Way:
    """Forward and backward, gradients of all weights."""
    model.requires_grad_(True)
    batch = case.batch()

    def run() -> None:
        _without_gradients(model)
        summed_loss(model, *batch).backward()

    return Way(run)


def plain_planned(model: nn.Module, case: Case) -> Way:
    """Forward and backward, gradients of the planned weights only."""
    _only_planned(model)
    batch = case.batch()

    def run() -> None:
        _without_gradients(model)
        summed_loss(model, *batch).backward()

    return Way(run)


def forward(model: nn.Module, case: Case) -> Way:
    """Forward only."""
    batch = case.batch()

    def run() -> None:
        with torch.no_grad():
            summed_loss(model, *batch)

    return Way(run)


def _only_planned(model: nn.Module) -> dict[str, nn.Linear]:
    layers = planned(model)
    model.requires_grad_(False)
    for module in layers.values():
        module.weight.requires_grad_(True)
    return layers


def shortcut(model: nn.Module, case: Case) -> Way:
    """The batch's gradient, squared: another quantity, in wide use."""
    layers = _only_planned(model)
    batch, rows = case.batch(), Rows()

    def run() -> None:
        _without_gradients(model)
        summed_loss(model, *batch).backward()
        for name, module in layers.items():
            rows[name] = module.weight.grad.square().sum(0)

    return Way(run)


def loop(model: nn.Module, case: Case) -> Way:
    """One example at a time."""
    layers = _only_planned(model)
    (ids, labels), rows = case.batch(), Rows()

    def run() -> None:
        for name, module in layers.items():
            rows[name] = torch.zeros(module.in_features, dtype=torch.float64)
        for index in range(case.examples):
            _without_gradients(model)
            part = slice(index, index + 1)
            summed_loss(model, ids[part], labels[part]).backward()
            for name, module in layers.items():
                rows[name] += module.weight.grad.square().sum(0)

    return Way(run, lambda: rows)


def vmap(model: nn.Module, case: Case) -> Way:
    """torch.func: the gradient function, vectorised over examples."""
    layers = _only_planned(model)
    (ids, labels), rows = case.batch(), Rows()
    weights = {f"{name}.weight": module.weight.detach() for name, module in layers.items()}
    frozen = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name not in weights
    }

    def loss(own: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        def called(**inputs: Tensor) -> object:
            return torch.func.functional_call(model, {**frozen, **own}, (), inputs)

        return summed_loss(called, one[None], label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def run() -> None:
        found = gradients(weights, ids, labels)
        for name in layers:
            rows[name] = found[f"{name}.weight"].square_().sum((0, 1))

    return Way(run, lambda: rows)


def opacus(model: nn.Module, case: Case) -> Way:
    """GradSampleModule of Opacus (Yousefpour et al. 2021): all examples' gradients."""
    module = _imported("opacus", "opacus")
    layers = _only_planned(model)
    batch, rows = case.batch(), Rows()
    # It records in training mode only; there is no dropout in these models.
    wrapped = module.GradSampleModule(model.train(), loss_reduction="sum", strict=False)

    def run() -> None:
        for layer in layers.values():
            layer.weight.grad = layer.weight.grad_sample = None
        summed_loss(wrapped, *batch).backward()
        for name, layer in layers.items():
            rows[name] = layer.weight.grad_sample.square_().sum((0, 1))
            layer.weight.grad_sample = None

    return Way(run, lambda: rows)


def backpack(model: nn.Module, case: Case) -> Way:
    """SumGradSquared of BackPACK (Dangel et al. 2020): squares summed over examples."""
    module = _imported("backpack", "backpack-for-pytorch")
    extensions = _imported("backpack.extensions", "backpack-for-pytorch")
    layers = _only_planned(model)
    batch, rows = case.batch(), Rows()
    for layer in layers.values():
        module.extend(layer)

    def run() -> None:
        _without_gradients(model)
        with module.backpack(extensions.SumGradSquared()):
            summed_loss(model, *batch).backward()
        for name, layer in layers.items():
            rows[name] = layer.weight.sum_grad_squared.sum(0)
            del layer.weight.sum_grad_squared

    return Way(run, lambda: rows)


#: What is timed beside ours, in this order; the first is the measure.
PEERS: dict[str, Callable[[nn.Module, Case], Way]] = {
    "plain forward + backward": plain,
    "the same, planned weights only": plain_planned,
    "forward only": forward,
    "batch gradient squared (not exact)": shortcut,
    "one example at a time": loop,
    "torch.func vmap": vmap,
    "Opacus": opacus,
    "BackPACK": backpack,
}
