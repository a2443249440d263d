"""Modules that hooks see badly: planned with the right numbers, or left alone with the reason."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrizations, prune

from rankopt import ModelError, apply_plan, make_plan, profile_model
from rankopt.plan.stability import Stability
from tests import tiny
from tests.measure.exact import one_by_one
from tests.measure.nets import Batch, Net, data, exact, left, measured, names


def into(y: Tensor, x: Tensor) -> Tensor:
    y[..., :4].mul_(0.5)
    y[..., 4:].add_(x[..., :1])
    return y


def through_view(y: Tensor) -> Tensor:
    y.view(-1).mul_(0.5)
    return y


#: What is done in place, and the same out of place.
IN_PLACE: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[Net, Tensor], Tensor]]] = {
    "relu_": (lambda m, x: m.two(torch.relu_(m.one(x))), lambda m, x: m.two(m.one(x).relu())),
    "silu": (
        lambda m, x: m.two(nn.functional.silu(m.one(x), inplace=True)),
        lambda m, x: m.two(nn.functional.silu(m.one(x))),
    ),
    "add": (lambda m, x: m.two(m.one(x).add_(x[:, :1])), lambda m, x: m.two(m.one(x) + x[:, :1])),
    "slice": (
        lambda m, x: m.two(into(m.one(x), x)),
        lambda m, x: m.two(
            torch.cat([(y := m.one(x))[..., :4] * 0.5, y[..., 4:] + x[..., :1]], -1)
        ),
    ),
    "view": (lambda m, x: m.two(through_view(m.one(x))), lambda m, x: m.two(m.one(x) * 0.5)),
    "input": (
        lambda m, x: (h := torch.cat([x, x[:, :4]], -1)).add_(m.two(h)),
        lambda m, x: (h := torch.cat([x, x[:, :4]], -1)) + m.two(h),
    ),
}


@pytest.mark.parametrize("kind", IN_PLACE)
def test_changes_in_place_change_no_number(kind: str) -> None:
    inside, outside = (Net(between) for between in IN_PLACE[kind])
    backends = ["kronecker", "fwsvd"]
    found, wanted = measured(inside, backends=backends), measured(outside, backends=backends)
    assert names(found) == names(wanted) and len(names(found)) >= 1
    for name in names(found):
        assert found.fisher_rows[name] == pytest.approx(wanted.fisher_rows[name], rel=1e-5)
        assert found.fisher_rows[name] == pytest.approx(exact(outside, name, data()), rel=1e-4)
        for backend in backends:
            assert found.curves[backend][name].losses == pytest.approx(
                wanted.curves[backend][name].losses, rel=1e-4, abs=1e-6
            )


def test_a_tensor_changed_in_place_is_another_input() -> None:
    def twice(model: Net, x: Tensor) -> Tensor:
        h = torch.cat([x, x[:, :4]], -1)
        first = model.two(h)
        with torch.no_grad():
            h.mul_(3.0)
        return first + model.three(h)

    model = Net(twice)
    model.three = nn.Linear(16, 16)
    profile = measured(model, backends=["whitened"], include=["two", "three"])
    energies = {name: profile.traces[name][1] for name in ("two", "three")}
    assert energies["three"] == pytest.approx(9.0 * energies["two"], rel=1e-5)
    assert profile.curves["whitened"]["three"].losses[0] > 0.0


def test_what_torch_cannot_differentiate_is_said_in_one_line() -> None:
    def chunks(model: Net, x: Tensor) -> Tensor:
        first, second = model.one(x).chunk(2, -1)
        return torch.cat([first.mul_(2.0), second], -1)

    with pytest.raises(ModelError, match="Net changes in place what its backward pass needs"):
        measured(Net(chunks))


def test_layers_that_no_gradient_reaches_are_left_alone_and_the_plan_applies() -> None:
    def between(model: Net, x: Tensor) -> Tensor:
        return model.two(model.one(x)) + model.detached(x).detach() + model.off(x)

    def off(x: Tensor) -> Tensor:
        with torch.no_grad():
            return linear(x, model.three.weight)

    model = Net(between)
    model.unused, model.detached, model.three = (nn.Linear(12, 16) for _ in range(3))
    model.off = off
    profile = measured(model)
    assert names(profile) == ["one", "two", "head"]
    why = left(profile)
    assert why["unused"] == "no gradient reached it: the model did not use it"
    assert why["detached"].endswith("what it makes is detached, or not used")
    assert why["three"].endswith("the model did not use it")
    for part in (1, 2):
        parts = measured(model, layers_at_a_time=part)
        assert parts.digest() == profile.digest() and parts.info == profile.info
    plan = make_plan(profile, keep=0.6)
    dense = [p.numel() for n, p in model.named_parameters() if n.split(".")[0] in names(profile)]
    apply_plan(model, plan, profile, progress=False)
    assert sum(dense) > sum(
        p.numel() for n, p in model.named_parameters() if n.split(".")[0] in names(profile)
    )


def test_what_is_silent_is_said_after_the_first_batch(capsys: pytest.CaptureFixture[str]) -> None:
    model, said = Net(lambda m, x: m.two(m.one(x))), []
    model.unused = nn.Linear(12, 16)

    def batches() -> Any:
        for batch in data(4):
            said.append(capsys.readouterr().err)
            yield batch

    measured(model, batches())
    assert (
        not said[0] and "1 layers are silent on the first batch" in said[1] and "unused" in said[1]
    )


class Routed(nn.Module):
    """An expert that only the third batch is sent to, and one that none is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.experts = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = 1 if float(x[0, 0]) > 50.0 else 0
        empty = self.experts[1 - chosen](x[:0]).sum()
        found: Tensor = self.head(torch.tanh(self.experts[chosen](x)) + empty)
        return found


