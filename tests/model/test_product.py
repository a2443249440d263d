"""A low-rank layer's weight: known without a multiplication, multiplied where it is used."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint

from rankopt import LowRank, LowRankLinear, apply_plan, make_plan, profile_model
from rankopt.model.lowrank import LowRankEmbedding
from rankopt.model.product import Product, product
from tests import tiny


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[Product]:
    """Products that were multiplied."""
    seen: list[Product] = []
    multiply = Product.formed

    def counted(self: Product) -> Tensor:
        if self._formed is None:
            seen.append(self)
        return multiply(self)

    monkeypatch.setattr(Product, "formed", counted)
    return seen


def factors(trainable: bool = True) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return (
        nn.Parameter(torch.randn(5, 2), requires_grad=trainable),
        nn.Parameter(torch.randn(2, 4), requires_grad=trainable),
    )


def test_t5_runs_without_forming_a_product(formed: list[Product]) -> None:
    model = tiny.t5()
    batches = tiny.batches(model)
    profile = profile_model(model, batches, include=["*.wo"])
    apply_plan(model, make_plan(profile, keep=0.4), profile)
    low = [n for n, m in model.named_modules() if isinstance(m, LowRank)]
    assert low and all(name.endswith(".wo") for name in low)
    with torch.no_grad():
        logits = model(**batches[0]).logits
        model.generate(batches[0]["input_ids"], max_new_tokens=4, min_new_tokens=4)
    model(**batches[0]).loss.backward()
    assert not formed
    model.dequantize()
    assert formed
    with torch.no_grad():
        assert torch.allclose(model(**batches[0]).logits, logits, atol=1e-4)


@pytest.mark.parametrize("trainable", [True, False])
def test_what_a_model_looks_up_is_that_of_the_matrix(
    trainable: bool, formed: list[Product]
) -> None:
    left, right = factors(trainable)
    found, plain = product(left, right), left @ right
    assert isinstance(found, Tensor) and not isinstance(found, nn.Parameter)
    for name in ("dtype", "device", "shape", "ndim", "requires_grad", "is_leaf", "layout"):
        assert getattr(found, name) == getattr(plain, name), name
    assert (found.size(1), found.numel(), found.stride()) == (4, 20, plain.stride())
    assert found.is_floating_point() and not found.is_meta and len(found) == 5
    assert not formed


USES: dict[str, Callable[[Tensor], Any]] = {
    "linear": lambda w: linear(torch.ones(3, 4), w),
    "transpose": lambda w: w.T,
    "row": lambda w: w[2],
    "dtype": lambda w: w.to(torch.float64),
    "clone": lambda w: w.clone(),
    "data": lambda w: w.data,
    "stack": lambda w: torch.stack([w, w]),
    "lookup": lambda w: embedding(torch.tensor([1, 4]), w),
    "einsum": lambda w: torch.einsum("oi,bi->bo", w, torch.ones(3, 4)),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy()),
    "numpy of it": lambda w: torch.from_numpy(w.numpy(force=True)),
    "list": lambda w: torch.tensor(w.tolist()),
    "copy": lambda w: copy.deepcopy(w.detach()),
    "pickle": lambda w: pickle.loads(pickle.dumps(w.detach())),
}


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("use", USES)
def test_what_is_computed_with_it_is_computed_with_the_matrix(use: str, trainable: bool) -> None:
    left, right = factors(trainable)
    found = USES[use](product(left, right))
    assert type(found) is Tensor and torch.equal(found, USES[use](left @ right))


def test_a_deep_copy_and_a_pickle_are_plain_matrices() -> None:
    left, right = factors(trainable=False)
    for again in (copy.deepcopy(product(left, right)), pickle.loads(pickle.dumps(left @ right))):
        assert type(again) is Tensor and torch.equal(again, left @ right)


def test_what_is_changed_in_place_stays_changed() -> None:
    left, right = factors()
    with torch.no_grad():
        found = product(left, right)
        found.mul_(2.0)
        found[1].zero_()
        wanted = 2.0 * (left @ right)
        wanted[1] = 0.0
        assert torch.equal(linear(torch.ones(1, 4), found), linear(torch.ones(1, 4), wanted))


class Foreign(torch.autograd.Function):
    """A kernel of somebody's that takes the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].T @ x


def twice(weight: Tensor) -> Tensor:
    """A gradient of a gradient."""
    inner = weight.pow(3).sum()
    return torch.autograd.grad(inner, weight, create_graph=True)[0].square()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: linear(x, w).square(),
    "foreign": lambda x, w: Foreign.apply(x, w).square(),
    "checkpoint": lambda x, w: checkpoint(linear, x, w, use_reentrant=False).square(),
    "second order": lambda x, w: twice(w),
    "in place": lambda x, w: linear(x, w.mul_(2.0)),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_reach_both_factors(loss: str) -> None:
    left, right = factors()
    x = torch.randn(3, 4)
    found = torch.autograd.grad(LOSSES[loss](x, product(left, right)).sum(), (left, right))
    wanted = torch.autograd.grad(LOSSES[loss](x, left @ right).sum(), (left, right))
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5) and a.abs().max() > 0


def test_transforms_of_functions_see_the_multiplication() -> None:
    left, right = factors()
    x = torch.randn(3, 4)

    def loss(factor: Tensor, row: Tensor) -> Tensor:
        return linear(row, product(factor, right)).square().sum()

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(left, x)
    (wanted,) = torch.autograd.grad(linear(x, left @ right).square().sum(), left)
    assert torch.allclose(rows.sum(0), wanted, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(left.detach(), torch.ones(5, 2))
        moved = torch.autograd.forward_ad.unpack_dual(product(dual, right).sum()).tangent
        assert torch.allclose(moved, (torch.ones(5, 2) @ right).sum())


class Uses(nn.Module):
    """A head that takes a layer's weight and leaves the layer alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(B, 6)`` -> ``(B, 8)``, after a look at the dtype."""
        found: Tensor = linear(x.to(self.layer.weight.dtype), self.layer.weight, self.layer.bias)
        return found


@pytest.mark.parametrize("how", ["compile", "export", "trace", "fx"])
def test_recorded_programs_have_the_right_values(how: str) -> None:
    torch.manual_seed(4)
    layer = LowRankLinear(6, 8, 3, bias=True)
    x = torch.randn(2, 6)
    made: dict[str, Callable[[nn.Module], Any]] = {
        "compile": lambda module: torch.compile(module, backend="eager", fullgraph=True),
        "export": lambda module: torch.export.export(module, (x,)).module(),
        "trace": lambda module: torch.jit.trace(module, (x,)),
        "fx": torch.fx.symbolic_trace,
    }
    recorded = made[how](Uses(layer))
    assert torch.allclose(recorded(x), layer(x), atol=1e-6)
    with torch.no_grad():
        layer.up.weight.mul_(3.0)
    assert torch.allclose(recorded(x), layer(x), atol=1e-6), "the factors are read, not a copy"


def test_layers_have_it_and_state_dicts_do_not() -> None:
    torch.manual_seed(5)
    table = LowRankEmbedding(7, 6, 2)
    index = torch.tensor([[1, 6]])
    assert torch.allclose(embedding(index, table.weight), table(index), atol=1e-6)
    assert table.weight.shape == (7, 6) and "weight" not in table.state_dict()
    half = copy.deepcopy(table).half()
    assert half.weight.dtype is torch.float16
    away = LowRankLinear(6, 8, 3, bias=False, device="meta")
    assert away.weight.is_meta and linear(torch.ones(1, 6, device="meta"), away.weight).is_meta
