"""A second round: what it is the mean of, what it leaves, and what it does not go with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankopt import Compressed, apply_plan, make_plan, profile_model
from rankopt.errors import DataError, InfeasibleBudgetError, ModelError, OptionError
from rankopt.evaluation.evaluation import evaluate
from rankopt.measure.accumulate import gather
from rankopt.measure.loss import ModelLoss, find_loss
from rankopt.measure.rounds import computing_with
from rankopt.model.selection import find_layers
from rankopt.model.weights import weight_of
from rankopt.profile.profile import Profile
from tests import tiny

NEEDS = ("second_moment", "gradient_moment", "columns")


def curves(profile: Profile, backend: str) -> Any:
    return [profile.curves[backend][x.name].losses for x in profile.info.layers]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-classification", "t5"])
def test_with_the_same_weights_the_second_round_is_the_first(kind: str) -> None:
    model = tiny.MODELS[kind]()
    batches = tiny.batches(model)
    backends = ("kronecker", "fwsvd", "fwsvd_two_sided")
    plain = profile_model(model, batches, backends=backends)

    def unchanged(model: Any, profile: Profile) -> Any:
        names = [x.name for x in profile.info.layers if not x.partners]
        return {name: model.get_submodule(name).weight.detach().clone() for name in names}

    again = profile_model(model, batches, backends=backends, again=unchanged)
    for backend in backends:
        for one, two in zip(curves(plain, backend), curves(again, backend), strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-9 * one[0])
    for field in ("units", "examples", "targets", "data_digest", "fingerprint"):
        assert getattr(again.info, field) == getattr(plain.info, field)
    assert again.batch_fisher is not None and plain.batch_fisher is not None
    assert again.batch_fisher == pytest.approx(plain.batch_fisher, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-classification"])
def test_moments_are_of_the_dense_weight_on_the_compressed_model(kind: str) -> None:
    """Against a loop over positions of a model whose modules are replaced."""
    model = tiny.MODELS[kind]()
    batches = tiny.batches(model, count=1)
    found = find_layers(model)
    torch.manual_seed(1)
    other = {
        name: weight_of(module) + 0.1 * torch.randn_like(weight_of(module))
        for name, module in found.modules.items()
    }
    dense = {name: weight_of(module).clone() for name, module in found.modules.items()}
    own = {
        found.modules[name]: other[name].T if _turned(found.modules[name]) else other[name]
        for name in other
    }
    loss = find_loss(model, None)
    with computing_with(own):
        sums = gather(model, found.modules, batches, loss, NEEDS, weights=dense, progress=False)
        inputs, outputs = _recorded(model, found.modules, batches[0])
    for name, module in found.modules.items():
        assert torch.equal(weight_of(module), dense[name]), "it has its own weight again"
        w, x, g = dense[name].double(), inputs[name].double(), outputs[name].double()
        n_out, n_in = w.shape
        made = x @ w.T if n_out < n_in else x
        back = g @ w if n_out > n_in else g
        statistics = sums.statistics(name)
        assert statistics.second_moment is not None and statistics.gradient_moment is not None
        _near(statistics.second_moment, made.T @ made)
        _near(statistics.gradient_moment, back.T @ back)


def _turned(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def _recorded(model: Any, modules: Any, batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and output gradients of the summed loss at positions that are not padded."""
    kept: dict[str, list[Any]] = {}
    mask = batch["attention_mask"].bool().reshape(-1)

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            output.retain_grad()
            kept[name] = [args[0].detach(), output]

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    model.eval()
    output = model(**batch)
    labels = batch["labels"]
    if output.logits.dim() == 3:
        labels, logits = labels[:, 1:], output.logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
    else:
        losses = torch.nn.functional.cross_entropy(output.logits, labels, reduction="sum")
    losses.backward()
    for each in hooks:
        each.remove()
    model.zero_grad()

    def flat(tensor: Any) -> Any:
        return tensor.flatten(0, -2)[mask]

    inputs = {name: flat(x) for name, (x, _) in kept.items()}
    return inputs, {name: y.grad.flatten(0, -2) for name, (_, y) in kept.items()}


