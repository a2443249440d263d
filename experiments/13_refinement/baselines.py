"""Two published methods, to be compared at equal parameters and equal calibration tokens.

- Zero Sum SVD (arXiv 2602.02848), see zero_sum: ranks and factors of any budget from one pass.
- The anchored sequential closed form (AA-SVD, arXiv 2604.02119), see sequential: factors of given
  ranks.

Both are written anew from the formulas; their modules say what is our own completion. ``check``
says on tiny models whether they are what they claim.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from calibration import layout_of, positions, prepared, put, watched
from sequential import anchored
from torch import Tensor, nn
from zero_sum import Components, components, decomposed, zero_sum, zero_sum_ranks

from rankopt import apply_plan, make_plan, profile_model
from rankopt.layers import FORMS, Form, Layer
from rankopt.model.size import model_size
from rankopt.model.tasks import Batch, in_eval, mean_loss
from rankopt.model.weights import weight_of
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile

__all__ = [
    "Components",
    "anchored",
    "check",
    "components",
    "cost",
    "put",
    "zero_sum",
    "zero_sum_ranks",
]

#: Moments of layers behind a norm are singular; this small, the ridge is beneath all tolerances.
_RIDGE = 1e-8


def check(model: nn.Module, batches: Sequence[Any]) -> dict[str, float]:
    """Assert identities of both methods, in float64.

    Args:
        model: tiny, dense: every layer is gone through several times. Left as it was.
        batches: a few.

    Returns:
        Of each identity the largest relative error. ``anchored / dense`` and ``/ whitened`` are
        the largest ratios of output errors behind a compressed prefix: at full rank to that of the
        weight itself, at the plan's rank to that of the whitened factors.

    Raises:
        AssertionError: says which identity does not hold, and at which layer.
    """
    wide = copy.deepcopy(model).double()
    profile = profile_model(wide, batches, backends=("whitened",), form="pairs", progress=False)
    layers = profile.info.layers
    plan = make_plan(profile, keep=0.6, solver="uniform", form="pairs")
    found = components(wide, batches, layers)
    _check_rule()
    _check_budgets(wide, found, layers)
    figures = {
        "score, other form": _formula(),
        "full rank": max(
            _apart(each.left @ each.right, _weight(wide, name)) for name, each in found.items()
        ),
        "unchanged prefix": _unchanged(wide, batches, plan, profile),
    }
    for name, error in figures.items():
        assert error < 1e-6, f"{name}: {error:.3g}"
    figures["score, finite difference"] = _differences(wide, batches, found)
    figures |= _anchors(wide, batches, plan, profile)
    return figures


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _check_rule() -> None:
    """Two 4 x 4 layers, worked by hand: a goes 4, 3, 2, then b is the smaller negative one."""
    kind = {"out_features": 4, "in_features": 4, "kind": "", "itemsize": 8, "digest": ""}
    layers = [Layer.model_validate({"name": name, **kind}) for name in "ab"]
    changes = {"a": [0.0, 9.0, -1.0, 3.0], "b": [0.0, 0.0, 5.0, -2.0]}
    for budget, wanted in ((32, (None, None)), (31, (3, None)), (28, (2, None)), (27, (2, 3))):
        ranks = zero_sum_ranks(changes, layers, budget, "pivoted")
        assert tuple(ranks.values()) == wanted, f"budget {budget}: {ranks}"


def _check_budgets(
    model: nn.Module, found: Mapping[str, Components], layers: Sequence[Layer]
) -> None:
    """Parameters counted on the modules are those of the ranks, and within a component's saving."""
    dense = sum(layer.dense_cost for layer in layers)
    step = max(layer.out_features + layer.in_features for layer in layers)
    for form in FORMS:
        for budget in (int(0.9 * dense), int(0.6 * dense), int(0.4 * dense)):
            factors = zero_sum(found, layers, budget, form)
            other = copy.deepcopy(model)
            put(other, factors, form)
            counted = model_size(other, layers).planned
            costs = [cost(layer, factors[layer.name], form) for layer in layers]
            assert counted == sum(costs), f"{form}, {budget}: {counted} counted, {sum(costs)} said"
            assert budget - step < counted <= budget, f"{form}, {budget}: {counted} parameters"


def cost(layer: Layer, factors: tuple[Tensor, Tensor] | None, form: Form) -> int:
    """Parameters of a layer with these factors, or dense."""
    return layer.cost(None if factors is None else len(factors[1]), form)


