"""The pivoted form: the function of a pair of factors, in as many numbers as a rank has freedom."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from rankopt.apply.surgery import low_rank
from rankopt.layers import FORMS, Layer
from rankopt.model.lowrank import LowRank
from rankopt.model.pivoted import (
    BOUND,
    PivotedColumns,
    PivotedEmbedding,
    PivotedRows,
    pivot_columns,
)
from rankopt.model.product import Product
from rankopt.model.weights import weight_of
from tests.model.test_product import LOSSES, USES, Uses

#: (out, in): columns are the pivots, or rows.
SHAPES = [(9, 6), (6, 9), (7, 7)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(dense: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight_of(dense).double(), full_matrices=False)
    return values[:rank, None] * right[:rank], left[:, :rank]


def layer_of(dense: nn.Module) -> Layer:
    out, into = weight_of(dense).shape
    named: dict[str, Any] = {"name": "x", "kind": "x", "itemsize": 4, "digest": ""}
    return Layer(out_features=out, in_features=into, **named)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize(("rank", "count"), [(1, 1), (1, 8), (5, 8), (8, 8), (40, 60)])
def test_all_columns_are_bounded_sums_of_the_pivots(rank: int, count: int, scale: float) -> None:
    for seed in range(20):
        # Falling singular values, as those of factors are.
        made = random(rank, count, seed=seed) * 0.7 ** torch.arange(rank)[:, None] * scale
        order, mixing = pivot_columns(made)
        assert sorted(order.tolist()) == list(range(count))
        assert mixing.shape == (rank, count - rank) and mixing.dtype == torch.float64
        assert not mixing.numel() or mixing.abs().max() <= BOUND
        pivots, others = made[:, order].tensor_split([rank], 1)
        assert (pivots @ mixing - others).norm() <= 1e-13 * made.norm()
        again = pivot_columns(made.clone())
        assert torch.equal(again[0], order) and torch.equal(again[1], mixing)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_factor_with_fewer_directions_than_rows_does_as_well(rank: int) -> None:
    made = random(6, rank) @ random(rank, 10, seed=1)
    order, mixing = pivot_columns(made)
    pivots, others = made[:, order].tensor_split([6], 1)
    assert mixing.isfinite().all() and mixing.abs().max() <= BOUND
    assert (pivots @ mixing - others).norm() <= 1e-13 * max(made.norm().item(), 1e-300)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_function_of_the_pair_with_the_parameters_that_a_plan_counts(
    shape: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(shape[1], shape[0], bias=bias)
    x = torch.randn(2, 5, shape[1])
    layer = layer_of(dense)
    assert layer.largest_rank("pivoted") == min(shape) - 1
    for rank in range(1, min(shape)):
        down, up = factors(dense, rank)
        pair, pivoted = (low_rank(dense, down, up, dense.bias, form) for form in FORMS)
        assert isinstance(pivoted, PivotedColumns if shape[1] <= shape[0] else PivotedRows)
        assert (pivoted.form, pivoted.rank) == ("pivoted", rank)
        assert pair(x).shape == pivoted(x).shape
        assert (pair(x) - pivoted(x)).abs().max() <= 1e-6 * max(1.0, pair(x).abs().max().item())
        assert torch.allclose(pivoted.weight, (up @ down).float(), atol=1e-6)
        biases = shape[0] if bias else 0
        count = sum(p.numel() for p in pivoted.parameters())
        assert count == layer.cost(rank, "pivoted") + biases
        assert count == layer.cost(rank) - rank * rank + biases
        assert pivoted.bias is (dense.bias if bias else None)
        assert type(pivoted.down) is nn.Linear and type(pivoted.up) is nn.Linear


def test_an_embedding_too() -> None:
    torch.manual_seed(0)
    dense = nn.Embedding(11, 5, padding_idx=2)
    index = torch.tensor([[0, 10, 2], [1, 1, 3]])
    for rank in range(1, 5):
        down, up = factors(dense, rank)
        low = low_rank(dense, down, up, None, "pivoted")
        assert isinstance(low, PivotedEmbedding)
        assert (low.num_embeddings, low.embedding_dim, low.padding_idx) == (11, 5, 2)
        wanted = (up @ down).T.float()
        assert torch.allclose(low.weight, wanted, atol=1e-6)
        assert torch.allclose(low(index), wanted[index], atol=1e-6)
        assert sum(p.numel() for p in low.parameters()) == layer_of(dense).cost(rank, "pivoted")
        assert torch.allclose(embedding(index, low.weight), low(index), atol=1e-6)
    low(index).square().sum().backward()
    gradient = low.down.weight.grad
    assert gradient is not None and not gradient[2].any() and gradient[10].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dense_layers_dtype_is_kept_and_rounds_little(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    dense = nn.Linear(96, 64).to(dtype)
    down, up = factors(dense, 40)
    low = low_rank(dense, down, up, dense.bias, "pivoted")
    assert {p.dtype for p in low.parameters()} == {dtype} and low.index.dtype == torch.int64
    wanted = up @ down
    error = (low.weight.double() - wanted).norm() / wanted.norm()
    assert error < 8 * torch.finfo(dtype).eps


def pivoted(shape: tuple[int, int], rank: int = 3, trainable: bool = True) -> LowRank:
    torch.manual_seed(2)
    dense = nn.Linear(shape[1], shape[0])
    dense.requires_grad_(trainable)
    return low_rank(dense, *factors(dense, rank), dense.bias, "pivoted").eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_look_at_the_weight_forms_no_product(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    low = pivoted(shape)
    for trainable in (True, False):
        low.requires_grad_(trainable)
        weight = low.weight
        plain = weight + 0.0
        monkeypatch.setattr(Product, "formed", lambda self: pytest.fail("it was formed"))
        monkeypatch.setattr(Tensor, "argsort", lambda *_: pytest.fail("it was sorted"))
        for name in ("dtype", "device", "shape", "ndim", "requires_grad"):
            assert getattr(low.weight, name) == getattr(plain, name)
        assert low.weight.stride() == plain.stride()
        monkeypatch.undo()


@pytest.mark.parametrize("shape", [(5, 4), (4, 4), (3, 4)])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_through_the_weight_reach_both_parts(loss: str, shape: tuple[int, int]) -> None:
    low = pivoted(shape, 2)
    parts = (low.down.weight, low.up.weight)
    x = torch.randn(3, shape[1])

    def written(*parts: Tensor) -> Tensor:
        """The weight by its definition, in operations that autograd knows."""
        down, up = parts
        if shape[1] <= shape[0]:
            return torch.cat([up, up @ down], 1)[:, low.index.argsort()]
        return torch.cat([down, up @ down])[low.index]

    found = torch.autograd.grad(LOSSES[loss](x, low.weight).sum(), parts)
    wanted = torch.autograd.grad(LOSSES[loss](x, written(*parts)).sum(), parts)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5) and a.abs().max() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_layer_are_those_of_its_weight(shape: tuple[int, int]) -> None:
    low = pivoted(shape)
    x = torch.randn(4, shape[1])
    parts = list(low.parameters())
    found = torch.autograd.grad(low(x).square().sum(), parts)
    wanted = torch.autograd.grad(linear(x, low.weight, low.bias).square().sum(), parts)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 4), (3, 4)])
@pytest.mark.parametrize("use", USES)
def test_what_is_computed_with_the_weight_is_computed_with_the_matrix(
    use: str, shape: tuple[int, int]
) -> None:
    if shape[0] < 5:
        shape = (5, 4) if use == "lookup" else shape
    low = pivoted(shape, 2, trainable=False)
    found, wanted = USES[use](low.weight), USES[use](low.weight.clone())
    assert type(found) is Tensor and torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
@pytest.mark.parametrize("how", ["compile", "export", "trace", "fx"])
def test_recorded_programs_have_the_right_values(how: str, shape: tuple[int, int]) -> None:
    layer = pivoted(shape)
    x = torch.randn(2, shape[1])
    made: dict[str, Any] = {
        "compile": lambda module: torch.compile(module, backend="eager", fullgraph=True),
        "export": lambda module: torch.export.export(module, (x,)).module(),
        "trace": lambda module: torch.jit.trace(module, (x,)),
        "fx": torch.fx.symbolic_trace,
    }
    for module in (layer, Uses(layer)):
        recorded = made[how](module)
        assert torch.allclose(recorded(x), layer(x), atol=1e-5)


def test_copies_and_other_dtypes_keep_the_index() -> None:
    low = pivoted((6, 8))
    again = copy.deepcopy(low).half()
    assert torch.equal(again.index, low.index) and again.index.dtype == torch.int64
    assert set(low.state_dict()) == {"down.weight", "up.weight", "index", "bias"}
    empty = PivotedRows(8, 6, 3, True, device="meta")
    assert all(p.is_meta for p in (*empty.parameters(), *empty.buffers()))
