"""Moments equal those of plain autograd, whatever is masked, shared, embedded or called oddly."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from rankopt import ModelError
from rankopt.backends.statistics import STATISTICS
from rankopt.measure.accumulate import Gathered, gather
from rankopt.measure.collector import Collector
from rankopt.measure.estimators import Estimator
from rankopt.measure.loss import ModelLoss
from rankopt.model.selection import find_layers
from rankopt.model.tasks import task_of
from rankopt.model.weights import weight_of
from tests import tiny
from tests.measure.exact import in_double, one_by_one, summed_loss, wide

Batch = dict[str, Any]
MOMENTS = frozenset({"second_moment", "gradient_moment"})


def collected(model: Any, batches: list[Batch], needs: Any = MOMENTS, **options: Any) -> Gathered:
    modules = find_layers(model, **options).modules
    return gather(model, modules, batches, ModelLoss(task_of(model), Estimator()), needs)


def moments(gathered: Gathered) -> dict[str, list[Tensor]]:
    found = {}
    for name in gathered.names:
        seen = gathered.statistics(name)
        traces = [seen.positions, seen.input_energy, seen.gradient_energy]
        both = [seen.need("second_moment"), seen.need("gradient_moment")]
        found[name] = [*both, torch.tensor(traces, dtype=torch.float64)]
    return found


def difference(found: dict[str, list[Tensor]], wanted: dict[str, list[Tensor]]) -> float:
    assert found.keys() == wanted.keys()
    return max(
        float((a - b).norm() / b.norm())
        for name in wanted
        for a, b in zip(found[name], wanted[name], strict=True)
    )


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[list[Tensor]]]]:
    """Inputs, and gradients of outputs, of every call; by hooks of torch's own."""
    calls: dict[str, list[list[Tensor]]] = {name: [] for name in modules}
    hooks = []
    for name, module in modules.items():

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = name) -> None:
            x = args[0] if args else kwargs["input"]
            call = [x.detach()]
            calls[name].append(call)
            output.register_hook(lambda g: call.append(g.detach()) if len(call) == 1 else None)

        hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    yield calls
    for each in hooks:
        each.remove()


def seen_positions(model: Any, name: str, batch: Batch) -> Tensor | None:
    """Which positions of a layer are no padding, by what the architectures are known to do."""
    labels, mask = batch["labels"] != -100, batch.get("attention_mask")
    kind = type(model).__name__
    if kind.startswith(("T5", "Whisper", "Bart")):
        of_encoder = name.startswith(("encoder.", "model.encoder.")) or any(
            part in name for part in ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k")
        )
        of_encoder |= "encoder_attn.v" in name
        chosen = mask if of_encoder else batch.get("decoder_attention_mask", labels)
    else:
        chosen = mask
    return None if chosen is None else chosen != 0


def brute_force(
    model: Any, batches: list[Batch], padding: bool = False, **options: Any
) -> dict[str, list[Tensor]]:
    """Trainable weights, one example at a time, plain sums over positions."""
    modules = find_layers(model, **options).modules
    total: dict[str, list[Tensor]] = {}
    model = model.eval().requires_grad_(True)
    for example in one_by_one(batches):
        extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        with recorded(modules) as calls:
            output = model(**example, **extra)
            summed_loss(task_of(model), output.logits, example["labels"]).backward()
        for name, module in modules.items():
            weight = weight_of(module)
            n_out, n_in = weight.shape
            mask = None if padding else seen_positions(model, name, example)
            for x, g in calls[name]:
                if isinstance(module, nn.Embedding):
                    x = nn.functional.one_hot(x, n_in).to(weight.dtype)
                x, g = x.reshape(-1, n_in), g.reshape(-1, n_out)
                live = x if mask is None else x[mask.reshape(-1)]
                a = live if n_in <= n_out else live @ weight.T
                b = g if n_out <= n_in else g @ weight
                traces = [float(len(live)), float(live.square().sum()), float(g.square().sum())]
                sums = [a.T @ a, b.T @ b, torch.tensor(traces, dtype=torch.float64)]
                old = total.get(name, [torch.zeros(())] * 3)
                total[name] = [s + t for s, t in zip(old, sums, strict=True)]
    model.zero_grad()
    return {name: total[name] for name in modules}


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_moments_equal_those_of_plain_autograd(kind: str) -> None:
    model = tiny.ARCHITECTURES[kind]()
    batches = tiny.batches(model)
    in_float32 = moments(collected(model, batches))
    model, batches = in_double(model), [wide(batch) for batch in batches]
    found = moments(collected(model, batches))
    wanted = brute_force(model, batches)
    assert difference(found, wanted) < 1e-10
    most = 1e-5
    if kind == "t5":
        most = 2e-3 if tiny.t5_is_eager() else 1e-3
    assert difference(in_float32, wanted) < most
    shapes = [weight_of(m).shape for m in find_layers(model).modules.values()]
    assert {s[0] < s[1] for s in shapes} == {True, False}, "one kind of side is not tried"
    if "attention_mask" in batches[0] or kind == "whisper":
        assert difference(found, brute_force(model, batches, padding=True)) > 1e-3