def _formula() -> float:
    """The scores as the paper writes them, with the inverse."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for out, into in ((5, 7), (7, 5), (6, 6)):
        weight, gradient, inputs = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((out, into), (out, into), (into, 3 * into))
        )
        root = torch.linalg.cholesky(inputs @ inputs.T)
        u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
        slopes = (u.T @ gradient @ torch.linalg.inv(root).T @ vt.T).diagonal()
        found = decomposed(weight, gradient, root)
        worst = max(worst, _apart(found.changes, -s * slopes))
        worst = max(worst, _apart(found.right, s[:, None] * (vt @ torch.linalg.inv(root))))
    return worst


def _differences(
    model: nn.Module, batches: Sequence[Any], found: Mapping[str, Components]
) -> float:
    """Scores against the loss with one component times 1 + eps and 1 - eps.

    Language models compute norms and loss in float32, whatever their weights: there eps is larger.
    """
    _, ready = prepared(model, batches)
    exact = mean_loss(model, ready[0])[0].dtype == torch.float64
    eps, tolerance = (1e-4, 1e-6) if exact else (1e-2, 0.05)
    worst = 0.0
    for name, each in found.items():
        weight = _weight(model, name)
        before = weight.clone()
        for i in sorted({0, len(each.changes) // 2, len(each.changes) - 1}):
            component = eps * torch.outer(each.left[:, i], each.right[i])
            losses = []
            for changed in (before - component, before + component):
                weight.copy_(changed)
                losses.append(_loss(model, ready))
            weight.copy_(before)
            slope, score = (losses[0] - losses[1]) / (2.0 * eps), float(each.changes[i])
            # A score may be near zero: errors are shares of the layer's largest.
            apart = abs(slope - score) / float(each.changes.abs().max())
            assert apart < tolerance, f"{name}, component {i}: {score} said, {slope} seen"
            worst = max(worst, apart)
    return worst


@torch.no_grad()
def _loss(model: nn.Module, ready: Sequence[Batch]) -> float:
    with in_eval(model):
        return sum(float(mean_loss(model, batch)[0]) for batch in ready) / len(ready)


def _unchanged(model: nn.Module, batches: Sequence[Any], plan: Plan, profile: Profile) -> float:
    """Whatever beta, behind a dense prefix the factors are those of the backend whitened."""
    reference = copy.deepcopy(model)
    apply_plan(reference, plan, profile, progress=False)
    worst = 0.0
    for number, (name, rank) in enumerate(plan.ranks.items()):
        other, beta = copy.deepcopy(model), (0.0, 0.25, 1.0)[number % 3]
        anchored(other, model, batches, {name: rank}, "pairs", beta, _RIDGE)
        worst = max(worst, _apart(_weight(other, name), _weight(reference, name)))
    return worst


def _weight(model: nn.Module, name: str) -> Tensor:
    return weight_of(model.get_submodule(name))


def _anchors(
    model: nn.Module, batches: Sequence[Any], plan: Plan, profile: Profile
) -> dict[str, float]:
    """Behind a compressed prefix, each beta has the least error that there is at its rank.

    The aim of beta is Y = W ((1 - beta) X' + beta X), whose moment with X' is W C. The least error
    is known without moments: what least squares on X' leave of Y, and of what they fit, the
    squares of all singular values but the first r.
    """
    whitened = copy.deepcopy(model)
    apply_plan(whitened, plan, profile, progress=False)
    names = list(plan.ranks)
    figures = {"above the least": 0.0, "anchored / dense": 0.0, "anchored / whitened": 0.0}
    for place in range(len(names) // 2, len(names)):
        name, weight = names[place], _weight(model, names[place])
        ranks, most = {n: plan.ranks[n] for n in names[: place + 1]}, min(weight.shape)
        cases: tuple[tuple[int | None, Form, float, Tensor], ...] = (
            (most, "pairs", 1.0, weight),
            (ranks[name], "pivoted", 1.0, _weight(whitened, name)),
            (ranks[name], "pairs", 0.25, _weight(whitened, name)),
        )
        for rank, form, beta, other in cases:
            ours = copy.deepcopy(model)
            anchored(ours, model, batches, {**ranks, name: rank}, form, beta, _RIDGE)
            x = _given(ours, batches, name)
            wanted = torch.lerp(x, _given(model, batches, name), beta) @ weight.T
            fitted = x @ torch.linalg.lstsq(x, wanted, driver="gelsd").solution
            deeper = torch.linalg.svdvals(fitted)[rank:].square().sum()
            least = float((wanted - fitted).square().sum() + deeper)
            error, against = (
                float((wanted - x @ w.T).square().sum()) for w in (_weight(ours, name), other)
            )
            above = (error - least) / float(wanted.square().sum())
            said = f"{name} at rank {rank}, beta {beta}: {error}"
            assert -1e-9 < above < 1e-6, f"{said}, least is {least}"
            assert error <= against * (1.0 + 1e-6), f"{said}, more than {against}"
            figures["above the least"] = max(figures["above the least"], above)
            if beta == 1.0:
                key = "anchored / dense" if rank == most else "anchored / whitened"
                figures[key] = max(figures[key], error / against)
    return figures


@torch.no_grad()
def _given(model: nn.Module, batches: Sequence[Any], name: str) -> Tensor:
    """Inputs of a layer, ``(positions, in)``."""
    task, ready = prepared(model, batches)
    seen: list[Tensor] = []
    module = {name: model.get_submodule(name)}
    with in_eval(model), watched(module, lambda _, x: seen.append(x)):
        for batch in ready:
            mean_loss(model, batch)
    layouts = [layout_of(model, task, batch) for batch in ready]
    return torch.cat([positions(x, layout) for x, layout in zip(seen, layouts, strict=True)])
