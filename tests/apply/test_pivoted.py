"""Models in the pivoted form: applied, saved, reloaded, merged, trained, adapted and exported."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankopt import applied, apply_plan, make_plan, profile_model, save_model
from rankopt.apply.surgery import low_rank
from rankopt.backends import find_backend
from rankopt.backends.statistics import STATISTICS
from rankopt.measure.accumulate import gather
from rankopt.measure.estimators import Estimator
from rankopt.measure.loss import ModelLoss
from rankopt.model.lowrank import LowRank
from rankopt.model.selection import find_layers
from rankopt.model.size import model_size
from rankopt.model.tasks import task_of
from rankopt.model.weights import weight_of
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from tests import tiny

KINDS = ["llama", "gpt2", "t5", "bert-classification", "albert"]


def prepared(kind: str = "llama", keep: float = 0.8, **options: Any) -> tuple[Any, Profile, Plan]:
    model = tiny.ARCHITECTURES[kind]() if kind in tiny.ARCHITECTURES else tiny.MODELS[kind]()
    profile = profile_model(model, tiny.batches(model), form="pivoted", **options)
    return model, profile, make_plan(profile, keep=keep)


def logits(model: Any) -> Tensor:
    # A copy is aligned in memory, so that equal weights give equal bits (see test_reload).
    aligned = copy.deepcopy(model).eval()
    with torch.no_grad():
        found: Tensor = aligned(**tiny.batches(model)[0]).logits
    return found


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_it_has_the_planned_size_and_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    model, profile, plan = prepared(kind)
    dense = logits(model)
    apply_plan(model, plan, profile)
    size = model_size(model)
    assert (size.planned, size.model) == (plan.size.planned, plan.size.model)
    assert size.model_bytes == plan.size.model_bytes
    low = {n: m for n, m in model.named_modules() if isinstance(m, LowRank)}
    assert {n: m.rank for n, m in low.items()} == {n: r for n, r in plan.ranks.items() if r}
    assert low and all(m.form == "pivoted" for m in low.values())
    before = logits(model)
    assert not torch.allclose(before, dense, atol=1e-5)
    save_model(model, tmp_path / "model", plan=plan)
    found, report = type(model).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    assert list(found.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    assert torch.equal(logits(found), before)
    found.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "again")), before)
    merged = found.dequantize()
    assert model_size(merged).model == plan.size.model_dense
    assert (logits(merged) - before).abs().max() < 1e-3 * before.abs().max()


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k in ("llama", "gpt2") else pytest.mark.slow) for k in KINDS],
)
def test_the_loss_curve_is_that_of_the_layers_at_every_rank_up_to_full(kind: str) -> None:
    model = tiny.MODELS[kind]().double()
    batches, found = tiny.batches(model), find_layers(model)
    seen = gather(model, found.modules, batches, ModelLoss(task_of(model), Estimator()), STATISTICS)
    for name in ("svd", "fwsvd", "fwsvd_two_sided", "whitened", "kronecker"):
        backend = find_backend(name)
        for x in found.layers[:7]:
            module, statistics = found.modules[x.name], seen.statistics(x.name)
            weight = weight_of(module)
            made = backend.decompose(weight, statistics, x.largest_rank("pivoted"))
            losses = made.losses.tolist()
            for rank in range(1, x.largest_rank("pivoted") + 1):
                up, down = backend.factors(weight, made.kept, rank)
                low = low_rank(module, down, up, getattr(module, "bias", None), "pivoted")
                error = backend.error(weight, low.weight.detach(), statistics)
                assert error == pytest.approx(losses[rank], rel=1e-5, abs=1e-9 * losses[0])


def test_a_plan_in_pairs_from_the_same_profile_is_that_of_a_profile_for_pairs() -> None:
    model, profile, _ = prepared("llama")
    pairs = profile_model(model, tiny.batches(model), form="pairs")
    one = make_plan(profile, keep=0.5, form="pairs")
    two = make_plan(pairs, keep=0.5)
    assert one.ranks == two.ranks
    found = []
    for plan, source in ((one, profile), (two, pairs)):
        with applied(model, plan, source):
            found.append(logits(model))
    assert torch.equal(*found)


def test_heads_and_embeddings_that_are_untied(tmp_path: Path) -> None:
    model = tiny.llama()
    profile = profile_model(
        model,
        tiny.batches(model),
        include=["lm_head", "*q_proj"],
        untie=True,
        form="pivoted",
        backends=("kronecker",),
    )
    plan = make_plan(profile, keep=0.6)
    assert plan.ranks["lm_head"] is not None
    apply_plan(model, plan, profile)
    assert model_size(model).model == plan.size.model
    save_model(model, tmp_path / "model")
    found = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(logits(found), logits(model))


def test_it_trains_and_takes_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, profile, plan = prepared("llama", keep=0.6)
    apply_plan(model, plan, profile)
    before = {n: p.clone() for n, p in model.named_parameters()}
    batch = tiny.batches(model)[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = model(**batch).loss
    first.backward()
    optimizer.step()
    assert model(**batch).loss < first
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    names = [n for n, m in model.named_modules() if isinstance(m, LowRank)]
    assert {f"{n}.{part}.weight" for n in names for part in ("down", "up")} <= moved
    with torch.no_grad():
        wanted = model(**batch).logits
    adapted: Any = get_peft_model(
        model, LoraConfig(r=2, target_modules=["down", "up"], init_lora_weights=False)
    )
    with torch.no_grad():
        moved_logits = adapted(**batch).logits
    assert not torch.allclose(moved_logits, wanted, atol=1e-4)
    merged = adapted.merge_and_unload()
    assert torch.allclose(logits(merged), moved_logits, atol=1e-4)
    save_model(merged, tmp_path / "merged")
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path / "merged")), logits(merged))


def test_bfloat16_and_other_dtypes_after_apply(tmp_path: Path) -> None:
    model = tiny.llama().to(torch.bfloat16)
    profile = profile_model(model, tiny.batches(model), form="pivoted")
    plan = make_plan(profile, keep=0.7)
    apply_plan(model, plan, profile)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_model(model, tmp_path / "model")
    found = type(model).from_pretrained(tmp_path / "model")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    wide = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32)
    low = next(m for m in wide.modules() if isinstance(m, LowRank))
    assert low.up.weight.dtype == torch.float32 and low.index.dtype == torch.int64


@pytest.mark.slow
def test_compiled_and_exported() -> None:
    model, profile, plan = prepared("bert-classification")
    apply_plan(model, plan, profile)
    batch = tiny.batches(model)[0]
    wanted = model(**batch).logits
    compiled: Any = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(**batch).logits, wanted, atol=1e-5)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            found: Tensor = self.inner(input_ids=ids, attention_mask=mask).logits
            return found

    given = (batch["input_ids"], batch["attention_mask"])
    exported = torch.export.export(Plain(), given)
    assert torch.allclose(exported.module()(*given), wanted, atol=1e-5)
