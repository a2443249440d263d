"""Embeddings and untied heads: planned, applied, saved, reloaded, merged and put back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from rankopt import (
    LowRank,
    Plan,
    PlanError,
    Profile,
    applied,
    apply_plan,
    evaluate,
    make_plan,
    profile_model,
    save_model,
)
from rankopt.apply.surgery import low_rank
from rankopt.model.lowrank import LowRankEmbedding
from rankopt.model.selection import find_layers
from rankopt.model.size import model_size
from rankopt.model.weights import weight_of
from tests import tiny

#: name -> builder, head, embedding: one Parameter in two modules.
TIED = {
    "llama": (tiny.llama, "lm_head", "model.embed_tokens"),
    "gpt2": (tiny.gpt2, "lm_head", "transformer.wte"),
    "bert": (
        lambda: tiny.bert("MaskedLM"),
        "cls.predictions.decoder",
        "bert.embeddings.word_embeddings",
    ),
    "whisper": (tiny.whisper, "proj_out", "model.decoder.embed_tokens"),
}


def untied(kind: str, **options: Any) -> tuple[Any, Profile, Plan]:
    """A model of TIED whose head and embedding, and one more layer, are planned."""
    build, head, _ = TIED[kind]
    model = build()
    first = find_layers(model).layers[0].name
    profile = profile_model(
        model, tiny.batches(model), include=[head, first], untie=True, **options
    )
    return model, profile, make_plan(profile, keep=0.4)


def logits(model: Any) -> Tensor:
    # A copy is aligned in memory, so that equal weights give equal bits (see test_reload).
    aligned = copy.deepcopy(model).eval()
    with torch.no_grad():
        found: Tensor = aligned(**tiny.batches(model)[0]).logits
    return found


def factors(dense: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight_of(dense), full_matrices=False)
    return values[:rank, None] * right[:rank], left[:, :rank]


def test_a_low_rank_embedding_is_its_product() -> None:
    torch.manual_seed(0)
    dense = nn.Embedding(9, 5, padding_idx=2)
    down, up = factors(dense, 5)
    low = low_rank(dense, down, up, None)
    assert isinstance(low, LowRankEmbedding)
    index = torch.tensor([[0, 8, 2], [1, 1, 3]])
    assert torch.allclose(low(index), dense(index), atol=1e-6)
    assert torch.allclose(low.weight, dense.weight, atol=1e-6)
    assert (low.num_embeddings, low.embedding_dim, low.padding_idx) == (9, 5, 2)
    narrow = low_rank(dense, down[:2], up[:, :2], None)
    assert sum(p.numel() for p in narrow.parameters()) == 2 * (9 + 5)
    assert torch.allclose(narrow(index), nn.functional.embedding(index, narrow.weight), atol=1e-6)
    assert type(narrow.down) is nn.Embedding and type(narrow.up) is nn.Linear
    narrow(index).square().sum().backward()
    gradient = narrow.down.weight.grad
    assert gradient is not None and not gradient[2].any() and gradient[8].any()


def test_what_is_frozen_stays_frozen() -> None:
    dense = nn.Linear(4, 3).eval()
    dense.weight.requires_grad_(False)
    low = low_rank(dense, *factors(dense, 2), dense.bias)
    assert not low.training
    assert {n for n, p in low.named_parameters() if p.requires_grad} == {"up.bias"}
    assert low.up.bias is dense.bias


@pytest.mark.parametrize("kind", TIED)
def test_head_and_embedding_get_factors_of_their_own(kind: str) -> None:
    model, profile, plan = untied(kind)
    _, head, embedding = TIED[kind]
    dense, before = logits(model), model_size(model, profile.info.layers)
    rank = plan.ranks[head]
    assert rank is not None and embedding not in plan.ranks
    assert before.model == plan.size.model_dense and before.planned == plan.size.planned_dense
    apply_plan(model, plan, profile)
    a, b = model.get_submodule(head), model.get_submodule(embedding)
    assert isinstance(a, LowRank) and isinstance(b, LowRank)
    assert a.rank == b.rank == rank
    assert not torch.allclose(a.weight, b.weight, atol=1e-3), "both see their own statistics"
    size = model_size(model, profile.info.layers)
    assert (size.model, size.planned) == (plan.size.model, plan.size.planned)
    assert size.model < before.model
    assert evaluate(model, tiny.batches(model), layers=profile.info.layers).planned_parameters == (
        plan.size.planned
    )
    assert float((logits(model) - dense).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", TIED)
def test_an_untied_model_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, profile, plan = untied(kind)
    apply_plan(model, plan, profile)
    save_model(model, tmp_path / "one", plan=plan)
    found, report = type(model).from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(report.values()), report
    found.save_pretrained(tmp_path / "two")
    for again in (found, type(model).from_pretrained(tmp_path / "two")):
        ours, theirs = model.state_dict(), again.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert torch.equal(logits(again), logits(model))
        assert model_size(again, profile.info.layers).model == plan.size.model
        again.tie_weights()
        assert torch.equal(logits(again), logits(model)), "tied again"


@pytest.mark.parametrize("kind", TIED)
def test_the_context_ties_again(kind: str) -> None:
    model, profile, plan = untied(kind)
    _, head, embedding = TIED[kind]
    config, ties, before = model.config.to_dict(), dict(model.all_tied_weights_keys), logits(model)
    with applied(model, plan, profile):
        assert model.config.tie_word_embeddings is False
        assert model_size(model, profile.info.layers).model == plan.size.model
    assert model.config.to_dict() == config
    assert model.all_tied_weights_keys == ties
    assert model.get_submodule(head).weight is model.get_submodule(embedding).weight
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", TIED)
def test_dequantize_merges_both_and_saves_itself(kind: str, tmp_path: Path) -> None:
    model, profile, plan = untied(kind)
    _, head, embedding = TIED[kind]
    apply_plan(model, plan, profile)
    save_model(model, tmp_path / "low")
    dense = type(model).from_pretrained(tmp_path / "low").dequantize()
    assert type(dense.get_submodule(head)) is nn.Linear
    assert type(dense.get_submodule(embedding)) is nn.Embedding
    assert torch.allclose(logits(dense), logits(model), atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    found, report = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(found), logits(dense))


def test_a_biased_head_keeps_the_second_name_of_its_bias(tmp_path: Path) -> None:
    model, profile, plan = untied("bert")
    apply_plan(model, plan, profile)
    model.save_pretrained(tmp_path)
    for each in (model, type(model).from_pretrained(tmp_path)):
        assert each.cls.predictions.decoder.up.bias is each.cls.predictions.bias


def test_the_base_of_an_untied_model_has_the_embedding_but_no_head(tmp_path: Path) -> None:
    model, profile, plan = untied("llama")
    apply_plan(model, plan, profile)
    save_model(model, tmp_path / "model")
    base, report = AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert torch.equal(base.embed_tokens.weight, model.model.embed_tokens.weight)


def test_text_is_generated_after_untying() -> None:
    model, profile, plan = untied("llama")
    apply_plan(model, plan, profile)
    prompt = torch.tensor([[5, 6, 7]])
    made = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        last = model(input_ids=made[:, :-1]).logits[0, -1].argmax()
    assert made.shape == (1, 7) and made[0, -1] == last


@pytest.mark.parametrize("name", ["bert.embeddings.word_embeddings", "bert.pooler.dense"])
def test_untied_embeddings_and_poolers_are_layers_like_others(name: str, tmp_path: Path) -> None:
    model = tiny.bert()
    profile = profile_model(model, tiny.batches(model), include=[name, "*.layer.0.output.dense"])
    plan = make_plan(profile, keep=0.4)
    apply_plan(model, plan, profile)
    assert model_size(model, profile.info.layers).planned == plan.size.planned
    assert model.get_submodule(name).rank == plan.ranks[name]
    save_model(model, tmp_path / "model")
    found = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(logits(found), logits(model))


def test_the_rows_of_an_embedding_are_squared_gradients_of_single_examples() -> None:
    model = tiny.llama().double()
    (batch,) = tiny.batches(model, count=1)
    profile = profile_model(model, [batch], include=["lm_head"], untie=True)
    embedding = torch.zeros(64, dtype=torch.float64)
    for n in range(3):
        # Untied here, so that the gradients of the two modules come apart.
        alone = copy.deepcopy(model)
        alone.lm_head.weight = nn.Parameter(alone.lm_head.weight.detach().clone())
        one = {name: value[n : n + 1] for name, value in batch.items()}
        loss = alone(**one).loss * (one["labels"][:, 1:] != -100).sum()
        loss.backward()
        embedding += alone.model.embed_tokens.weight.grad.square().sum(1)
    found = torch.from_numpy(profile.fisher_rows["model.embed_tokens"])
    # transformers' causal loss goes through float32.
    assert torch.allclose(found, embedding, rtol=1e-4, atol=float(embedding.max()) * 1e-6)
    assert found[batch["input_ids"].max() + 1 :].sum() == 0.0
    assert profile.fisher_rows["lm_head"].shape == (24,)


def test_a_plan_with_a_pair_is_refused_by_a_model_without() -> None:
    _, profile, plan = untied("llama")
    other = tiny.llama(tie_word_embeddings=False)
    with pytest.raises(PlanError, match=r"lm_head is not tied to model\.embed_tokens as planned"):
        apply_plan(other, plan, profile, allow_other_weights=True)
    single = profile_model(other, tiny.batches(other), include=["lm_head"])
    with pytest.raises(PlanError, match=r"lm_head cannot be planned \(.*tied to model\.embed_tok"):
        apply_plan(tiny.llama(), make_plan(single, keep=0.4), single, allow_other_weights=True)