@pytest.mark.parametrize("given", ["mask", "no mask", "all of one length", "own decoder inputs"])
def test_encoder_and_decoder_of_equal_length_keep_their_own_masks(given: str) -> None:
    model = in_double(tiny.t5())
    batches = tiny.batches(model)
    for batch in batches:
        batch["labels"] = torch.cat([batch["labels"], batch["labels"][:, :2]], 1)
        batch["labels"][1, 3:] = -100
        assert batch["labels"].shape == batch["input_ids"].shape
        if given == "no mask":
            del batch["attention_mask"]
        elif given == "all of one length":
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        elif given == "own decoder inputs":
            batch["decoder_input_ids"] = model._shift_right(batch["labels"])
            batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
    assert difference(moments(collected(model, batches)), brute_force(model, batches)) < 1e-10


def test_a_decoder_of_the_models_largest_length() -> None:
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
    model = in_double(
        BartForConditionalGeneration(
            BartConfig(
                vocab_size=tiny.VOCABULARY,
                max_position_embeddings=8,
                decoder_ffn_dim=24,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                **shape,
            )
        )
    )
    ids = torch.randint(3, tiny.VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(1)}
    found = moments(collected(model, [whole]))
    assert difference(found, brute_force(model, [whole])) < 1e-10
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    padded = {**whole, "attention_mask": mask}
    assert difference(moments(collected(model, [padded])), brute_force(model, [padded])) < 1e-10
    shorter = {**whole, "attention_mask": mask, "labels": ids.flip(1)[:, :7].contiguous()}
    found = moments(collected(model, [shorter]))
    assert difference(found, brute_force(model, [shorter])) < 1e-10


def test_a_decoder_as_long_as_whispers_encoder_keeps_its_own_mask() -> None:
    model = in_double(tiny.whisper())
    batches = [wide(batch) for batch in tiny.batches(model, tokens=12)]
    assert batches[0]["labels"].shape[1] == model.config.max_source_positions
    assert difference(moments(collected(model, batches)), brute_force(model, batches)) < 1e-10


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_at_the_left_is_left_out(kind: str) -> None:
    model = in_double(tiny.ARCHITECTURES[kind]())
    batches = [{k: v.flip(1) for k, v in batch.items()} for batch in tiny.batches(model)]
    assert batches[0]["attention_mask"][0, :4].tolist() == [0, 0, 0, 1]
    for batch in batches:
        # Nothing but padding comes before it.
        batch["labels"][0, 3] = -100
    found, wanted = moments(collected(model, batches)), brute_force(model, batches)
    assert difference(found, wanted) < 1e-10
    assert difference(found, brute_force(model, batches, padding=True)) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "albert", "t5"])
def test_layers_that_share_an_input_share_its_moment_and_nothing_changes(kind: str) -> None:
    model = in_double(tiny.ARCHITECTURES[kind]())
    batches = tiny.batches(model)
    shared = collected(model, batches)
    hooks = [
        module.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:]))
        for module in find_layers(model).modules.values()
    ]
    alone = collected(model, batches)
    for hook in hooks:
        hook.remove()
    assert all(owner == name for name, owner in alone.owners.items())
    saved = [name for name, owner in shared.owners.items() if owner != name]
    assert (len(saved) > 0) == (kind != "gpt2")
    assert all(shared.sums[name].second is None for name in saved)
    assert difference(moments(shared), moments(alone)) == 0.0


class Twin(nn.Module):
    """Two layers that are given the same input, until they are given different ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 6), nn.Linear(4, 6)
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(x) + self.two(x.clone() if self.apart else x)
        return out.square().sum()


def test_an_input_that_is_no_longer_shared_is_refused() -> None:
    twin = Twin()
    x = torch.ones(2, 3, 4)
    with Collector(twin, dict(twin.named_children()), MOMENTS) as collector:
        collector.begin(2, 3)
        collector.backward(twin(x))
        assert collector.owners == {"one": "one", "two": "one"}
        twin.apart = True
        collector.begin(2, 3)
        with pytest.raises(ModelError, match="layer two was given the same input as one"):
            twin(x)


class ByName(nn.Module):
    """Calls its layers by keyword, the way some implementations do."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow, self.by_name = nn.Linear(4, 9), nn.Linear(9, 4), by_name
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.by_name:
            return torch.tanh(self.narrow(input=torch.tanh(self.wide(input=x)))).square().sum()
        return torch.tanh(self.narrow(torch.tanh(self.wide(x)))).square().sum()


def test_inputs_by_keyword_are_inputs() -> None:
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for by_name in (True, False):
        model = ByName(by_name)
        with Collector(model, dict(model.named_children()), STATISTICS) as collector:
            collector.begin(3, 5)
            collector.backward(model(x))
        found.append(
            {f"{n}/{k}": t for n, s in collector.sums.items() for k, t in s.tensors().items()}
        )
    assert found[0].keys() == found[1].keys() and len(found[0]) == 12
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(float(tensor.abs().sum()) > 0.0 for tensor in found[0].values())


