"""Applied plans cost what they said, lose what they said, and refuse other models."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankopt import (
    LowRank,
    ModelError,
    Plan,
    PlanError,
    Profile,
    applied,
    apply_plan,
    make_plan,
    profile_model,
)
from rankopt.apply import apply as surgery
from rankopt.apply.apply import FactorCache
from rankopt.apply.surgery import low_rank, replace
from rankopt.backends import BUILT_IN, find_backend
from rankopt.backends.statistics import STATISTICS
from rankopt.errors import OptionError, RankoptError
from rankopt.measure.accumulate import gather
from rankopt.measure.estimators import Estimator
from rankopt.measure.loss import ModelLoss
from rankopt.model.selection import find_layers
from rankopt.model.size import model_size
from rankopt.model.tasks import task_of
from rankopt.model.weights import weight_of
from tests import tiny


def prepared(kind: str = "llama", keep: float = 0.5, **options: Any) -> tuple[Any, Profile, Plan]:
    model = tiny.MODELS[kind]()
    profile = profile_model(model, tiny.batches(model), **options)
    return model, profile, make_plan(profile, keep=keep)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny.batches(model)[0]).logits
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def weighted_error(weight: Tensor, product: Tensor, fisher: Tensor) -> float:
    """sum_ij F_j (W - W_r)_ij^2, as the paper has it."""
    return float(((weight.double() - product.double()).square() * fisher).sum())


def least_error(weight: Tensor, fisher: Tensor, rank: int) -> float:
    """What no matrix of the rank can go below (Eckart & Young)."""
    values = torch.linalg.svdvals(weight.double() * fisher.sqrt())
    return float(values[rank:].square().sum())


def snapshot(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], dict[str, Tensor]]:
    modules = list(model.named_modules())
    return modules, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def require_unchanged(model: Any, before: Any, config: dict[str, Any]) -> None:
    modules, state = before
    now = list(model.named_modules())
    assert [name for name, _ in now] == [name for name, _ in modules]
    assert all(a is b for (_, a), (_, b) in zip(now, modules, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert getattr(model, "hf_quantizer", None) is None


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_the_applied_model_has_the_planned_size_to_the_parameter(kind: str) -> None:
    model, profile, plan = prepared(kind)
    dense = logits(model)
    before = sum(p.numel() for p in model.parameters())
    assert before == plan.size.model_dense
    assert apply_plan(model, plan, profile) is model
    assert sum(p.numel() for p in model.parameters()) == plan.size.model < before
    size = model_size(model)
    assert (size.planned, size.model) == (plan.size.planned, plan.size.model)
    assert size.model_bytes == plan.size.model_bytes
    for name, rank in plan.ranks.items():
        module = model.get_submodule(name)
        assert isinstance(module, LowRank) == (rank is not None)
        assert rank is None or module.rank == rank == module.down.weight.shape[0]
    assert distance(logits(model), dense) > 1e-3


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_the_loss_that_the_solver_saw_is_that_of_the_factors(kind: str) -> None:
    """Of every backend, by its own account of an error: see test_backends for that."""
    dense = tiny.MODELS[kind]().double()
    batches, found = tiny.batches(dense), find_layers(dense)
    profile = profile_model(dense, batches, backends=BUILT_IN, moments=False)
    objective = ModelLoss(profile.info.task, Estimator(profile.info.estimator))
    seen = gather(dense, found.modules, batches, objective, STATISTICS)
    for name in BUILT_IN:
        plan, model, backend = (
            make_plan(profile, keep=0.5, backend=name),
            copy.deepcopy(dense),
            find_backend(name),
        )
        apply_plan(model, plan, profile)
        size = sum(p.numel() for p in model.parameters())
        assert size == plan.size.model < plan.size.model_dense
        scale = next(iter(backend.scales.values()))
        lost, curve = 0.0, 0.0
        for layer in found.layers:
            rank, weight = plan.ranks[layer.name], weight_of(found.modules[layer.name])
            if rank is None:
                continue
            statistics, product = (
                seen.statistics(layer.name),
                model.get_submodule(layer.name).weight,
            )
            factor = scale.factor((layer.out_features, layer.in_features), statistics)
            ranks = profile.curves[name][layer.name].ranks if name == "tfwsvd" else range(rank + 1)
            at = list(ranks).index(rank)
            lost += factor * backend.error(weight, product.detach(), statistics)
            curve += factor * profile.curves[name][layer.name].losses[at]
        assert lost > 0.0
        assert lost == pytest.approx(plan.certificate.loss, rel=1e-5), name
        assert curve == pytest.approx(plan.certificate.loss, rel=1e-9), name


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_factors_of_full_rank_leave_the_logits_alone(kind: str) -> None:
    batches = tiny.batches(tiny.MODELS[kind]())
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.float64, 1e-10)):
        dense = tiny.MODELS[kind]().to(dtype)
        modules, before = find_layers(dense).modules, logits(dense)
        objective = ModelLoss(task_of(dense), Estimator())
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batches[0].items()}
        seen = gather(dense, modules, [batch], objective, STATISTICS)
        for name in BUILT_IN:
            model, method, new = copy.deepcopy(dense), find_backend(name), {}
            for layer, module in modules.items():
                weight, full = weight_of(module), min(weight_of(module).shape)
                kept = method.decompose(weight, seen.statistics(layer), full).kept
                up, down = (x.to(dtype) for x in method.factors(weight, kept, full))
                new[layer] = low_rank(module, down, up, getattr(module, "bias", None))
                assert new[layer].rank == full
            replace(model, new)
            assert distance(logits(model), before) < tolerance, name


def test_a_plan_that_is_all_dense_touches_no_module() -> None:
    model, profile, plan = prepared(keep=1.0)
    assert set(plan.ranks.values()) == {None}
    modules, before = list(model.modules()), logits(model)
    apply_plan(model, plan, profile)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["gpt2", "bert-classification"])
def test_bases_that_were_not_kept_are_computed_again(kind: str) -> None:
    model, profile, plan = prepared(kind, backends=["fwsvd"])
    other, without, same_plan = prepared(kind, backends=["fwsvd"], keep_bases=False)
    name = next(name for name, rank in plan.ranks.items() if rank is not None)
    assert profile.kept("fwsvd", name) and not without.kept("fwsvd", name)
    assert same_plan == plan
    apply_plan(model, plan, profile)
    apply_plan(other, plan, without)
    for name, rank in plan.ranks.items():
        if rank is not None:
            a, b = model.get_submodule(name).weight, other.get_submodule(name).weight
            assert distance(a, b) < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "albert"])
def test_the_context_puts_the_dense_model_back(kind: str) -> None:
    model, profile, plan = prepared(kind)
    before, config = snapshot(model), model.config.to_dict()
    with applied(model, plan, profile) as inside:
        assert inside is model
        assert model_size(model).model == plan.size.model
    require_unchanged(model, before, config)

    def fail() -> None:
        with applied(model, plan, profile):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    require_unchanged(model, before, config)


def test_a_cache_changes_nothing_but_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, profile, tight = prepared(keep=0.3)
    loose = make_plan(profile, keep=0.6)
    wanted = []
    for plan in (tight, loose):
        with applied(model, plan, profile):
            wanted.append(logits(model))
    calls, compute = [], surgery.Planned.kept
    counted = lambda *a: (calls.append(a[1]), compute(*a))[1]  # noqa: E731
    monkeypatch.setattr(surgery.Planned, "kept", counted)
    cache: FactorCache = {}
    for plan, expected in zip((tight, loose), wanted, strict=True):
        with applied(model, plan, profile, cache):
            assert distance(logits(model), expected) < 1e-4
    planned = {n for plan in (tight, loose) for n, rank in plan.ranks.items() if rank is not None}
    assert len(calls) == len(planned)


def test_an_error_on_the_way_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, profile, plan = prepared()
    before, config = snapshot(model), model.config.to_dict()
    calls, compute = [], surgery.Planned.kept

    def fails_at_third(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return compute(*args)

    monkeypatch.setattr(surgery.Planned, "kept", fails_at_third)
    with pytest.raises(MemoryError):
        apply_plan(model, plan, profile)
    require_unchanged(model, before, config)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_frozen_weights_are_kept(training: bool) -> None:
    model, profile, plan = prepared()
    model.train(training)
    name = next(name for name, rank in plan.ranks.items() if rank is not None)
    model.get_submodule(name).requires_grad_(False)
    apply_plan(model, plan, profile)
    assert all(module.training == training for module in model.modules())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}.down.weight", f"{name}.up.weight"}


def test_a_plan_of_another_profile_is_refused() -> None:
    model, profile, _ = prepared()
    other = profile_model(model, tiny.batches(model, count=1))
    before, config = snapshot(model), model.config.to_dict()
    with pytest.raises(PlanError, match="another profile"):
        apply_plan(model, make_plan(other, keep=0.5), profile)
    require_unchanged(model, before, config)


def perturbed() -> Any:
    model = tiny.llama()
    torch.manual_seed(5)
    with torch.no_grad():
        for block in model.model.layers:
            for name in ("self_attn.q_proj", "mlp.down_proj"):
                weight = block.get_submodule(name).weight
                weight.add_(torch.randn_like(weight), alpha=0.05)
    return model


@pytest.mark.parametrize(
    ("build", "allow_other_weights", "message"),
    [
        (
            lambda: tiny.llama(num_hidden_layers=1),
            True,
            r"model\.layers\.1\.self_attn\.q_proj is missing",
        ),
        (
            lambda: tiny.llama(num_hidden_layers=3),
            True,
            r"model\.layers\.2\.self_attn\.q_proj is not in the plan",
        ),
        (
            lambda: tiny.llama(intermediate_size=48),
            True,
            r"model\.layers\.0\.mlp\.gate_proj is 48 x 24, planned 40 x 24;.* and 3 more",
        ),
        (perturbed, False, r"model\.layers\.0\.self_attn\.q_proj has other weights;.* and 1 more"),
        (
            tiny.gpt2,
            False,
            r"another model \(LlamaForCausalLM\): model\.layers\.0.*q_proj is missing",
        ),
    ],
    ids=["missing", "more", "shape", "weights", "architecture"],
)
def test_a_plan_for_another_model_is_refused_naming_the_layers(
    build: Callable[[], Any], allow_other_weights: bool, message: str
) -> None:
    _, profile, plan = prepared()
    model = build()
    before, config = snapshot(model), model.config.to_dict()
    with pytest.raises(PlanError, match=message):
        apply_plan(model, plan, profile, allow_other_weights=allow_other_weights)
    require_unchanged(model, before, config)


def test_other_weights_are_factorised_on_request_and_optimally() -> None:
    _, profile, plan = prepared(backends=["fwsvd"])
    model = perturbed()
    dense = {name: weight_of(m).clone() for name, m in find_layers(model).modules.items()}
    apply_plan(model, plan, profile, allow_other_weights=True)
    stale = 0.0
    for name, rank in plan.ranks.items():
        if rank is not None:
            fisher = torch.from_numpy(profile.fisher_rows[name] / profile.units)
            least = least_error(dense[name], fisher, rank)
            product = model.get_submodule(name).weight.detach()
            assert weighted_error(dense[name], product, fisher) < least * (1 + 1e-3) + 1e-6
            basis = torch.from_numpy(profile.kept("fwsvd", name)["basis"])
            up, down = find_backend("fwsvd").factors(dense[name], {"basis": basis}, rank)
            stale = max(stale, weighted_error(dense[name], up @ down, fisher) / least)
    assert stale > 1.01, "the stored bases would have done as well"


@pytest.mark.parametrize("backend", ["kronecker", "whitened", "tfwsvd"])
def test_other_weights_keep_the_directions_that_cannot_be_found_again(backend: str) -> None:
    model, profile, plan = prepared(backends=[backend])
    apply_plan(model, plan, profile)
    for scale in (1.0, 1.5):
        other = tiny.llama()
        with torch.no_grad():
            for module in find_layers(other).modules.values():
                weight_of(module).mul_(scale)
                weight_of(module)[0, 0] += 1e-6
        apply_plan(other, plan, profile, allow_other_weights=True)
        for name, rank in plan.ranks.items():
            if rank is not None:
                low, wanted = (x.get_submodule(name).weight.detach() for x in (other, model))
                assert distance(low, scale * wanted) < 1e-3


def test_a_low_rank_model_is_refused() -> None:
    model, profile, plan = prepared()
    apply_plan(model, plan, profile)
    size = model_size(model)
    with pytest.raises(ModelError, match="low rank already"):
        apply_plan(model, plan, profile)
    with pytest.raises(ModelError, match="low rank already"):
        profile_model(model, tiny.batches(model))
    assert model_size(model) == size


def test_a_model_that_another_method_has_quantised_is_refused() -> None:
    model, profile, plan = prepared()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    modules = list(model.modules())
    with pytest.raises(ModelError, match="bitsandbytes"):
        apply_plan(model, plan, profile)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert model.config.quantization_config == {"quant_method": "bitsandbytes"}


def test_the_low_rank_layer_is_its_product() -> None:
    model, profile, plan = prepared("bert-classification")
    apply_plan(model, plan, profile)
    low = next(m for m in model.modules() if isinstance(m, LowRank))
    x = torch.randn(2, 3, low.in_features)
    wanted = nn.functional.linear(x, low.weight, low.bias)
    assert torch.allclose(low(x), wanted, atol=1e-4)
    alone = copy.deepcopy(low)
    assert torch.equal(alone(x), low(x))


def test_paths_are_not_what_lies_there() -> None:
    model = tiny.bert()
    profile = profile_model(model, tiny.batches(model))
    plan = make_plan(profile, keep=0.7)
    wrong: list[tuple[type[RankoptError], str, Any]] = [
        (ModelError, "a Module, .*: load it with transformers", ("model", plan, profile)),
        (PlanError, "a Plan, not a value of type str: read it", (model, "plan.json", profile)),
        (PlanError, "a Profile, not a value of type PosixPath", (model, plan, Path("p.st"))),
    ]
    for error, said, given in wrong:
        with pytest.raises(error, match=f"wanted is {said}"):
            apply_plan(*given)
    with pytest.raises(OptionError, match=r"a list of names, not one text: give \['svd'\]"):
        profile_model(model, tiny.batches(model), backends="svd")
