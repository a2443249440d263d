"""TFWSVD: no worse than a closed form, never rising, and the curve says what the factors do."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from rankopt import OptionError
from rankopt.backends import find_backend
from rankopt.backends.base import Backend
from rankopt.backends.statistics import Statistics
from rankopt.backends.tfwsvd import (
    BACKEND,
    ElementWise,
    curve,
    factors,
    grid,
    minimise,
    weighted_error,
)

SHAPES = {"wide": (7, 12), "tall": (12, 7), "square": (9, 9)}
FISHERS = ["generic", "lines zero", "mostly zero", "all zero", "fifteen decades"]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def fisher(kind: str, shape: tuple[int, int], seed: int = 1) -> Tensor:
    even = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "lines zero":
        even[1], even[:, 2:4] = 0.0, 0.0
    if kind == "mostly zero":
        return (even < 0.3).double()
    if kind == "all zero":
        return torch.zeros_like(even)
    return 10.0 ** (-15.0 * even) if kind == "fifteen decades" else even


def tails(matrix: Tensor) -> Tensor:
    """Squared error of the best approximation at ranks 0..K."""
    energies = torch.linalg.svdvals(matrix).square()
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])


def closed_forms(weight: Tensor, weights: Tensor, rank: int) -> list[float]:
    """Errors, in the element-wise metric, of textbook closed forms."""
    found = []
    one = torch.ones_like
    columns, rows = weights.sum(1), weights.sum(0)
    for left, right in ((one(columns), one(rows)), (one(columns), rows), (columns, rows)):
        a, b = left.sqrt()[:, None], right.sqrt()
        u, s, v = torch.linalg.svd(a * weight * b, full_matrices=False)
        found.append(weighted_error(weight, (u[:, :rank] * s[:rank]) @ v[:rank] / (a * b), weights))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_constant_fisher_is_plain_svd(shape: str) -> None:
    weight = random(*SHAPES[shape])
    ranks = range(min(weight.shape) + 1)
    losses = curve(weight, torch.full_like(weight, 0.37), ranks).losses
    assert torch.allclose(losses, 0.37 * tails(weight), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_one_fisher_is_the_two_sided_closed_form(shape: str) -> None:
    n_out, n_in = SHAPES[shape]
    weight = random(n_out, n_in)
    columns, rows = fisher("generic", (1, n_out))[0], fisher("generic", (1, n_in), 2)[0]
    losses = curve(weight, columns[:, None] * rows, range(min(n_out, n_in) + 1)).losses
    best = tails(columns.sqrt()[:, None] * weight * rows.sqrt())
    assert torch.allclose(losses, best, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_iteration_is_exact_for_a_rank_one_fisher(shape: str) -> None:
    """The preconditioner is the Hessian then: two least-squares problems are solved."""
    n_out, n_in = SHAPES[shape]
    weight, up, down = random(n_out, n_in), random(n_out, 4, seed=2), random(4, n_in, seed=3)
    # Directions that are far from orthogonal, and of another length.
    down[1] = 1e3 * (down[0] + down[1])
    columns, rows = fisher("generic", (1, n_out))[0], fisher("generic", (1, n_in), 2)[0]
    found = minimise(weight, columns[:, None] * rows, up, down, 1)
    left, right = columns.sqrt()[:, None], rows.sqrt()
    solved = torch.linalg.lstsq((down * right).T, (weight * right).T).solution.T
    again = torch.linalg.lstsq(left * solved, left * weight).solution
    best = weighted_error(weight, solved @ again, columns[:, None] * rows)
    # Float32 directions from a residual a thousand times as large as the solution.
    assert found.errors[1] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("kind", FISHERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_never_rise_and_are_those_of_the_factors(shape: str, kind: str) -> None:
    weight = random(*SHAPES[shape])
    weights = fisher(kind, SHAPES[shape])
    up, down = random(weight.shape[0], 3, seed=2), random(3, weight.shape[1], seed=3)
    found = minimise(weight, weights, up, down, 30)
    assert found.errors[0] == pytest.approx(weighted_error(weight, up @ down, weights), rel=1e-12)
    last = weighted_error(weight, found.up @ found.down, weights)
    assert found.errors[-1] == pytest.approx(last, rel=1e-12)
    assert all(b < a for a, b in itertools.pairwise(found.errors))
    assert kind == "all zero" or found.errors[-1] < 0.2 * found.errors[0]
    assert torch.isfinite(found.up).all() and torch.isfinite(found.down).all()
    again = minimise(weight, weights, up, down, 30)
    assert found.errors == again.errors and torch.equal(found.up, again.up)


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("kind", FISHERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_curve_is_the_error_of_the_factors(shape: str, kind: str, iterations: int) -> None:
    weight = random(*SHAPES[shape])
    weights = fisher(kind, SHAPES[shape])
    ranks = range(min(weight.shape) + 1)
    found = curve(weight, weights, ranks, iterations)
    total = weighted_error(weight, torch.zeros_like(weight), weights)
    assert (found.losses.diff() <= 0.0).all()
    assert float(found.losses[0]) == pytest.approx(total)
    for rank, loss, origin in zip(ranks, found.losses.tolist(), found.origins, strict=True):
        up, down = factors(weight, weights, rank, iterations, origin)
        assert up.shape == (weight.shape[0], rank) and down.shape == (rank, weight.shape[1])
        error = weighted_error(weight, up @ down, weights)
        assert error == pytest.approx(loss, rel=1e-9, abs=1e-20 * total)


@pytest.mark.parametrize("kind", ["mostly zero", "fifteen decades"])
def test_a_rank_that_came_out_worse_has_the_lower_ranks_factors(kind: str) -> None:
    for seed in range(40):
        weight, weights = random(7, 9, seed=seed), fisher(kind, (7, 9), seed=seed + 100)
        found = curve(weight, weights, range(8))
        if found.origins != tuple(range(8)):
            break
    else:
        pytest.fail("no rank came out worse: nothing is tested")
    rank = next(r for r in range(8) if found.origins[r] != r)
    own = factors(weight, weights, rank)
    assert weighted_error(weight, own[0] @ own[1], weights) > found.losses[rank]
    up, down = factors(weight, weights, rank, origin=found.origins[rank])
    assert up.shape == (7, rank) and down.shape == (rank, 9)
    error = weighted_error(weight, up @ down, weights)
    assert error == pytest.approx(float(found.losses[rank]), rel=1e-9)


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_closed_form_is_better(shape: str, iterations: int) -> None:
    for seed in range(5):
        weight = random(*SHAPES[shape], seed=seed)
        weights = fisher("generic", SHAPES[shape], seed=seed).square()
        for rank in (1, 2, 4, 6):
            found = curve(weight, weights, [rank], iterations).losses[0]
            assert found <= (1 + 1e-12) * min(closed_forms(weight, weights, rank))
            if iterations:
                assert found < 0.99 * min(closed_forms(weight, weights, rank))


@pytest.mark.parametrize("kind", [*FISHERS, "one small weight"])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_matrix_back(shape: str, kind: str) -> None:
    weight, weights = random(*SHAPES[shape]), fisher(kind, SHAPES[shape])
    if kind == "one small weight":
        weight[0, 0], weights = 1e-13, torch.zeros_like(weights)
        weights[0, 0] = 1.0
    up, down = factors(weight, weights, min(weight.shape))
    assert (up @ down - weight).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", ["generic", "all zero"])
def test_where_everything_fits_the_plain_svd_decides(kind: str) -> None:
    weight = random(8, 2) @ random(2, 11, seed=1)
    up, down = factors(weight, fisher(kind, (8, 11)), 2)
    assert (up @ down - weight).abs().max() <= 1e-12


def test_weights_without_fisher_information_stay_as_they_start() -> None:
    weight, weights = random(7, 12), fisher("lines zero", (7, 12))
    up, down = random(7, 3, seed=2), random(3, 12, seed=3)
    found = minimise(weight, weights, up, down, 5)
    assert torch.equal(found.up[1], up[1]) and torch.equal(found.down[:, 2:4], down[:, 2:4])
    assert not torch.equal(found.up[0], up[0]) and not torch.equal(found.down[:, 0], down[:, 0])


def test_in_the_end_the_gradient_vanishes() -> None:
    weight, weights = random(6, 8), fisher("generic", (6, 8))
    start = factors(weight, weights, 2, iterations=0)

    def slope(up: Tensor, down: Tensor) -> float:
        up, down = up.clone().requires_grad_(), down.clone().requires_grad_()
        ((weight - up @ down).square() * weights).sum().backward()
        # In an orthonormal gauge, the gradient's size means something.
        return float((up.grad.square().sum() + down.grad.square().sum()).sqrt())  # type: ignore[union-attr]

    found = minimise(weight, weights, *start, 3000)
    assert 10 < len(found.errors) <= 3000, "stopped for want of improvement"
    assert all(b < a for a, b in itertools.pairwise(found.errors))
    assert slope(found.up, found.down) < 1e-6 * slope(*start)


@pytest.mark.slow
def test_close_to_the_best_of_many_starts() -> None:
    """The problem is NP-hard: a local minimum is all that is promised, but not a bad one."""
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(4):
        weight, weights = random(4, 5, seed=seed), fisher("generic", (4, 5), seed=seed).square()
        w, f = weight.numpy(), weights.numpy()

        def objective(flat: np.ndarray, w: np.ndarray = w, f: np.ndarray = f) -> tuple:
            up, down = flat[:8].reshape(4, 2), flat[8:].reshape(2, 5)
            residual = up @ down - w
            pull = 2.0 * f * residual
            slope = np.concatenate([(pull @ down.T).ravel(), (up.T @ pull).ravel()])
            return float((f * residual**2).sum()), slope

        starts = np.random.default_rng(seed).normal(size=(60, 18))
        runs = [optimize.minimize(objective, x, jac=True, method="BFGS").fun for x in starts]
        ours = float(curve(weight, weights, [2], 200).losses[0])
        assert ours >= (1 - 1e-6) * min(runs)
        assert ours <= 1.1 * min(runs)
        assert ours <= np.median(runs) * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_unit_of_the_fisher_information_does_not_matter(scale: float) -> None:
    weight, weights = random(9, 7), fisher("generic", (9, 7))
    plain = curve(weight, weights, range(8)).losses
    assert torch.allclose(curve(weight, scale * weights, range(8)).losses, scale * plain, rtol=1e-6)


def test_single_precision_weights() -> None:
    weight, weights = random(9, 7).float(), fisher("generic", (9, 7))
    found = curve(weight, weights, [0, 3])
    up, down = factors(weight, weights, 3)
    assert up.dtype == down.dtype == torch.float64
    exact = weighted_error(weight.double(), up @ down, weights)
    assert exact == pytest.approx(float(found.losses[1]), rel=1e-9)
    assert torch.equal(curve(weight.double(), weights, [0, 3]).losses, found.losses)


@pytest.mark.parametrize("largest", [0, 1, 2, 7, 8, 9, 63, 64, 65, 143, 287, 418, 2047])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_grid(largest: int, count: int) -> None:
    ranks = grid(largest, count)
    assert ranks[0] == 0 and ranks[-1] == largest
    assert all(a < b for a, b in itertools.pairwise(ranks))
    assert len(ranks) == min(largest, count) + 1
    if largest >= 8 * count:
        assert all(rank % 8 == 0 for rank in ranks[:-1])
    steps = np.diff(ranks)
    assert largest == 0 or steps.max() <= largest / count + 8


def test_the_backend_keeps_its_protocol() -> None:
    assert isinstance(BACKEND, Backend) and find_backend("tfwsvd") is BACKEND
    backend = ElementWise(count=4)
    weight, sums = random(14, 20), 30.0 * fisher("generic", (14, 20)).square()
    statistics = Statistics(units=30.0, elements=sums)
    found = backend.decompose(weight, statistics, largest=8)
    assert found.ranks == (0, 2, 4, 6, 8) and (found.losses.diff() < 0.0).all()
    kept = {kind: array.float() for kind, array in found.kept.items()}
    for rank, loss in zip(found.ranks, found.losses.tolist(), strict=True):
        up, down = backend.factors(weight, kept, rank)
        assert up.shape == (14, rank)
        assert torch.allclose(up.T @ up, torch.eye(rank, dtype=torch.float64), atol=1e-12)
        assert backend.error(weight, up @ down, statistics) == pytest.approx(loss, rel=1e-9)
        plain = (sums / 30.0 * (weight - up @ down).square()).sum()
        assert float(plain) == pytest.approx(loss, rel=1e-6)
    with pytest.raises(OptionError, match="0, 2, 4, 6, 8, not at 5"):
        backend.factors(weight, kept, 5)