def routed(count: int) -> list[Batch]:
    batches = data(count, size=1)
    batches[2][0][:] *= 0.1
    batches[2][0][0, 0] = 60.0
    return batches


def test_a_layer_that_speaks_later_is_planned(tmp_path: Path) -> None:
    model, batches = Routed(), routed(8)
    whole = measured(model, batches)
    assert names(whole) == ["experts.0", "experts.1"]
    assert left(whole)["experts.2"] == "no gradient reached it: the model did not use it"
    other = [batches[2]]
    assert whole.fisher_rows["experts.1"] == pytest.approx(
        exact(model, "experts.1", other), rel=1e-4
    )
    # Interrupted before it spoke, and gone on.
    path = tmp_path / "checkpoint"
    options: dict[str, Any] = {"checkpoint": path, "checkpoint_every": 1}

    def stopped() -> Any:
        yield from batches[:2]
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        measured(model, stopped(), **options)
    assert path.is_file()
    assert measured(model, batches, **options).digest() == whole.digest()
    stable = measured(model, batches, stop=Stability(keep=0.9, tolerance=1e-9))
    assert names(stable) == names(whole)


class Outside(nn.Module):
    """Layers whose weights are used beside their forward, or instead of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.plain, self.beside, self.instead = (nn.Linear(12, 12) for _ in range(3))
        self.tied, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.plain(x))
        x = torch.tanh(self.beside(x)) + linear(x, self.beside.weight)
        x = torch.tanh(linear(x, self.instead.weight, self.instead.bias))
        x = torch.tanh(self.tied(self.tied(x)))
        found: Tensor = self.head(x)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_used_where_no_hook_is_are_found(dtype: torch.dtype) -> None:
    model = Outside().to(dtype)
    model.plain.weight.grad = kept = torch.ones_like(model.plain.weight)
    profile = measured(model, [(x.to(dtype), y) for x, y in data(2, 16)])
    assert names(profile) == ["plain", "tied", "head"]
    assert "outside its forward" in left(profile)["beside"]
    assert "outside its forward" in left(profile)["instead"]
    # The model is left as it was, gradients included.
    assert model.plain.weight.grad is kept and bool((kept == 1.0).all())
    assert model.tied.weight.grad is None
    assert all(p.requires_grad for p in model.parameters()) and model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_mamba_uses_a_weight_without_its_module() -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 64}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    batch = {"input_ids": torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))}
    profile = profile_model(model, [batch], progress=False)
    kinds = {name.rsplit(".", 1)[-1] for name in names(profile)}
    silent = {name for name, why in left(profile).items() if "forward" in why}
    assert kinds >= {"in_proj", "x_proj", "out_proj"}
    assert kinds.isdisjoint(name.rsplit(".", 1)[-1] for name in silent)


def test_a_layer_that_all_examples_share_is_left_alone_in_batches() -> None:
    model = Net(lambda m, x: m.two(m.one(x)) + m.shared(x.new_ones(1, 4, 12)).mean(1))
    model.shared = nn.Linear(12, 16)
    profile = measured(model)
    assert names(profile) == ["one", "two", "head"]
    assert left(profile)["shared"].endswith("(1, 4, 12): plan it with batch size 1")
    alone = [(x[n : n + 1], y[n : n + 1]) for x, y in data() for n in range(len(x))]
    found = measured(model, alone)
    assert names(found) == ["one", "two", "head", "shared"]
    wanted = exact(model, "shared", alone)
    assert found.fisher_rows["shared"] == pytest.approx(wanted, rel=1e-4)


class Renamed(nn.Linear):
    """Another name for the input, and the bias added by hand."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T + self.bias


