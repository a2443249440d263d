"""Plans with bits: the bytes and values of rounded layers, and models that have some."""

import builtins
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankopt import (
    LowRank,
    MissingExtraError,
    ModelError,
    PlanError,
    applied,
    apply_plan,
    evaluate,
    make_plan,
    profile_model,
    refine,
    save_model,
)
from rankopt.apply.quantizer import layers_of
from rankopt.backends import find_backend
from rankopt.layers import Bits
from rankopt.model.rounding import bits_of, nbytes_of, packed, parts_of, plain
from rankopt.model.size import model_size
from rankopt.plan.plan import Plan
from tests import tiny
from tests.rounded import KINDS, WIDE, prepared, with_bits

pytest.importorskip("torchao", exc_type=ImportError)

FORMS = ["pairs", "pivoted"]


def logits(model: Any) -> Tensor:
    aligned = copy.deepcopy(model).eval()
    with torch.no_grad():
        found: Tensor = aligned(**tiny.batches(model)[0]).logits
    return found


def matrices(module: nn.Module) -> list[Any]:
    return [module.down, module.up] if isinstance(module, LowRank) else [module]


def by_torchao(weight: Tensor, bits: Bits) -> Tensor:
    """What torchao's own call makes of a weight."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach().clone().contiguous())
    four: Any = vars(torch)["int4"]
    quantize_(
        layer,
        Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(four, PerGroup(32)),
    )
    held: Any = layer.weight
    found: Tensor = held.dequantize()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_rounded_weight_is_near_and_its_parts_are_small(bits: Bits, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 96).to(dtype)
    weight[3] = 0.0
    held = packed(weight, bits)
    assert bits_of(held) == bits and not held.requires_grad and held.dtype == dtype
    assert torch.equal(plain(held), by_torchao(weight, bits)) and not plain(held)[3].any()
    parts = parts_of(held)
    assert {part.dtype for part in parts.values()} == (
        {torch.int8, torch.float32} if bits == 8 else {torch.uint8, dtype}
    )
    assert sum(part.nbytes for part in parts.values()) == nbytes_of(held)
    assert nbytes_of(held) == (40 * 96 + 4 * 40 if bits == 8 else 40 * 48 + 120 * dtype.itemsize)
    largest = weight.float().abs().amax(1, keepdim=True)
    error = (plain(held).float() - weight.float()).abs()
    assert (error <= 1.1 * largest / (127 if bits == 8 else 7)).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_bytes_and_the_values_of_the_plan(
    kind: str, dtype: torch.dtype, form: str
) -> None:
    model = WIDE[kind]().to(dtype)
    profile, plan = prepared(model, form)
    free = Plan.model_validate(with_bits(plan, (None,)).model_dump())
    reference = apply_plan(copy.deepcopy(model), free, profile)
    dense = copy.deepcopy(model)
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    apply_plan(model, plan, profile)
    seen = set()
    for entry in plan.layers:
        module = model.get_submodule(entry.layer.name)
        ours = matrices(module)
        assert sum(nbytes_of(x.weight) for x in ours) == entry.bytes_in(plan.form)
        assert {bits_of(x.weight) for x in ours} == {entry.bits}
        seen.add((entry.rank is None, entry.bits))
        theirs = matrices(reference.get_submodule(entry.layer.name))
        if entry.rank is None and entry.bits is not None:
            assert type(module) is nn.Linear
        for a, b in zip(ours, theirs, strict=True):
            turned = type(b).__name__ == "Conv1D" and type(a) is nn.Linear
            weight = b.weight.T if turned else b.weight
            wanted = weight if entry.bits is None else by_torchao(weight, entry.bits)
            assert torch.equal(plain(a.weight), wanted)
    assert len(seen) >= 4
    size, counted = model_size(model, [x.layer for x in plan.layers]), plan.size
    wanted = (counted.planned, counted.model, counted.model_bytes)
    assert (size.planned, size.model, size.model_bytes) == wanted
    assert model_size(model) == size
    assert set(map(id, biases.values())) <= set(map(id, model.parameters()))
    if dtype == torch.float32:
        # What is computed is what the rounded values give.
        by_values = copy.deepcopy(reference)
        for entry in plan.layers:
            pairs = zip(
                matrices(model.get_submodule(entry.layer.name)),
                matrices(by_values.get_submodule(entry.layer.name)),
                strict=True,
            )
            for a, b in pairs:
                turned = type(b).__name__ == "Conv1D" and type(a) is nn.Linear
                values = plain(a.weight.detach())
                b.weight.data = values.T.contiguous() if turned else values
        assert torch.allclose(logits(model), logits(by_values), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(logits(model), logits(dense), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_it_is_dense_and_computes_the_same(kind: str) -> None:
    model = WIDE[kind]()
    profile, plan = prepared(model)
    kinds = {x.layer.name: type(model.get_submodule(x.layer.name)) for x in plan.layers}
    names = set(model.state_dict())
    apply_plan(model, plan, profile)
    before = logits(model)
    assert layers_of(model)
    model.dequantize()
    assert {name: type(model.get_submodule(name)) for name in kinds} == kinds
    assert set(model.state_dict()) == names and not layers_of(model) and not model.is_quantized
    assert model_size(model).model_bytes == plan.size.model_bytes_dense
    assert (logits(model) - before).abs().max() < 1e-4 * before.abs().max()
    if kind != "t5":
        model(**tiny.batches(model)[0]).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "layer" in n)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_applied_gives_the_dense_model_back(kind: str, form: str) -> None:
    model = WIDE[kind]()
    profile, plan = prepared(model, form)
    modules, weights = dict(model.named_modules()), dict(model.named_parameters())
    before, ties = logits(model), dict(model.all_tied_weights_keys)
    with applied(model, plan, profile):
        inside = logits(model)
        assert not torch.equal(inside, before)
        assert model.is_quantized
    assert dict(model.named_modules()) == modules
    again = dict(model.named_parameters())
    assert again.keys() == weights.keys() and all(again[n] is weights[n] for n in weights)
    assert torch.equal(logits(model), before) and model.all_tied_weights_keys == ties
    assert not hasattr(model.config, "quantization_config") and not model.is_quantized
    apply_plan(model, plan, profile)
    assert torch.equal(logits(model), inside)


def test_only_rounded_layers() -> None:
    model = WIDE["bert"]()
    profile = profile_model(model, tiny.batches(model))
    plan = with_bits(make_plan(profile, keep=1.0, pins={"*": "dense"}), (8,))
    assert not any(plan.ranks.values())
    apply_plan(model, plan, profile)
    assert len(layers_of(model)) == len(plan.layers)
    with pytest.raises(ModelError, match="quantised"):
        apply_plan(model, plan, profile)


def test_evaluate_counts_bytes_and_measures_the_rounded_model() -> None:
    model = WIDE["llama"]()
    profile, plan = prepared(model)
    apply_plan(model, plan, profile)
    found = evaluate(model, tiny.batches(model))
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in tiny.batches(model)]
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found.model_bytes == plan.size.model_bytes


def without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    true = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "torchao":
            raise ModuleNotFoundError("No module named 'torchao'", name="torchao")
        return true(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_torchao_nothing_is_changed_and_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = WIDE["llama"]()
    profile, plan = prepared(model)
    modules = dict(model.named_modules())
    apply_plan(copied := copy.deepcopy(model), plan, profile)
    save_model(copied, tmp_path / "model")
    without_torchao(monkeypatch)
    for attempt in (lambda: apply_plan(model, plan, profile), lambda: enter(model, plan, profile)):
        with pytest.raises(MissingExtraError, match=r"pip install 'rankopt\[quantize\]'"):
            attempt()
        assert dict(model.named_modules()) == modules
        assert not hasattr(model.config, "quantization_config")
    with pytest.raises(MissingExtraError, match=r"loading .* needs torchao .*rankopt\[quantize\]"):
        type(model).from_pretrained(tmp_path / "model")
    # Without bits it is not asked for.
    apply_plan(model, with_bits(plan, (None,)), profile)


def enter(*args: Any) -> None:
    with applied(*args):
        pass


def test_a_layer_that_cannot_be_rounded_leaves_the_model_whole() -> None:
    model = WIDE["llama"]().double()
    profile, plan = prepared(model)
    modules = dict(model.named_modules())
    with pytest.raises(ModelError, match=r"q_proj is of torch.float64, .*model.to"):
        apply_plan(model, plan, profile)
    assert dict(model.named_modules()) == modules
    model = tiny.llama(hidden_size=96, intermediate_size=128, tie_word_embeddings=False)
    profile = profile_model(model, tiny.batches(model), include=["*embed_tokens", "*q_proj"])
    plan = with_bits(make_plan(profile, keep=0.8), (8,))
    with pytest.raises(ModelError, match="embed_tokens is an embedding, and those are not rounded"):
        apply_plan(model, plan, profile)
    assert not any(isinstance(module, LowRank) for module in model.modules())


def test_a_plan_with_bits_for_shared_or_odd_layers_is_none() -> None:
    model = WIDE["llama"]()
    _, plan = prepared(model)
    entry = next(e for e in plan.layers if e.rank is not None)
    odd = entry.model_copy(
        update={"rank": 17, "parameters": entry.layer.cost(17, "pairs"), "bits": 4}
    )
    with pytest.raises(ValueError, match="cannot be rounded to 4 bits"):
        odd.require_counted("pairs", "layers.0")
    text = plan.to_json().replace('"bits": 8', '"bits": 3', 1)
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_rounded_weights_do_not_learn(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = WIDE["bert"]()
    dense = copy.deepcopy(model)
    profile, plan = prepared(model)
    apply_plan(model, plan, profile)
    save_model(model, tmp_path / "model")
    for each in (model, type(model).from_pretrained(tmp_path / "model")):
        assert not each.hf_quantizer.is_trainable and not each.hf_quantizer.is_qat_trainable
        with pytest.raises(ValueError, match="quantized"):
            Trainer(each, TrainingArguments(str(tmp_path / "run"), report_to=[]))
        with pytest.raises(ModelError, match=r"is rounded, .*do not learn: refine a model that a"):
            refine(each, dense, tiny.batches(model, 4))
    free = apply_plan(copy.deepcopy(dense), with_bits(plan, (None,)), profile)
    assert free.hf_quantizer.is_trainable and free.hf_quantizer.is_qat_trainable


def test_a_rounded_model_is_not_profiled_nor_planned_again() -> None:
    model = WIDE["llama"]()
    profile, plan = prepared(model, bits=(8,))
    apply_plan(model, plan, profile)
    with pytest.raises(ModelError):
        profile_model(model, tiny.batches(model))
    with pytest.raises((ModelError, PlanError)):
        apply_plan(model, plan, profile)


def test_all_layers_of_a_backend_that_needs_no_data() -> None:
    model = WIDE["gpt2"]()
    profile = profile_model(model, tiny.batches(model), backends=("svd",))
    plan = with_bits(make_plan(profile, keep=0.85, rank_multiple=32), (4,))
    assert find_backend(plan.backend).name == "svd"
    apply_plan(model, plan, profile)
    assert model_size(model).model_bytes == plan.size.model_bytes


@pytest.mark.slow
def test_torchao_says_nothing_on_import() -> None:
    code = (
        "import rankopt\n"
        "from transformers import BertModel\n"
        "from rankopt.model.rounding import require_torchao\n"
        "require_torchao('a test')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr and not done.stdout
