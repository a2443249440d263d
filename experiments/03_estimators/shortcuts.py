"""Row importances of every layer, measured exactly and by the shortcuts that are in use.

Rows are per example and of the loss *summed* over its terms, whatever a shortcut used, so that only
the shortcut differs: where published code squares the gradient of a mean over T terms, the square
is multiplied with T^2. With dW_n the gradient of example n, F_j = mean_n sum_i (dW_n)_ij^2 is what
they stand for, and batches of B examples give

    S_j = mean over batches of sum_i (mean_{n in batch} dW_n)_ij^2,
    E[S_j] = F_j / B + (1 - 1/B) sum_i (E dW)_ij^2.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rankopt.measure.accumulate import gather
from rankopt.measure.estimators import Estimator
from rankopt.measure.loss import ModelLoss
from rankopt.model.tasks import loss_terms, mean_loss, prepare, task_of

#: Layer -> shape (in,), float64.
Rows = dict[str, npt.NDArray[np.float64]]
Batches = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Rows, and how they came together.

    Attributes:
        rows: per example.
        parts: sum of the rows of each batch and layer, ``(batches, layers)``.
        units: examples of each batch.
    """

    rows: Rows
    parts: npt.NDArray[np.float64]
    units: npt.NDArray[np.float64]


def by_estimator(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Batches, estimator: Estimator
) -> Measured:
    """What rankopt measures."""
    objective = ModelLoss(task_of(model), estimator)
    gathered = gather(model, modules, batches, objective, frozenset())
    examples, count = gathered.seen.examples, len(gathered.seen.totals)
    return Measured(
        {name: gathered.sums[name].rows.cpu().numpy() / examples for name in modules},
        torch.stack(gathered.seen.totals).numpy(),
        np.full(count, examples / count),
    )


def shifted_twice(batches: Batches) -> list[Mapping[str, Any]]:
    """Labels shifted by hand, for a model that shifts them itself: it is asked for token t + 2."""
    return [
        {
            "input_ids": batch["input_ids"][:, :-1],
            "attention_mask": batch["attention_mask"][:, :-1],
            "labels": batch["input_ids"][:, 1:],
        }
        for batch in batches
    ]


@dataclasses.dataclass(frozen=True)
class OneByOne:
    """Shortcuts that need whole gradients of weights, all from one backward pass per example.

    Attributes:
        windows: exact rows of each example.
        batches: B -> S of batches of B examples.
        half: squares of the mean loss's gradient taken in float16.
        lost: share of those squares that are zero where the gradient is not.
        terms: T.
    """

    windows: list[Rows]
    batches: dict[int, Rows]
    half: Rows
    lost: float
    terms: int


def one_by_one(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Batches, sizes: Sequence[int]
) -> OneByOne:
    """Back-propagate the mean loss of one example after the other to the weights themselves.

    Args:
        model: a causal language model.
        modules: layer name -> nn.Linear.
        batches: examples of equal length.
        sizes: B; each divides the number of examples.
    """
    task, device = task_of(model), next(model.parameters()).device
    weights = {name: module.get_parameter("weight") for name, module in modules.items()}
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert all(len(ids) % size == 0 for size in sizes), f"{len(ids)} examples in {sizes}"
    sums = {size: {n: torch.zeros_like(w) for n, w in weights.items()} for size in sizes}
    squares = {size: _zeros(weights) for size in sizes}
    half, windows = _zeros(weights), []
    lost = alive = terms = 0
    model.eval().requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    for number in range(len(ids)):
        ready = prepare(task, {"input_ids": ids[number : number + 1]}, device)
        terms = int(loss_terms(task, ready["labels"]).sum())
        loss: Any = mean_loss(model, ready)[0]
        loss.backward()
        exact: Rows = {}
        for name, weight in weights.items():
            gradient = weight.grad
            assert gradient is not None
            exact[name] = _rows(gradient.square()) * terms**2
            small = gradient.half().square()
            half[name] += small.sum(0, dtype=torch.float32).cpu().double().numpy() * terms**2
            alive += int((gradient != 0).sum())
            lost += int(((small == 0) & (gradient != 0)).sum())
            for size in sizes:
                total = sums[size][name].add_(gradient)
                if (number + 1) % size == 0:
                    squares[size][name] += _rows((total / size).square()) * terms**2
                    total.zero_()
            weight.grad = None
        windows.append(exact)
    model.requires_grad_(False)
    return OneByOne(
        windows,
        {size: {n: v * size / len(ids) for n, v in squares[size].items()} for size in sizes},
        {name: value / len(ids) for name, value in half.items()},
        lost / max(alive, 1),
        terms,
    )


def _zeros(weights: Mapping[str, torch.Tensor]) -> Rows:
    return {name: np.zeros(weight.shape[1]) for name, weight in weights.items()}


def _rows(squares: torch.Tensor) -> npt.NDArray[np.float64]:
    rows: npt.NDArray[np.float64] = squares.sum(0, dtype=torch.float64).cpu().numpy()
    return rows


@torch.no_grad()
def by_activations(model: nn.Module, modules: Mapping[str, Any], batches: Batches) -> Rows:
    """The second moment's diagonal: F with every gradient of an output taken as one."""
    task, device = task_of(model), next(model.parameters()).device
    found = {n: torch.zeros(m.in_features, dtype=torch.float64) for n, m in modules.items()}

    def hook(name: str) -> Any:
        def add(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            energy = args[0].flatten(0, -2).float().square().sum(0, dtype=torch.float64)
            found[name] += module.out_features * energy.cpu()

        return add

    hooks = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    model.eval()
    for batch in batches:
        mean_loss(model, prepare(task, batch, device))
    for each in hooks:
        each.remove()
    examples = sum(len(batch["input_ids"]) for batch in batches)
    return {name: (energy / examples).numpy() for name, energy in found.items()}


def mean_of(windows: Sequence[Rows]) -> Rows:
    """Rows per example of some of the examples."""
    return {name: np.mean([rows[name] for rows in windows], axis=0) for name in windows[0]}


def over_maximum(rows: Rows) -> Rows:
    """Each layer divided by its own largest row."""
    return {name: values / values.max() for name, values in rows.items()}


def plus(rows: Rows, epsilon: float) -> Rows:
    """A constant added in float32, as the scripts do before they take the root."""
    return {
        name: (values.astype(np.float32) + np.float32(epsilon)).astype(np.float64)
        for name, values in rows.items()
    }