@pytest.mark.parametrize("vocabulary", [40, 5])
def test_an_embedding_equals_a_linear_layer_of_one_hot_inputs(vocabulary: int) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(vocabulary, 8).double()
    linear = nn.Linear(vocabulary, 8, bias=False).double()
    linear.weight = nn.Parameter(embedding.weight.detach().T.clone())
    ids = torch.randint(0, vocabulary, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    direction = torch.randn(3, 7, 8, dtype=torch.float64)
    found = []
    for module, x in ((embedding, ids), (linear, nn.functional.one_hot(ids, vocabulary).double())):
        with Collector(module, {"it": module}, STATISTICS) as collector:
            for _ in range(2):
                collector.begin(3, 7, [mask])
                collector.backward(((module(x) * direction).sum(-1) * mask).square().sum())
        found.append(collector.sums["it"].tensors())
    assert found[0].keys() == found[1].keys() == {
        "rows", "traces", "columns", "elements", "second.0", "gradient.0",
    }  # fmt: skip
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], rtol=1e-10, atol=1e-12), name
    assert found[0]["traces"][0] == 2 * int(mask.sum())


@pytest.mark.parametrize("untied", [False, True])
def test_moments_of_a_head_and_its_embedding(untied: bool) -> None:
    model = in_double(tiny.mistral() if untied else tiny.llama())
    chosen: dict[str, Any] = {"include": ["lm_head"], "untie": True}
    if untied:
        chosen = {"include": ["lm_head", "model.embed_tokens"]}
    batches = tiny.batches(model)
    found = moments(collected(model, batches, **chosen))
    assert len(found) == 2
    assert difference(found, brute_force(model, batches, **chosen)) < 1e-10


def test_bfloat16_moments_are_summed_wider() -> None:
    half = tiny.bert().to(torch.bfloat16)
    batches = tiny.batches(half)
    found = moments(collected(half, batches))
    wanted = moments(collected(copy.deepcopy(half).float(), batches))
    assert difference(found, wanted) < 0.1
    assert all(tensor.dtype == torch.float64 for each in found.values() for tensor in each)
    layer, x = nn.Linear(4, 6, dtype=torch.bfloat16), torch.ones(2, 300, 4, dtype=torch.bfloat16)
    with Collector(layer, {"it": layer}, MOMENTS) as collector:
        collector.begin(2, 300)
        collector.backward(layer(x).sum())
    # 600 ones: in bfloat16 a sum of ones stays at 256.
    assert torch.equal(
        collector.sums["it"].tensors()["second.0"], torch.full((4, 4), 600.0).double()
    )


def test_sums_over_millions_of_numbers_are_exact_to_float32() -> None:
    layer = nn.Linear(64, 4, bias=False)
    x = torch.rand(1, 100_000, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    with Collector(layer, {"it": layer}, MOMENTS) as collector:
        collector.begin(1, 100_000)
        collector.backward(layer(x).mul(1e-3).sum())
    wanted = float(x.double().square().sum())
    assert float(collector.sums["it"].traces[1]) == pytest.approx(wanted, rel=1e-6)
    assert abs(float(x.flatten().dot(x.flatten())) / wanted - 1.0) > 1e-6, "no trap here"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_and_draws_change_no_statistic(reentrant: bool) -> None:
    def sums(checkpointing: bool) -> dict[str, Tensor]:
        model = in_double(tiny.llama())
        if checkpointing:
            kwargs = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.train()
        how = Estimator("sampled", draws=2)
        modules = find_layers(model).modules
        found = gather(
            model, modules, tiny.batches(model), ModelLoss("causal-lm", how), set(STATISTICS)
        )
        tensors = {}
        for name, each in found.sums.items():
            tensors |= {f"{name}/{kind}": tensor for kind, tensor in each.tensors().items()}
        return tensors

    plain, saved = sums(False), sums(True)
    assert plain.keys() == saved.keys()
    assert all(torch.allclose(plain[n], saved[n], rtol=1e-10, atol=1e-14) for n in plain)


def test_what_a_layer_does_outside_the_loss_is_an_error_or_nothing() -> None:
    model = in_double(tiny.bert())
    batches = tiny.batches(model)
    wanted = moments(collected(model, batches))
    # Somebody looks at the loss between batches: nothing is counted.
    modules = find_layers(model).modules
    with Collector(model, modules, MOMENTS) as collector:
        for batch in batches:
            with torch.no_grad():
                model(**batch)
            collector.begin(3, 8, [batch["attention_mask"] != 0])
            collector.backward(model(**batch).loss * 3)
            model(**batch)
    for name in modules:
        full = collector.sums[collector.owners[name]].second
        assert full is not None
        assert torch.allclose(full.full(), wanted[name][0], rtol=1e-10)
