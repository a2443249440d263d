"""Distillation: less divergence on what is held out, and nothing else is touched."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from rankopt import apply_plan, make_plan, profile_model, refine, save_model
from rankopt.model.lowrank import LowRank
from rankopt.model.tasks import prepare, task_of
from rankopt.refinement import fit
from rankopt.refinement.divergence import divergence, divergences
from rankopt.refinement.fit import Fit, Recipe
from tests import tiny
from tests.evaluation.test_evaluation import apart
from tests.refinement.small import RECIPE, bits, changed, compressed

NAMES = ("llama", "gpt2", "bert-classification", "bert-regression", "bert-tokens", "t5", "albert")


@pytest.mark.parametrize("name", NAMES)
def test_the_held_out_divergence_falls(name: str) -> None:
    model, dense, batches = compressed(name)
    start, teacher = bits(model), bits(dense)
    before = apart(model, dense, [batches[7]])
    rate = 1e-3 if name.startswith("bert") else 3e-3
    found = refine(model, dense, batches, **{**RECIPE, "learning_rate": rate})
    # A divergence is the little that is left of logits in float32.
    assert found.before == pytest.approx(before, rel=1e-4, abs=3e-8)
    assert found.after == pytest.approx(apart(model, dense, [batches[7]]), rel=1e-4, abs=3e-8)
    slow = name == "bert-regression" or (name == "t5" and tiny.t5_is_eager())
    assert found.after < (0.96 if slow else 0.9) * found.before
    assert changed(start, model) and not changed(teacher, dense)
    # Three in a batch; of steps that are taken back, as of these two, none are counted.
    least = {"bert-classification": 7, "bert-regression": 4}.get(name, 8)
    assert least * 3 <= found.examples <= 8 * 3
    assert found.unit == ("tokens" if "-c" not in name and "-r" not in name and name != "albert"
                          else "examples")  # fmt: skip
    if name == "llama":
        # Of 8 tokens the first is no target; one row in three has three tokens of padding.
        assert found.targets == 8 * (7 + 7 + 4) and found.held_out == 18


@pytest.mark.parametrize("vectors", [True, False])
def test_only_factors_and_vectors_move(vectors: bool) -> None:
    model, dense, batches = compressed("bert-tokens")
    head = model.classifier.weight.requires_grad_(False)
    model.train()
    model.bert.encoder.layer[1].eval()
    start = bits(model)
    refine(model, dense, batches, vectors=vectors, **RECIPE)
    low = [n for n, module in model.named_modules() if isinstance(module, LowRank)]
    moved = changed(start, model)
    inside = {n for n in moved if n.rpartition(".")[0].rpartition(".")[0] in low}
    assert {f"{n}.{x}.weight" for n in low for x in ("down", "up")} <= inside
    outside = moved - inside
    assert all(start[n].dim() == 1 for n in outside)
    assert ("bert.embeddings.LayerNorm.weight" in outside) == vectors == bool(outside)
    assert not head.requires_grad and model.bert.embeddings.word_embeddings.weight.requires_grad
    assert model.training and model.bert.encoder.layer[0].training
    assert not model.bert.encoder.layer[1].training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "bert-classification", "t5"])
def test_padding_does_not_change_the_loss(name: str) -> None:
    model, dense, batches = compressed(name)
    batch, task = batches[0], task_of(model)
    longer = {
        key: torch.nn.functional.pad(value, (0, 5), value=-100 if key == "labels" else 0)
        if value.dim() == 2
        else value
        for key, value in batch.items()
    }
    longer["input_ids"][:, -5:] = 9  # whatever lies there
    found, wanted = (
        divergence(model, dense, task, prepare(task, each, torch.device("cpu")))
        for each in (longer, batch)
    )
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_divergences_of_answers_and_of_what_is_never_predicted() -> None:
    ours, theirs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).unbind()
    found = divergences("multi-label-classification", ours, theirs, torch.ones(4, 3))
    wanted = kl_divergence(Bernoulli(logits=theirs), Bernoulli(logits=ours))
    torch.testing.assert_close(found, wanted.flatten())
    labels = torch.tensor([0, 1, -100, 2])
    ours[:, 1] = theirs[:, 1] = -torch.inf
    ours.requires_grad_()
    found = divergences("sequence-classification", ours, theirs, labels)
    rest = [Categorical(logits=x[[0, 1, 3]][:, [0, 2]]) for x in (theirs, ours.detach())]
    torch.testing.assert_close(found.detach(), kl_divergence(*rest))
    found.sum().backward()
    assert ours.grad is not None and bool(ours.grad.isfinite().all())
    assert not divergences("sequence-classification", theirs, theirs, labels).any()


def test_what_is_not_better_on_held_out_data_is_not_kept() -> None:
    model, dense, batches = compressed()
    start = bits(model)
    found = refine(model, dense, batches, learning_rate=30.0, passes=4, progress=False)
    assert found.after == found.before and found.targets == 0
    assert found.steps == 16, "four looks are enough to see it"
    assert not changed(start, model)
    assert "refined" not in model.config.quantization_config.to_dict()
    assert "not changed" in str(found)


def test_steps_that_are_too_large_are_taken_back_and_made_smaller() -> None:
    """A bowl: a rate of 30 leaves it at once, and a quarter of that finds its floor."""
    place = nn.Parameter(torch.tensor([1.0]))
    fit = Fit(
        {"place": place},
        256,
        lambda number: place.square().sum(),
        lambda: float(place.detach().square()),
        Recipe(30.0, 1, warm_up=0.0),
    )
    looks = {}
    for step in fit.run():
        looks[step] = (fit.state.slowed, fit.state.kept, float(place.detach()))
    assert looks[31][2] != looks[32][2], "it is taken back where it is looked at"
    assert looks[32] == (1, 0, 1.0)
    assert fit.state.lost == ((0, 32),) and fit.state.kept == 256
    assert fit.state.best == float(place.detach().square()) < 3e-5
    assert fit.seen() == set(Recipe().order(0, 256)[32:])


def test_held_out_batches_may_be_given() -> None:
    model, dense, batches = compressed()
    found = refine(model, dense, iter(batches[:3]), held_out=batches[3:5], **RECIPE)
    assert found.held_out == 36 and found.targets == 3 * 18
    both = (apart(model, dense, [batch]) for batch in batches[3:5])
    assert found.after == pytest.approx(sum(both) / 2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits(dtype: torch.dtype) -> None:
    model, dense, batches = compressed()
    found = refine(model.to(dtype), dense.to(dtype), batches, **RECIPE)
    assert found.after < 0.98 * found.before
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_steps_that_16_bits_cannot_tell_add_up() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    slope = torch.tensor([1.0, -1.0, 0.0])
    one = Fit({"x": parameter}, 100, lambda _: (parameter.float() * slope).sum(),
              lambda: float((parameter.detach().float() * slope).sum()),
              Recipe(1e-3, 1, warm_up=0.0))  # fmt: skip
    list(one.run())
    # Each step is less than half of what bfloat16 can tell from 1; the average is half of the way.
    torch.testing.assert_close(
        parameter.float(), torch.tensor([0.95, 1.05, 1.0]), atol=0.005, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_looked_at_and_kept_is_the_average_of_the_pass(dtype: torch.dtype) -> None:
    place = nn.Parameter(torch.tensor([4.0], dtype=dtype))
    looked = []

    def held_out() -> float:
        looked.append(float(place.detach()))
        return looked[-1]

    fit = Fit(
        {"place": place}, 32, lambda _: place.float().sum(), held_out, Recipe(0.01, 2, warm_up=0.0)
    )
    between = [float(place.detach()) for _ in fit.run()]
    # Adam's steps down a slope are as large as the rate.
    path = [4.0 - 0.01 * step for step in range(65)]
    assert between[:-1] == pytest.approx(path[1:-1], abs=0.009 if dtype != torch.float32 else 1e-4)
    passes = {4: 0, 8: 0, 16: 0, 32: 0, 48: 32, 64: 32}
    means = [sum(path[begun : at + 1]) / (at + 1 - begun) for at, begun in passes.items()]
    assert looked == pytest.approx([4.0, *means], abs=0.009 if dtype != torch.float32 else 1e-4)
    assert float(place.detach()) == looked[-1] and fit.state.averaged == 32


def test_rates_rise_then_stay() -> None:
    recipe = Recipe(1.0, warm_up=0.2)
    rates = [recipe.rate(step, 10) for step in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3] + [1.0] * 8)
    assert sorted(recipe.order(0, 9)) == list(range(9))
    assert recipe.order(0, 9) != recipe.order(1, 9) != Recipe(seed=1).order(1, 9)


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense, batches = compressed()
    start = bits(model)
    take, calls = Fit._take, []

    def fails(self: Fit, number: int) -> None:
        calls.append(number)
        take(self, number)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit.Fit, "_take", fails)
    with pytest.raises(KeyboardInterrupt):
        refine(model, dense, batches, **RECIPE)
    assert not changed(start, model)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.config.quantization_config.refined


def test_a_dense_model_that_is_offloaded() -> None:
    from accelerate import cpu_offload

    model, dense, batches = compressed()
    again, _, _ = compressed()
    cpu_offload(dense)
    found = [refine(each, dense, batches, method=method, **RECIPE)
             for each, method in ((model, "distill"), (again, "blocks"))]  # fmt: skip
    plain, whole, _ = compressed()
    wanted = refine(plain, whole, batches, **RECIPE)
    assert found[0] == wanted and not changed(bits(model), plain)
    assert found[1].after < found[1].before
    assert all(p.is_meta for p in dense.parameters())


def test_an_embedding_learns_too() -> None:
    from rankopt import apply_plan, make_plan, profile_model

    model, batches = tiny.llama(), tiny.batches(tiny.llama(), count=9)
    profile = profile_model(model, batches, include=["lm_head"], untie=True, progress=False)
    apply_plan(model, make_plan(profile, keep=0.5), profile, progress=False)
    start = bits(model)
    found = refine(model, tiny.llama(), batches, held_out=batches, **RECIPE)
    assert found.after < found.before
    assert "model.embed_tokens.down.weight" in changed(start, model)


def test_the_pivoted_form_learns_too(tmp_path: Path) -> None:
    dense = tiny.llama()
    batches = tiny.batches(dense, count=9)
    profile = profile_model(dense, batches, backends=["fwsvd"], progress=False)
    model = copy.deepcopy(dense)
    apply_plan(model, make_plan(profile, keep=0.4), profile, progress=False)
    before = bits(model)
    found = refine(model, dense, batches, **{**RECIPE, "learning_rate": 1e-3})
    assert found.after < 0.98 * found.before
    moved = changed(before, model)
    low = {n for n, m in model.named_modules() if isinstance(m, LowRank)}
    assert {f"{name}.{part}.weight" for name in low for part in ("down", "up")} <= moved
    assert not any(name.endswith(".index") for name in moved)
    save_model(model, tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert not changed(bits(model), again)
