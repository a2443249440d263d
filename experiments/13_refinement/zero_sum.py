"""Zero Sum SVD: ranks from first-order scores of components (Abbasi et al., arXiv 2602.02848).

With W L = U S V^T and L L^T = X X^T over positions, component i of W is u_i u_i^T W, and without it
the loss is predicted to change by

    change_i = -sigma_i (U^T G L^-T V)_ii = -(U^T G W^T U)_ii,

G the mean gradient of the calibration loss with respect to W. The second form is ours: since
S V^T L^-1 = U^T W, neither scores nor factors need the inverse.

Each layer gives its components away from the smallest sigma on. The next ones of all layers lie in
two heaps, of changes that are positive and of others; the smaller go first, from the heap that
brings the sum of the changes back to zero, until the budget is met. A layer whose rank saves
nothing stays dense, and costs what dense costs; what it has given away then changes nothing.

Our completion, where the paper says less:

- The budget is rankopt's count of the form's parameters, and never exceeded; the last component
  that goes may save more than was wanted. Pairs save below out*in/(out + in), the pivoted form
  below full rank. No layer falls below rank 1.
- A sum of zero asks for a positive change; where one heap is empty the other is taken; of equal
  changes the first layer's goes first.
- X X^T leaves padding out, and has a ridge relative to its diagonal (see calibration).

Left out: the projected gradient step after truncation, which is optional there, and storage that
quantises a part. Layers that are tied, embeddings and encoder-decoders are refused.
"""

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from calibration import RIDGE, Factors, layout_of, linear, positions, prepared, root_of, watched
from torch import Tensor, nn

from rankopt.backends.gram import SymmetricSum
from rankopt.errors import BudgetError, ModelError
from rankopt.layers import Form, Layer
from rankopt.measure.layout import Layout
from rankopt.measure.taps import differentiable, frozen
from rankopt.model.tasks import mean_loss
from rankopt.model.weights import device_of, is_conv1d, weight_of


@dataclasses.dataclass(frozen=True)
class Components:
    """What a layer W ``(out, in)`` is a sum of, K = min(out, in); largest sigma first.

    Attributes:
        left: U, shape ``(out, K)``, orthonormal, in the weight's precision or float32.
        right: S V^T L^-1 = U^T W, shape ``(K, in)``.
        changes: what the mean loss is predicted to rise by without each, in its unit; ``(K,)``,
            float64.
    """

    left: Tensor
    right: Tensor
    changes: Tensor


def components(
    model: nn.Module, batches: Sequence[Any], layers: Sequence[Layer], ridge: float = RIDGE
) -> dict[str, Components]:
    """Components and scores of all layers: one pass forward and backward (arXiv 2602.02848).

    Args:
        model: dense; left as it was.
        batches: as for profile_model. The loss is the mean over batches of the model's own.
        layers: ``profile.info.layers``.
        ridge: share of the mean diagonal that is added to X X^T.

    Raises:
        ModelError: a layer is none of nn.Linear or Conv1D, tied, or its moment is singular.
    """
    for layer in layers:
        if layer.partners:
            raise ModelError(f"layer {layer.name} is tied to {layer.partners[0]}: not covered")
    modules = {layer.name: linear(model, layer.name) for layer in layers}
    task, ready = prepared(model, batches)
    device = device_of(model)
    moments = {layer.name: SymmetricSum(layer.in_features, device) for layer in layers}
    with frozen(model), differentiable(model):
        weights = [
            module.get_parameter("weight").requires_grad_(True) for module in modules.values()
        ]
        gradients = [torch.zeros_like(weight) for weight in weights]
        for batch in ready:
            layout = layout_of(model, task, batch)

            def add(name: str, x: Tensor, layout: Layout = layout) -> None:
                moments[name].add(positions(x, layout))

            with watched(modules, add):
                loss, _ = mean_loss(model, batch)
            # An expert without tokens has no gradient on this batch.
            found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            for total, gradient in zip(gradients, found, strict=True):
                total.add_(gradient, alpha=1.0 / len(ready))
    made = {}
    for name, module in modules.items():
        gradient = gradients.pop(0)
        gradient = gradient.T if is_conv1d(module) else gradient
        root = root_of(name, moments.pop(name).full(), ridge)
        made[name] = decomposed(weight_of(module), gradient, root)
    return made


def decomposed(weight: Tensor, gradient: Tensor, root: Tensor) -> Components:
    """Components of W ``(out, in)`` from G ``(out, in)`` and L ``(in, in)``."""
    wide, own = weight.double(), torch.promote_types(weight.dtype, torch.float32)
    left = torch.linalg.svd(wide @ root, full_matrices=False).U
    right = left.T @ wide
    changes = -(right * (left.T @ gradient.double())).sum(1)
    return Components(left.to(own), right.to(own), changes)


def zero_sum_ranks(
    changes: Mapping[str, Sequence[float]], layers: Sequence[Layer], budget: int, form: Form
) -> dict[str, int | None]:
    """Ranks by the zero-sum rule (arXiv 2602.02848); None is dense.

    Args:
        changes: layer name -> predicted change of each component, largest sigma first.
        layers: whose ranks.
        budget: parameters of these layers, ``plan.budget.parameters``.
        form: how they will be kept.

    Raises:
        BudgetError: rank 1 everywhere has more parameters.
    """
    ranks = {layer.name: len(changes[layer.name]) for layer in layers}
    #: Whether changes are positive -> (size of the change, place of the layer).
    heaps: dict[bool, list[tuple[float, int]]] = {True: [], False: []}

    def offer(place: int) -> None:
        rank = ranks[layers[place].name]
        if rank > 1:
            change = changes[layers[place].name][rank - 1]
            heapq.heappush(heaps[change > 0.0], (abs(change), place))

    def kept(layer: Layer) -> int | None:
        rank = ranks[layer.name]
        return rank if rank <= layer.largest_rank(form) else None

    for place in range(len(layers)):
        offer(place)
    total, drift = sum(layer.dense_cost for layer in layers), 0.0
    while total > budget:
        heap = heaps[drift <= 0.0] or heaps[drift > 0.0]
        if not heap:
            raise BudgetError(
                f"{budget} parameters are fewer than those of rank 1 everywhere, {total}: raise "
                "the budget"
            )
        _, place = heapq.heappop(heap)
        layer = layers[place]
        total -= layer.cost(kept(layer), form)
        drift += changes[layer.name][ranks[layer.name] - 1]
        ranks[layer.name] -= 1
        total += layer.cost(kept(layer), form)
        offer(place)
    return {layer.name: kept(layer) for layer in layers}


def zero_sum(
    found: Mapping[str, Components], layers: Sequence[Layer], budget: int, form: Form
) -> dict[str, Factors | None]:
    """Factors by the zero-sum rule, of what ``components`` found; None is dense.

    Args:
        found: of all the layers; enough for any budget and form.
        layers: see zero_sum_ranks.
        budget: see zero_sum_ranks.
        form: see zero_sum_ranks.

    Raises:
        BudgetError: see zero_sum_ranks.
    """
    changes = {name: each.changes.tolist() for name, each in found.items()}
    ranks = zero_sum_ranks(changes, layers, budget, form)
    return {
        name: None if rank is None else (found[name].left[:, :rank], found[name].right[:rank])
        for name, rank in ranks.items()
    }
