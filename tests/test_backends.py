"""The spectrum is the error of the factors at every rank, and no factors are better."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rankopt import BudgetError
from rankopt.backends import find_backend
from rankopt.backends.projection import decompose, left_vectors, weighted_error
from rankopt.curves import tails

SHAPES = {"wide": (7, 12), "tall": (12, 7), "square": (9, 9)}
FISHERS = ["generic", "some rows zero", "most rows zero", "all rows zero", "fifteen decades"]


def matrix(shape: tuple[int, int], rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    full = torch.randn(shape, generator=generator, dtype=torch.float64)
    if rank is None:
        return full
    left = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)


def fisher(kind: str, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(size, generator=generator, dtype=torch.float64) + 0.01
    if kind == "fifteen decades":
        return rows * torch.logspace(-15, 0, size, dtype=torch.float64)
    zeros = {"generic": 0, "some rows zero": 3, "most rows zero": size - 2, "all rows zero": size}
    rows[: zeros[kind]] = 0.0
    return rows


def approximations(weight: Tensor, weights: Tensor, basis: Tensor | None = None) -> list[Tensor]:
    """W_r for r = 0, 1, ..., K."""
    basis = decompose(weight, weights)[1] if basis is None else basis
    u = left_vectors(weight, weights, basis)
    return [u[:, :r] @ (u[:, :r].T @ weight) for r in range(basis.shape[1] + 1)]


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("rows", FISHERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["fwsvd", "svd"])
def test_the_curve_is_the_error_of_the_factors_at_every_rank(
    backend: str, shape: str, rows: str, rank: int | None
) -> None:
    weight = matrix(SHAPES[shape], rank)
    weights = find_backend(backend).input_weights(fisher(rows, weight.shape[1]))
    energies = decompose(weight, weights)[0]
    curve = tails(energies.numpy())
    total = weighted_error(weight, torch.zeros_like(weight), weights)
    errors = [weighted_error(weight, w, weights) for w in approximations(weight, weights)]
    assert len(curve) == len(errors) == min(weight.shape) + 1
    assert abs(curve[0] - total) <= 1e-9 * total
    assert max(abs(a - b) for a, b in zip(curve, errors, strict=True)) <= 1e-9 * total
    assert (energies >= 0.0).all() and (energies.diff() <= 0.0).all()


@pytest.mark.parametrize("rank", [None, 3, 0])
@pytest.mark.parametrize("rows", FISHERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_matrix_back(shape: str, rows: str, rank: int | None) -> None:
    weight = matrix(SHAPES[shape], rank)
    weights = fisher(rows, weight.shape[1])
    back = approximations(weight, weights)[-1]
    assert (back - weight).abs().max() <= 1e-12 * max(1.0, float(weight.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_constant_fisher_is_plain_svd_is_eckart_young(shape: str) -> None:
    weight = matrix(SHAPES[shape])
    constant = torch.full((weight.shape[1],), 0.37, dtype=torch.float64)
    ones = find_backend("svd").input_weights(constant)
    assert torch.equal(ones, torch.ones_like(constant))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(decompose(weight, ones)[0], s**2, rtol=1e-10)
    assert torch.allclose(decompose(weight, constant)[0], 0.37 * s**2, rtol=1e-10)
    for r, (a, b) in enumerate(
        zip(approximations(weight, ones), approximations(weight, constant), strict=True)
    ):
        truncated = (u[:, :r] * s[:r]) @ v[:r]
        assert torch.allclose(a, truncated, atol=1e-10)
        assert torch.allclose(b, truncated, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_fwsvd_equals_the_paper_where_the_fisher_has_an_inverse(shape: str) -> None:
    weight = matrix(SHAPES[shape])
    weights = fisher("generic", weight.shape[1])
    root = weights.sqrt()
    u, s, v = torch.linalg.svd(weight * root, full_matrices=False)
    ours = approximations(weight, weights)
    plain = approximations(weight, torch.ones_like(weights))
    for r in range(1, min(weight.shape)):
        textbook = (u[:, :r] * s[:r]) @ v[:r] / root
        assert torch.allclose(ours[r], textbook, atol=1e-10)
        least = weighted_error(weight, textbook, weights)
        assert weighted_error(weight, plain[r], weights) > 1.001 * least


@pytest.mark.parametrize("rows", ["generic", "some rows zero"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_factors_are_better(shape: str, rows: str) -> None:
    weight = matrix(SHAPES[shape])
    weights = fisher(rows, weight.shape[1])
    u = left_vectors(weight, weights, decompose(weight, weights)[1])
    generator = torch.Generator().manual_seed(2)

    def noise(like: Tensor, size: float) -> Tensor:
        return size * torch.randn(like.shape, generator=generator, dtype=torch.float64)

    for r in (1, 3, 5):
        up, down = u[:, :r], u[:, :r].T @ weight
        least = weighted_error(weight, up @ down, weights)
        for size in (1e-3, 1e-1, 1.0):
            other = (up + noise(up, size)) @ (down + noise(down, size))
            assert weighted_error(weight, other, weights) > least


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (60, 60)], ids=["wide", "tall", "square"])
def test_a_basis_kept_in_float32_costs_nothing_but_one_computed_in_float32_does(
    shape: tuple[int, int],
) -> None:
    u, _, v = torch.linalg.svd(matrix(shape), full_matrices=False)
    weights = fisher("generic", shape[1])
    # Singular values of W sqrt(D) over three decades.
    weight = (u * torch.logspace(0, -3, 60, dtype=torch.float64)) @ v / weights.sqrt()
    energies, basis = decompose(weight, weights)
    curve = tails(energies.numpy())
    weighted = (weight * weights.sqrt()).float()
    gram = weighted.T @ weighted if shape[0] > shape[1] else weighted @ weighted.T
    careless = torch.linalg.eigh(gram)[1].flip(1)

    def excess(basis: Tensor) -> float:
        found: list[Any] = approximations(weight, weights, basis)
        errors = [weighted_error(weight, w, weights) for w in found]
        return max(errors[r] / curve[r] - 1.0 for r in range(55))

    assert excess(basis.float()) <= 1e-6
    assert excess(careless) > 1e-5


def test_an_unknown_backend_lists_those_that_exist() -> None:
    with pytest.raises(BudgetError, match="'pca'; known: fwsvd, svd"):
        find_backend("pca")
