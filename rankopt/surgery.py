"""Apply a plan: replace layers by low-rank ones, all or nothing."""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rankopt.backends import find_backend, projection
from rankopt.checkpoint import attach, detach, require_unquantised
from rankopt.discover import Found, find_layers, weight_of
from rankopt.errors import PlanError
from rankopt.layers import Layer
from rankopt.lowrank import LowRankLinear
from rankopt.plan import Plan
from rankopt.profile import Profile
from rankopt.progress import bar

#: (backend, layer name) -> left vectors U (out, R) and U^T W (R, in): every rank is a slice.
FactorCache = MutableMapping[tuple[str, str], tuple[Tensor, Tensor]]


def apply_plan(
    model: nn.Module,
    plan: Plan,
    profile: Profile,
    *,
    allow_other_weights: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Replace the planned layers by low-rank ones, in place.

    All factors are computed before the first layer is replaced: an error leaves the model whole.

    Args:
        model: the dense model that was profiled.
        plan: made from the profile.
        profile: for the Fisher information that weights the factorisation.
        allow_other_weights: accept a model of the same layers whose weights differ (fine-tuned
            since, say); the profile's Fisher information is then used on the model's own weights.
        progress: a bar on stderr; by default if it is a terminal.

    Returns:
        The same model object; ``save_pretrained`` and ``rankopt.save_model`` write it reloadably.

    Raises:
        PlanError: the plan is of another profile, or of another model; names the first layers that
            differ.
        ModelError: the model cannot be factorised (already low rank, quantised, not loaded).
    """
    replacements = _replacements(model, plan, profile, allow_other_weights, None, progress)
    _swap(model, replacements)
    attach(model, plan)
    return model


@contextmanager
def applied(
    model: nn.Module, plan: Plan, profile: Profile, cache: FactorCache | None = None
) -> Iterator[nn.Module]:
    """The model under a plan inside the ``with``, the dense model again after it.

    Args:
        model: the dense model that was profiled.
        plan: made from the profile.
        profile: see apply_plan.
        cache: pass one dictionary to several calls to decompose every layer only once.
    """
    replacements = _replacements(model, plan, profile, False, cache, None)
    dense = _swap(model, replacements)
    attach(model, plan)
    try:
        yield model
    finally:
        _swap(model, dense)
        detach(model)


def _swap(model: nn.Module, replacements: dict[str, nn.Module]) -> dict[str, nn.Module]:
    replaced = {name: model.get_submodule(name) for name in replacements}
    for name, module in replacements.items():
        model.set_submodule(name, module)
    return replaced


def _replacements(
    model: nn.Module,
    plan: Plan,
    profile: Profile,
    allow_other_weights: bool,
    cache: FactorCache | None,
    progress: bool | None,
) -> dict[str, nn.Module]:
    if plan.profile_digest != profile.digest():
        raise PlanError(
            "the plan was made from another profile: give the profile that it was made from, or "
            "plan again"
        )
    found = find_layers(model)
    require_unquantised(model)
    _require_same(found, plan, allow_other_weights)
    low_rank = {name: rank for name, rank in plan.ranks.items() if rank is not None}
    layers = {layer.name: layer for layer in found.layers}
    same = all(e.layer.digest == layers[e.layer.name].digest for e in plan.layers)
    replacements: dict[str, nn.Module] = {}
    for name, rank in bar(low_rank.items(), "Factors", "layer", progress):
        module = found.modules[name]
        key = (plan.backend, name)
        if cache is None:
            up, down = _factors(module, layers[name], plan.backend, profile, rank, same)
        else:
            if key not in cache:
                full = layers[name].largest_rank
                cache[key] = _factors(module, layers[name], plan.backend, profile, full, same)
            up, down = cache[key][0][:, :rank], cache[key][1][:rank]
        bias = getattr(module, "bias", None)
        low = LowRankLinear.from_factors(
            down.contiguous(), up.contiguous(), None if bias is None else bias.detach().clone()
        )
        low.train(module.training)
        low.requires_grad_(module.get_parameter("weight").requires_grad)
        replacements[name] = low
    return replacements


@torch.no_grad()
def _factors(
    module: nn.Module, layer: Layer, backend: str, profile: Profile, rank: int, stored: bool
) -> tuple[Tensor, Tensor]:
    """``up`` (out, rank) and ``down`` (rank, in), in the weight's dtype and on its device."""
    weight = weight_of(module)
    mean_fisher = torch.from_numpy(profile.fisher_rows[layer.name] / profile.examples)
    weights = find_backend(backend).input_weights(mean_fisher.to(weight.device))
    kept = profile.basis(backend, layer.name) if stored else None
    if kept is None:
        basis = projection.decompose(weight, weights)[1]
    else:
        basis = torch.from_numpy(kept).to(weight.device)
    up = projection.left_vectors(weight, weights, basis[:, :rank])
    down = up.T @ weight.double()
    return up.to(weight.dtype), down.to(weight.dtype)


def _require_same(found: Found, plan: Plan, allow_other_weights: bool) -> None:
    """Refuse a model whose layers are not the plan's."""
    have = {layer.name: layer for layer in found.layers}
    differences: list[str] = []
    other_weights: list[str] = []
    for entry in plan.layers:
        want, got = entry.layer, have.pop(entry.layer.name, None)
        if got is None:
            differences.append(f"{want.name} is missing")
        elif (got.out_features, got.in_features) != (want.out_features, want.in_features):
            differences.append(
                f"{want.name} is {got.out_features} x {got.in_features}, planned "
                f"{want.out_features} x {want.in_features}"
            )
        elif got.digest != want.digest and not allow_other_weights:
            other_weights.append(f"{want.name} has other weights")
    # Another structure explains other weights, not the other way round: it is named first.
    differences += [f"{name} is not in the plan" for name in have] + other_weights
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise PlanError(
            f"the plan is for another model ({plan.architecture}): "
            f"{'; '.join(differences[:3])}{more}"
        )
