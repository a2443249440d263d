"""Squared gradients equal per-example gradients taken one by one; no known trap is stepped into."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import BertForSequenceClassification

from rankopt import DataError, ModelError, make_plan, profile_model
from rankopt.apply.apply import applied
from rankopt.measure.collector import Collector
from rankopt.measure.fisher import squared_gradients, squared_gradients_of_embedding
from rankopt.model.selection import find_layers
from tests import tiny
from tests.measure.exact import (
    Rows,
    brute_force,
    columns_of,
    difference,
    in_double,
    measured,
    one_by_one,
    rows_of,
    squares,
    targets_by_hand,
    three_sums,
    weight_gradients,
    wide,
)


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_sums_equal_squared_gradients_of_single_examples(kind: str) -> None:
    model = tiny.ARCHITECTURES[kind]()
    batches = tiny.batches(model)
    _, in_float32 = three_sums(model, batches)
    if kind == "t5":
        # Its unscaled attention turns float32 into 1e-4, of any way to compute the gradients.
        own = squares(model, batches)
    model, batches = in_double(model), [wide(batch) for batch in batches]
    wanted = by_statistic(squares(model, batches))
    profile, found = three_sums(model, batches)
    for statistic, expected in wanted.items():
        assert difference(found[statistic], expected) < 1e-10, statistic
        most = 1e-5
        if kind == "t5":
            limit = 2e-3 if tiny.t5_is_eager() else 1e-3
            most = min(max(most, 3 * difference(by_statistic(own)[statistic], expected)), limit)
        assert difference(in_float32[statistic], expected) < most, statistic
    assert profile.examples == 6
    assert profile.info.targets == targets_by_hand(model, batches)


def by_statistic(elements: Rows) -> dict[str, Rows]:
    return {
        "rows": {name: found.sum(0) for name, found in elements.items()},
        "columns": {name: found.sum(1) for name, found in elements.items()},
        "elements": elements,
    }


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_head_and_its_embedding_have_each_the_gradients_of_its_own_uses(kind: str) -> None:
    model = in_double(tiny.ARCHITECTURES[kind]())
    tied = model.config.tie_word_embeddings
    chosen: dict[str, Any] = {"include": ["lm_head"], "untie": True}
    if not tied:
        chosen = {"include": ["lm_head", "model.embed_tokens"]}
    batches = tiny.batches(model)
    elements = squares(model, batches, **chosen)
    assert len(elements) == 2
    wanted = by_statistic(elements)
    profile = profile_model(
        model, batches, backends=["fwsvd_two_sided"], keep_bases=False, **chosen
    )
    assert difference(rows_of(profile), wanted["rows"]) < 1e-10
    assert difference(columns_of(profile), wanted["columns"]) < 1e-10
    assert len(profile.info.layers) == (1 if tied else 2)
    shared = weight_gradients(model, one_by_one(batches)[0], **chosen)
    assert float((shared["lm_head"] - shared["model.embed_tokens"].T).norm()) > 0.1


def test_an_embedding_is_a_linear_layer_of_one_hot_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (3, 9), generator=generator)
    g = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64)
    found = squared_gradients_of_embedding(ids, g, 7, elements=True)
    x = nn.functional.one_hot(ids, 7).double()
    wanted = torch.einsum("bti,bto->boi", x, g).square().sum(0)
    assert torch.allclose(found.elements, wanted, rtol=1e-12)
    assert torch.allclose(found.rows, wanted.sum(0), rtol=1e-12)
    assert torch.allclose(found.columns, wanted.sum(1), rtol=1e-12)
    each_place = g.square().sum((0, 1))
    assert not torch.allclose(found.columns, each_place, rtol=0.1), "no word is there twice"


@pytest.mark.parametrize("kind", ["llama", "albert", "t5"])
def test_rows_do_not_depend_on_the_batch_size(kind: str) -> None:
    model = tiny.MODELS[kind]().double()
    batches = tiny.batches(model)
    joined = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    wanted = measured(model, batches)
    assert difference(measured(model, one_by_one(batches)), wanted) < 1e-10
    assert difference(measured(model, [joined]), wanted) < 1e-10


def test_squaring_the_gradient_of_a_batch_is_another_number() -> None:
    model = tiny.bert().double()
    batches = tiny.batches(model)
    squared_means: Rows = {}
    for batch in batches:
        for name, gradient in weight_gradients(model, batch).items():
            seen = squared_means.get(name, torch.zeros(()))
            squared_means[name] = seen + gradient.square().sum(0) / len(batch["labels"])
    assert difference(squared_means, measured(model, batches)) > 0.1


def test_squaring_each_use_of_a_shared_block_is_another_number() -> None:
    model = tiny.albert().double()
    batches = tiny.batches(model)
    each_use: Rows = {}

    class Careless(Collector):
        def _record(self, name: str, x: Tensor, g: Tensor) -> None:
            rows = squared_gradients(x, g).rows
            each_use[name] = each_use.get(name, torch.zeros(())) + rows

    with Careless(model, find_layers(model).modules) as careless:
        for batch in batches:
            careless.begin(3, 8)
            careless.backward(model(**batch).loss * 3)
    assert difference(each_use, measured(model, batches)) > 0.1


@pytest.mark.parametrize(("tokens", "products"), [(2, 2), (64, 0)], ids=["gram", "direct"])
def test_both_branches_equal_the_dense_formula(
    tokens: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, tokens, 5, generator=generator, dtype=torch.float64)
    g = torch.randn(3, tokens, 7, generator=generator, dtype=torch.float64)
    wanted = torch.einsum("bti,bto->bio", x, g).square().sum((0, 2))
    before, calls, multiply = (x.clone(), g.clone()), [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: (calls.append(a.shape), multiply(a, b))[1])
    found = squared_gradients(x, g).rows
    assert len(calls) == products, "another branch was taken"
    assert torch.allclose(found, wanted, rtol=1e-12, atol=0.0)
    both = squared_gradients(x, g, columns=True)
    columns = torch.einsum("bti,bto->bio", x, g).square().sum((0, 1))
    assert both.columns is not None
    assert torch.allclose(both.rows, wanted, rtol=1e-12, atol=0.0)
    assert torch.allclose(both.columns, columns, rtol=1e-12, atol=0.0)
    assert torch.equal(x, before[0]) and torch.equal(g, before[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_causal_labels_are_the_input_and_are_not_shifted_twice(kind: str) -> None:
    model = tiny.MODELS[kind]().double()
    ids = torch.randint(3, tiny.VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
    omitted = measured(model, [{"input_ids": ids}])
    given = measured(model, [{"input_ids": ids, "labels": ids}])
    shifted = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], dim=1)
    assert difference(omitted, given) == 0.0
    with pytest.raises(DataError, match="the labels are the next tokens of the input"):
        measured(model, [{"input_ids": ids, "labels": shifted}])


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_tokens_in_padding_change_nothing(kind: str) -> None:
    model = tiny.MODELS[kind]().double()
    batches = [wide(batch) for batch in tiny.batches(model)]
    garbage = [
        {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 9)}
        for batch in batches
    ]
    unmasked = [{k: v for k, v in b.items() if k != "attention_mask"} for b in garbage]
    wanted = measured(model, batches)
    assert difference(measured(model, garbage), wanted) < 1e-10
    if kind not in ("llama", "gpt2"):
        # Behind the last label of a causal model masked or not is all the same.
        assert difference(measured(model, unmasked), wanted) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-tokens"])
def test_labels_of_padding_are_ignored(kind: str) -> None:
    model = tiny.MODELS[kind]().double()
    batches = tiny.batches(model)
    careless = [{**b, "labels": b["labels"].masked_fill(b["labels"] == -100, 2)} for b in batches]
    wanted = measured(model, batches)
    assert difference(measured(model, careless), wanted) < 1e-10
    assert difference(brute_force(model, careless), wanted) > 1e-2


@pytest.mark.parametrize("kind", ["gpt2", "bert-classification"])
def test_dropout_is_off_and_the_model_is_left_as_it_was(kind: str) -> None:
    model = tiny.MODELS[kind]().double()
    batches = tiny.batches(model)
    wanted = measured(model, batches)
    model.train()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    quiet = list(model.modules())[-1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measured(model, batches)
    torch.manual_seed(0)
    assert difference(found, wanted) == 0.0
    assert difference(brute_force(model, batches), wanted) > 1e-2, "dropout does nothing here"
    require_untouched(model, before)
    assert all(module.training == (module is not quiet) for module in model.modules())
    assert all(p.requires_grad == (p is not frozen) for p in model.parameters())


def require_untouched(model: nn.Module, before: Rows) -> None:
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = tiny.gpt2().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = tiny.batches(model)[0]
    with pytest.raises(DataError):
        measured(model, [good, {**good, "labels": torch.full_like(good["labels"], -100)}])
    require_untouched(model, before)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Checkpointed(nn.Module):
    """Two blocks, the second used twice, each under activation checkpointing."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.first, self.wide, self.narrow = nn.Linear(5, 6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.double()

    def block(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.narrow(torch.tanh(self.wide(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            if self.reentrant is None:
                x = self.block(x)
            else:
                x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return x.square().sum()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def rows(model: Checkpointed) -> Rows:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        with Collector(model, layers) as fisher:
            for _ in range(2):
                fisher.begin(3, 4)
                fisher.backward(model(x))
        return {name: sums.rows for name, sums in fisher.sums.items()}

    assert difference(rows(Checkpointed(reentrant)), rows(Checkpointed(None))) < 1e-12


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_transformers_changes_nothing(reentrant: bool) -> None:
    model = tiny.gpt2().double()
    batches = tiny.batches(model)
    wanted = measured(model, batches)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert difference(measured(model.train(), batches), wanted) < 1e-12


def test_inputs_that_are_always_zero_stay_finite() -> None:
    model = tiny.t5()
    with torch.no_grad():
        model.encoder.block[0].layer[1].DenseReluDense.wi.weight[:30] = 0.0
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    batches = tiny.batches(model)
    profile = profile_model(model, batches)
    assert (profile.fisher_rows[name] == 0.0).sum() >= 30
    assert profile.fisher_rows[name].max() > 0.0
    with applied(model, make_plan(profile, keep=0.5), profile):
        assert torch.isfinite(model(**batches[0]).logits).all()


def test_half_precision_is_squared_and_summed_in_float32() -> None:
    layer = nn.Linear(4, 6, bias=False, dtype=torch.float16)
    x = torch.ones(2, 1, 4, dtype=torch.float16)
    with Collector(layer, {"layer": layer}) as fisher:
        fisher.begin(2, 1)
        fisher.backward((layer(x) * 1e-5).sum())
    gradient = torch.tensor(1e-5, dtype=torch.float16)
    assert float(gradient.square()) == 0.0, "the trap: its square is zero in float16"
    wanted = torch.full((4,), 2 * 6 * 1e-5**2).double()
    assert torch.allclose(fisher.sums["layer"].rows, wanted, 1e-3, 0.0)


def test_bfloat16_gives_the_rows_of_its_own_weights() -> None:
    half = tiny.bert().to(torch.bfloat16)
    batches = tiny.batches(half)
    found = measured(half, batches)
    wanted = measured(half.float(), batches)
    assert difference(found, wanted) < 0.1
    assert all(bool((found[n] > 0).all()) for n in found)


def test_nan_weights_are_refused_naming_the_layer() -> None:
    model = tiny.gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 2] = torch.nan
    with pytest.raises(ModelError, match=r"transformer\.h\.1\.mlp\.c_fc"):
        measured(model, tiny.batches(model))


def test_nan_gradients_are_refused_naming_a_layer() -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(ModelError, match=r"batch 1: the loss is NaN; the first .* is model\.norm"):
        measured(model, tiny.batches(model))


def test_a_layer_that_is_never_called_is_left_alone() -> None:
    model = tiny.llama()
    wanted = measured(model, tiny.batches(model))
    model.model.layers[1].spare = nn.Linear(24, 24)
    found = measured(model, tiny.batches(model))
    assert found.keys() == wanted.keys() and difference(found, wanted) == 0.0


class AuxiliaryForSequenceClassification(BertForSequenceClassification):  # type: ignore[misc]
    def forward(self, **batch: Any) -> Any:
        output = super().forward(**batch)
        output.loss = output.loss + 0.1 * output.logits.mean(0).square().sum()
        return output


class WeightedForSequenceClassification(BertForSequenceClassification):  # type: ignore[misc]
    def forward(self, **batch: Any) -> Any:
        output = super().forward(**batch)
        weights = torch.tensor([1.0, 5.0])
        output.loss = cross_entropy(output.logits, batch["labels"], weights)
        return output


@pytest.mark.parametrize(
    "model_class", [AuxiliaryForSequenceClassification, WeightedForSequenceClassification]
)
def test_a_loss_that_is_no_plain_mean_is_refused(model_class: Callable[..., Any]) -> None:
    plain = tiny.bert()
    model = model_class(plain.config)
    model.load_state_dict(plain.state_dict())
    batch = {**tiny.batches(plain)[0], "labels": torch.tensor([0, 1, 0])}
    with pytest.raises(ModelError, match="not a plain mean"):
        measured(model, [batch])


def test_batches_without_targets_are_refused() -> None:
    model = tiny.bert()
    batch = tiny.batches(model)[0]
    with pytest.raises(DataError, match="labels"):
        measured(model, [{name: batch[name] for name in ("input_ids", "attention_mask")}])
    with pytest.raises(DataError, match="no batches"):
        measured(model, [])
    causal = tiny.llama()
    with pytest.raises(DataError, match="nothing to predict"):
        measured(causal, [{"input_ids": torch.tensor([[5, 6], [7, 8]])[:, :1]}])
    ignored = {"input_ids": batch["input_ids"], "labels": torch.full((3, 8), -100)}
    with pytest.raises(DataError, match="nothing to predict"):
        measured(causal, [ignored])


def test_data_parallel_is_refused() -> None:
    model = tiny.bert()
    with pytest.raises(ModelError, match=r"profile model\.module"):
        measured(nn.DataParallel(model), tiny.batches(model))


def test_rows_that_lost_their_example_are_refused() -> None:
    layer = nn.Linear(4, 4)
    with Collector(layer, {"router": layer}) as fisher:
        fisher.begin(2, 3)
        with pytest.raises(ModelError, match=r"layer router sees 4 rows for 2 examples"):
            fisher.backward(layer(torch.ones(4, 4)).sum())