class Lying(nn.Linear):
    """As nn.Linear for small inputs only."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1.0 if bool(input.abs().max() <= 1.0) else 2.0)


def test_subclasses_are_judged_by_what_they_compute() -> None:
    plain = Net(lambda m, x: m.two(torch.tanh(m.one(x))))
    other = Net(lambda m, x: m.two(torch.tanh(m.one(hidden=x))))
    other.one, other.two = Renamed(12, 16), Lying(16, 16)
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        # Its inputs are within 1: nothing tells it from a plain layer.
        same = measured(other)
    assert names(same) == ["one", "two", "head"]
    assert same.fisher_rows["one"] == pytest.approx(measured(plain).fisher_rows["one"], rel=1e-5)
    other.between = lambda m, x: m.two(3.0 * m.one(hidden=x))
    found = measured(other)
    assert names(found) == ["one", "head"]
    assert left(found)["two"] == "what it made of the first batch is not what nn.Linear makes"
    plan = make_plan(same, keep=0.5)
    other.between = lambda m, x: m.two(torch.tanh(m.one(x)))
    assert apply_plan(other, plan, same, progress=False) is other


def test_computed_weights_are_left_alone_and_the_rest_is_planned() -> None:
    model = Net(lambda m, x: m.two(m.one(x)) + m.three(x) + m.four(x))
    model.three, model.four = nn.Linear(12, 16), nn.LazyLinear(16)
    prune.l1_unstructured(model.two, "weight", 0.5)
    parametrizations.weight_norm(model.three)
    profile = measured(model)
    assert names(profile) == ["one", "head"]
    why = left(profile)
    assert why["two"] == (
        "its weight is computed (torch.nn.utils.prune): prune.remove(module, 'weight') first"
    )
    assert "parametrize.remove_parametrizations(module, 'weight') first" in why["three"]
    assert why["four"] == "its weights are not initialised: run the model on a batch first"
    assert set(why) == {"two", "three", "four"}
    assert profile.fisher_rows["one"] == pytest.approx(exact(model, "one", data()), rel=1e-4)
    prune.remove(model.two, "weight")
    assert "two" in names(measured(model))


def test_an_unmerged_adapter_is_refused_before_anything_else() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for each in (model, model.base_model.model):
        with pytest.raises(ModelError, match=r"adapter .*merge_and_unload\(\)"):
            profile_model(each, iter(()), progress=False)
    merged = model.merge_and_unload()
    assert len(names(profile_model(merged, tiny.batches(merged), progress=False))) == 14
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelError, match=r"adapter .*get_base_model\(\)"):
        profile_model(peft.get_peft_model(tiny.llama(), prompt), iter(()), progress=False)


class SequenceFirst(nn.Module):
    """Positions in the first dimension, examples in the second."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.inner(x.transpose(0, 1)).transpose(0, 1)
        return out


def test_examples_in_another_dimension_are_refused_naming_the_layer() -> None:
    model = tiny.bert()
    block = model.bert.encoder.layer[1]
    block.intermediate.dense = SequenceFirst(block.intermediate.dense)
    batches = tiny.batches(model, size=4)
    name = r"bert\.encoder\.layer\.1\.intermediate\.dense\.inner"
    with pytest.raises(ModelError, match=rf"layer {name}: which example an input belongs to"):
        profile_model(model, batches)
    one = profile_model(model, one_by_one(batches))
    assert one.examples == 8


def test_positions_that_all_examples_share_are_refused() -> None:
    model = tiny.gpt2()
    with pytest.raises(ModelError, match=r"transformer\.wpe.*batch size 1"):
        profile_model(model, tiny.batches(model), include=["transformer.wpe"])
    model = tiny.t5(relative_attention_num_buckets=8)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    with pytest.raises(ModelError, match="batch size 1"):
        profile_model(model, tiny.batches(model, size=4), include=[bias])
