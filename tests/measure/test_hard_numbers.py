"""Numbers that are not finite, vanish or drown; and what the caller has switched."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankopt import DataError, ModelError, profile_model
from tests import tiny
from tests.measure.nets import Batch, Net, data, losses, measured, names


@pytest.mark.parametrize("switch", ["set_grad_enabled", "no_grad", "autocast"])
def test_what_the_caller_has_switched_changes_nothing(switch: str) -> None:
    model = tiny.llama()
    wanted = profile_model(model, tiny.batches(model), progress=False)
    if switch == "set_grad_enabled":
        torch.set_grad_enabled(False)
        try:
            found = profile_model(model, tiny.batches(model), progress=False)
            assert not torch.is_grad_enabled()
        finally:
            torch.set_grad_enabled(True)
    else:
        around: Any = torch.no_grad() if switch == "no_grad" else torch.autocast("cpu")
        with around:
            found = profile_model(model, tiny.batches(model), progress=False)
    assert found.digest() == wanted.digest()


def test_batches_made_in_inference_mode_are_refused() -> None:
    model = Net(lambda m, x: m.two(m.one(x)))
    with torch.inference_mode():
        batches = data()
    with pytest.raises(DataError, match="a batch was made under torch"):
        measured(model, batches)


def test_inference_mode_is_refused() -> None:
    model = tiny.llama()
    with torch.inference_mode(), pytest.raises(ModelError, match="inference_mode is on"):
        profile_model(model, tiny.batches(model), progress=False)
    with torch.inference_mode():
        made = tiny.llama()
    with pytest.raises(ModelError, match=r"parameter model\.embed_tokens.*inference_mode"):
        profile_model(made, tiny.batches(made), progress=False)


@pytest.mark.parametrize("where", ["weight", "activation", "loss"])
def test_nan_is_named_with_layer_and_batch(where: str) -> None:
    def between(model: Net, x: Tensor) -> Tensor:
        y = model.two(model.one(x))
        return y + (torch.nan if where == "loss" and float(x[0, 0]) > 50 else 0.0)

    model, batches = Net(between), data()
    if where == "weight":
        with torch.no_grad():
            model.head.bias[1] = torch.nan
        wanted = r"batch 1: the loss is NaN; the first to make NaN or infinity is head"
    else:
        batches[1][0][2, 0] = torch.inf if where == "activation" else 1.0
        batches[1][0][0, 0] = 60.0
        wanted = "batch 2: the loss is NaN; the first to make NaN or infinity is "
        wanted += "one" if where == "activation" else "head"
    with pytest.raises(ModelError, match=wanted):
        measured(model, batches)


def test_squares_that_overflow_are_named() -> None:
    model, batches = Net(lambda m, x: 1e-30 * m.two(m.one(x))), data()
    batches[2][0][:] *= 1e25
    with pytest.raises(ModelError, match=r"batch 3: layer one: inputs or gradients are NaN or inf"):
        measured(model, batches, backends=["whitened"])


def test_float16_gradients_do_not_vanish() -> None:
    model = Net(lambda m, x: 1e-3 * m.two(torch.tanh(m.one(x))))
    with torch.no_grad():
        model.head.weight.mul_(1e-4)
    half = copy.deepcopy(model).half()
    wanted = measured(copy.deepcopy(half).float(), [(x.half().float(), y) for x, y in data()])
    found = measured(half, [(x.half(), y) for x, y in data()])
    for name in names(wanted):
        assert wanted.fisher_rows[name].any()
        assert found.fisher_rows[name] == pytest.approx(wanted.fisher_rows[name], rel=0.05)


def test_float16_gradients_that_overflow_are_scaled_down() -> None:
    model = Net(lambda m, x: 2e3 * m.two(torch.tanh(m.one(x))))
    model.between = lambda m, x: m.two(torch.tanh(m.one(x)))
    half = copy.deepcopy(model).half()

    def large(model: nn.Module, batch: Batch) -> Tensor:
        return 3e4 * losses(model, batch)

    batches = [(x.half(), y) for x, y in data()]
    wanted = measured(half, batches)
    found = profile_model(half, batches, loss_fn=large, progress=False, backends=["fwsvd"])
    for name in names(wanted):
        assert found.fisher_rows[name] == pytest.approx(9e8 * wanted.fisher_rows[name], rel=0.05)


def test_a_fisher_information_of_zero_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = Net(lambda m, x: m.two(torch.relu(m.one(x) - 1e4)) + x[:, :1])
    profile = measured(model)
    assert not profile.fisher_rows["one"].any()
    assert "Fisher information of 2 layers is exactly zero (one, two)" in capsys.readouterr().err


@pytest.mark.parametrize("bias", [0.0, 10.0, 150.0])
def test_a_large_bias_in_bfloat16_drowns_no_moment(bias: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    with torch.no_grad():
        model[0].bias.copy_(bias * torch.randn(8).sign())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=generator).bfloat16()
    batches = [(x, torch.randint(3, (64,), generator=generator))]
    profile = measured(model, batches, backends=["whitened"], include=["0"])
    weight, inputs = model[0].weight.detach().double(), x.double()
    energies = torch.linalg.eigvalsh(weight @ (inputs.T @ inputs) @ weight.T).flip(0)
    wanted = energies.flip(0).cumsum(0).flip(0)
    losses_of = torch.from_numpy(profile.curves["whitened"]["0"].losses)[:-1]
    assert (losses_of / losses_of[0]).numpy() == pytest.approx(
        (wanted / wanted[0]).numpy(), rel=1e-3
    )