def test_the_compressed_round_changes_curves_and_leaves_the_model() -> None:
    model = tiny.llama()
    batches = tiny.batches(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    plain = profile_model(model, batches, backends=("kronecker", "fwsvd"))
    again = profile_model(
        model, batches, backends=("kronecker", "fwsvd"), again=Compressed(keep=0.4)
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.data_ptr() == pointers[name]
    assert any(
        not np.allclose(one, two, rtol=0.01)
        for one, two in zip(curves(plain, "kronecker"), curves(again, "kronecker"), strict=True)
    )
    plan = make_plan(again, keep=0.5)
    loss = evaluate(apply_plan(tiny.llama(), plan, again), batches).loss
    assert np.isfinite(loss)
    assert again.info.fingerprint == plain.info.fingerprint


def test_weights_are_back_after_an_error() -> None:
    model = tiny.llama()
    batches = tiny.batches(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def broken(model: Any, profile: Profile) -> Any:
        name = profile.info.layers[0].name
        return {name: torch.full_like(model.get_submodule(name).weight, float("nan"))}

    with pytest.raises(ModelError, match="NaN"):
        profile_model(model, batches, again=broken)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_batches_may_come_from_a_generator_and_layers_may_be_tied() -> None:
    model = tiny.llama()
    batches = tiny.batches(model)
    wanted = profile_model(model, batches, again=Compressed(0.6))
    found = profile_model(model, iter(batches), again=Compressed(0.6))
    assert found.digest() == wanted.digest()
    tied = profile_model(
        model, batches, include=["*"], untie=True, backends=("fwsvd",), again=Compressed(0.6)
    )
    assert any(layer.partners for layer in tied.info.layers)


def test_what_it_does_not_go_with() -> None:
    model = tiny.llama()
    batches = tiny.batches(model)
    for more in ({"layers_at_a_time": 2}, {"stop": lambda *_: ([], None)}):
        with pytest.raises(OptionError, match="no stop, no layers_at_a_time"):
            profile_model(model, batches, again=Compressed(), **more)  # type: ignore[arg-type]
    with pytest.raises(InfeasibleBudgetError):
        profile_model(model, batches, again=Compressed(keep=0.0001))
    assert repr(Compressed()) == "Compressed(keep=0.8)"


def test_where_no_ranks_fit_a_round_that_is_not_needed_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny.llama()
    batches = tiny.batches(model)
    found = profile_model(model, batches, again=Compressed(0.0001, needed=False))
    assert found.info.again is None and found.digest() == profile_model(model, batches).digest()
    assert "note: no second round: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-classification", "t5"])
def test_a_layer_computes_with_what_applying_would_leave_of_it(kind: str) -> None:
    """Whichever way round its module keeps the weight: of square ones the shape does not tell."""
    model = tiny.MODELS[kind]()
    batches = tiny.batches(model)
    profile = profile_model(model, batches)
    weights = Compressed(0.5)(model, profile)
    assert weights
    with computing_with({model.get_submodule(name): w for name, w in weights.items()}):
        replaced = evaluate(model, batches).loss
    wanted = evaluate(apply_plan(model, make_plan(profile, keep=0.5), profile), batches).loss
    assert replaced == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("after", [0, 3])
def test_a_second_round_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """With the bits of one that was not, and nothing of the first is measured again."""
    model, path, numbers = tiny.llama(), tmp_path / "partial", list[int]()
    batches = tiny.batches(model, count=5)
    how: Any = {"checkpoint": path, "checkpoint_every": 2, "cross_fit": True}
    wanted = profile_model(model, batches, again=Compressed(0.5), cross_fit=True)
    backward, stop_at = ModelLoss.backward, 6 + after

    def counted(self: ModelLoss, collector: Any, model: Any, batch: Any, number: int) -> Any:
        if len(numbers) == stop_at:
            raise KeyboardInterrupt
        numbers.append(number)
        return backward(self, collector, model, batch, number)

    monkeypatch.setattr(ModelLoss, "backward", counted)
    with pytest.raises(KeyboardInterrupt):
        profile_model(model, batches, again=Compressed(0.5), **how)
    # The first batch is looked at before.
    assert numbers == [0, *range(5), *range(after)]
    stop_at = -1
    if after:
        with pytest.raises(DataError, match="another again"):
            profile_model(model, batches, again=Compressed(0.6), **how)
    numbers.clear()
    found = profile_model(model, batches, again=Compressed(0.5), **how)
    assert found.digest() == wanted.digest()
    assert numbers == [0, *range(after // 2 * 2, 5)]
