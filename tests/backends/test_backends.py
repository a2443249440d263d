"""The curve is the error of the factors at every rank, no factors are better, and names are known.

Errors here are the definition: data of a layer are made up (inputs x, output gradients g, one
position a unit), and an approximation's error is taken with all of it, not from the smaller side.
"""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from rankopt import ProfileError
from rankopt.backends import BUILT_IN, find_backend, kronecker, projection
from rankopt.backends.base import Backend, ClosedForm, Decomposition
from rankopt.backends.statistics import STATISTICS, Statistics

SHAPES = {"wide": (7, 12), "tall": (12, 7), "square": (9, 9)}
#: What is made up: how the inputs and the gradients are.
CASES = [
    "generic",
    "some zero",
    "most zero",
    "singular",
    "inputs of fifteen decades",
    "gradients of fifteen decades",
    "all zero",
]
CLOSED = [name for name in BUILT_IN if name != "tfwsvd"]


@dataclasses.dataclass(frozen=True)
class Made:
    """A layer and what was seen of it."""

    weight: Tensor
    x: Tensor
    g: Tensor

    @property
    def seen(self) -> Statistics:
        """Raw sums, as a collector adds them up."""
        w, x, g = self.weight, self.x, self.g
        n_out, n_in = w.shape
        elements = (g.T**2) @ x**2
        a = x if n_in <= n_out else x @ w.T
        b = g if n_out <= n_in else g @ w
        return Statistics(
            units=float(len(x)),
            rows=elements.sum(0),
            columns=elements.sum(1),
            elements=elements,
            second_moment=a.T @ a,
            gradient_moment=b.T @ b,
            positions=float(len(x)),
            input_energy=float((x**2).sum()),
            gradient_energy=float((g**2).sum()),
        )

    def error(self, backend: str, approximation: Tensor) -> float:
        """By definition."""
        d, units, seen = self.weight - approximation, len(self.x), self.seen
        rows, columns, elements = seen.need("rows"), seen.need("columns"), seen.need("elements")
        total = max(float(rows.sum()), 1e-300)
        outputs = self.x @ d.T
        return {
            "svd": lambda: float((d**2).sum()),
            "fwsvd": lambda: float((rows * d**2).sum()) / units,
            "fwsvd_two_sided": lambda: float(columns / total @ d**2 @ rows) / units,
            # As it is kept.
            "tfwsvd": lambda: float(((elements / units).float() * d**2).sum()),
            "whitened": lambda: float((outputs**2).sum()) / units,
            "kronecker": lambda: float((damped(self.g) @ d * (d @ damped(self.x))).sum()),
        }[backend]()


def damped(each: Tensor) -> Tensor:
    """The second moment, and a share of its mean diagonal."""
    moment = each.T @ each / len(each)
    share = kronecker.DAMPING * moment.diagonal().mean()
    return moment + share * torch.eye(len(moment), dtype=moment.dtype)


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def made(shape: tuple[int, int], case: str = "generic", rank: int | None = None) -> Made:
    n_out, n_in = shape
    weight = normal(n_out, n_in, seed=n_out)
    if rank is not None:
        weight = normal(n_out, rank, seed=1) @ normal(rank, n_in, seed=2)
    count = 3 if case == "singular" else 40
    x, g = normal(count, n_in, seed=3), normal(count, n_out, seed=4)
    if case == "some zero":
        x[:, :3], g[:, :2] = 0.0, 0.0
    elif case == "most zero":
        x[:, 2:], g[:, 3:] = 0.0, 0.0
    elif case == "all zero":
        x, g = torch.zeros_like(x), torch.zeros_like(g)
    elif case == "inputs of fifteen decades":
        x *= torch.logspace(-7.5, 0, n_in, dtype=torch.float64)
    elif case == "gradients of fifteen decades":
        g *= torch.logspace(0, -7.5, n_out, dtype=torch.float64)
    return Made(weight, x, g)


def ranks_of(found: Decomposition) -> tuple[int, ...]:
    return found.ranks if found.ranks is not None else tuple(range(len(found.losses)))


def approximations(backend: Backend, layer: Made) -> tuple[Decomposition, dict[int, Tensor]]:
    """What was decomposed, and W_r by r."""
    full = min(layer.weight.shape)
    found = backend.decompose(layer.weight, layer.seen, full)
    products = {}
    for rank in ranks_of(found):
        up, down = backend.factors(layer.weight, found.kept, rank)
        assert up.shape == (layer.weight.shape[0], rank)
        assert down.shape == (rank, layer.weight.shape[1])
        products[rank] = up @ down
    return found, products


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_curve_is_the_error_of_the_factors_at_every_rank(
    name: str, shape: str, case: str, rank: int | None
) -> None:
    backend, layer = find_backend(name), made(SHAPES[shape], case, rank)
    found, products = approximations(backend, layer)
    total = layer.error(name, torch.zeros_like(layer.weight))
    losses = found.losses.tolist()
    assert ranks_of(found)[0] == 0 and ranks_of(found)[-1] == min(layer.weight.shape)
    for loss, product in zip(losses, products.values(), strict=True):
        assert abs(loss - layer.error(name, product)) <= 1e-9 * total
        assert abs(backend.error(layer.weight, product, layer.seen) - loss) <= 1e-7 * total
    assert abs(losses[0] - total) <= 1e-9 * total
    assert all(a >= b >= 0.0 for a, b in itertools.pairwise(losses))
    assert (total > 0.0) == (case != "all zero" or name == "svd")
    back = products[min(layer.weight.shape)]
    assert (back - layer.weight).abs().max() <= 1e-9 * layer.weight.abs().max()


@pytest.mark.parametrize("rank", [3, 0])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLOSED)
def test_a_matrix_of_low_rank_is_given_back_where_it_should(
    name: str, shape: str, case: str, rank: int
) -> None:
    layer = made(SHAPES[shape], case, rank)
    _, products = approximations(find_backend(name), layer)
    total = float((layer.weight**2).sum())
    assert float(((products[min(layer.weight.shape)] - layer.weight) ** 2).sum()) <= 1e-18 * total
    least = layer.error(name, products[rank])
    assert least <= 1e-9 * layer.error(name, torch.zeros_like(layer.weight))


@pytest.mark.parametrize("case", ["generic", "some zero", "singular", "inputs of fifteen decades"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLOSED)
def test_no_other_factors_are_better(name: str, shape: str, case: str) -> None:
    backend, layer = find_backend(name), made(SHAPES[shape], case)
    found = backend.decompose(layer.weight, layer.seen, min(layer.weight.shape))
    total = layer.error(name, torch.zeros_like(layer.weight))
    for rank in (1, 3, 5):
        up, down = backend.factors(layer.weight, found.kept, rank)
        least = layer.error(name, up @ down)
        for seed, size in enumerate((1e-4, 1e-3, 1e-1, 1.0)):
            other_up = up + size * normal(*up.shape, seed=seed)
            other_down = down + size * normal(*down.shape, seed=seed + 9)
            for other in (other_up @ down, up @ other_down, other_up @ other_down):
                assert layer.error(name, other) >= least - 1e-12 * total
        for other_name in CLOSED:
            rival = find_backend(other_name)
            kept = rival.decompose(layer.weight, layer.seen, min(layer.weight.shape)).kept
            a, b = rival.factors(layer.weight, kept, rank)
            assert layer.error(name, a @ b) >= least - 1e-12 * total


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLOSED)
def test_where_inverses_exist_the_textbook_says_the_same(name: str, shape: str) -> None:
    """L^-T (L^T W R)_r R^-1, with whatever square roots the textbook likes."""
    layer = made(SHAPES[shape])
    w, seen, units = layer.weight, layer.seen, len(layer.x)
    n_out, n_in = w.shape
    rows, columns = seen.need("rows"), seen.need("columns")
    left, right = torch.eye(n_out).double(), torch.eye(n_in).double()
    if name == "fwsvd":
        right = (rows / units).sqrt().diag()
    elif name == "fwsvd_two_sided":
        left, right = (columns / rows.sum()).sqrt().diag(), (rows / units).sqrt().diag()
    elif name == "whitened":
        right = torch.linalg.cholesky(layer.x.T @ layer.x / units)
    elif name == "kronecker":
        left, right = map(torch.linalg.cholesky, (damped(layer.g), damped(layer.x)))
    u, s, v = torch.linalg.svd(left.T @ w @ right, full_matrices=False)
    found, products = approximations(find_backend(name), layer)
    assert torch.allclose(found.losses[:-1] - found.losses[1:], s**2, rtol=1e-7)
    for rank, product in products.items():
        truncated = (u[:, :rank] * s[:rank]) @ v[:rank]
        textbook = torch.linalg.solve(left.T, truncated) @ torch.linalg.inv(right)
        assert torch.allclose(product, textbook, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_whitened_error_is_that_of_the_outputs(shape: str) -> None:
    layer = made(SHAPES[shape])
    found, products = approximations(find_backend("whitened"), layer)
    for loss, product in zip(found.losses.tolist(), products.values(), strict=True):
        outputs = layer.x @ (layer.weight - product).T
        assert loss == pytest.approx(float((outputs**2).sum(1).mean()), rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_kronecker_with_gradients_alike_in_all_directions_is_whitened(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled as well: nats agree exactly where the approximation that whitened makes is true."""
    monkeypatch.setattr(kronecker, "DAMPING", 0.0)
    layer = made(SHAPES[shape])
    n_out = layer.weight.shape[0]
    # g of 40 positions with g^T g = 2.5 identity.
    g = torch.linalg.qr(normal(40, n_out, seed=8)).Q * 2.5**0.5
    layer = dataclasses.replace(layer, g=g)
    shown = []
    for name in ("kronecker", "whitened"):
        backend = find_backend(name)
        found, products = approximations(backend, layer)
        factor = backend.scales["nats"].factor((n_out, layer.weight.shape[1]), layer.seen)
        shown.append((factor * found.losses, products))
    assert torch.allclose(shown[0][0], shown[1][0], rtol=1e-8, atol=1e-12)
    for rank in shown[0][1]:
        assert torch.allclose(shown[0][1][rank], shown[1][1][rank], atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_two_sided_with_even_columns_is_fwsvd(shape: str) -> None:
    layer = made(SHAPES[shape])
    n_out, n_in = layer.weight.shape
    even = (layer.seen.need("rows").sum() / n_out).repeat(n_out)
    seen = dataclasses.replace(layer.seen, columns=even)
    shown = []
    for name in ("fwsvd_two_sided", "fwsvd"):
        backend = find_backend(name)
        found = backend.decompose(layer.weight, seen, min(n_out, n_in))
        up, down = backend.factors(layer.weight, found.kept, 3)
        factor = backend.scales["nats"].factor((n_out, n_in), seen)
        shown.append((factor * found.losses, up @ down))
    assert torch.allclose(shown[0][0], shown[1][0], rtol=1e-9, atol=1e-12)
    assert torch.allclose(shown[0][1], shown[1][1], atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_even_fisher_is_plain_svd(shape: str) -> None:
    layer = made(SHAPES[shape])
    seen = Statistics(2.0, torch.full((layer.weight.shape[1],), 0.74, dtype=torch.float64))
    fwsvd, svd = find_backend("fwsvd"), find_backend("svd")
    full = min(layer.weight.shape)
    found, plain = (b.decompose(layer.weight, seen, full) for b in (fwsvd, svd))
    assert torch.allclose(found.losses, 0.37 * plain.losses, rtol=1e-10)
    energies = torch.linalg.svdvals(layer.weight) ** 2
    assert torch.allclose(plain.losses[:-1] - plain.losses[1:], energies, rtol=1e-10)


def test_small_losses_keep_their_digits() -> None:
    weight = torch.diag(torch.tensor([1.0, 1e-9, 3e-10], dtype=torch.float64))
    losses = find_backend("svd").decompose(weight, Statistics(1.0), 3).losses
    # Exactly so: what is left of 1 - 1 would be off by far more.
    assert losses.tolist() == pytest.approx([1.0, 1.09e-18, 9e-20, 0.0], rel=1e-12, abs=0.0)


@pytest.mark.parametrize("unit", [1e-12, 1e12])
@pytest.mark.parametrize("what", ["inputs", "gradients", "weights"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BUILT_IN)
def test_units_of_measurement_change_nothing_but_the_unit_of_the_loss(
    name: str, shape: str, what: str, unit: float
) -> None:
    layer = made(SHAPES[shape])
    other = {
        "inputs": dataclasses.replace(layer, x=layer.x * unit),
        "gradients": dataclasses.replace(layer, g=layer.g * unit),
        "weights": dataclasses.replace(layer, weight=layer.weight * unit),
    }[what]
    (found, products), (again, others) = (
        approximations(find_backend(name), each) for each in (layer, other)
    )
    ratio = again.losses[0] / found.losses[0]
    assert torch.allclose(again.losses / ratio, found.losses, rtol=1e-6, atol=1e-12)
    grown = unit if what == "weights" else 1.0
    for rank, product in products.items():
        # What is found by iteration is found again as far as float32 steps go.
        tolerance = 1e-3 if name == "tfwsvd" else 1e-8
        assert torch.allclose(others[rank] / grown, product, atol=tolerance)


def sharpened(shape: tuple[int, int]) -> Made:
    """Energies over six decades for every backend: W with such singular values, data near even."""
    layer = made(shape)
    u, _, v = torch.linalg.svd(layer.weight, full_matrices=False)
    weight = (u * torch.logspace(0, -3, min(shape), dtype=torch.float64)) @ v
    x, g = normal(400, shape[1], seed=5), normal(400, shape[0], seed=6)
    x *= torch.logspace(-0.5, 0.5, shape[1], dtype=torch.float64)
    return Made(weight, x, g)


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (60, 60)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("name", CLOSED)
def test_arrays_kept_in_float32_cost_nothing_but_computed_in_float32_they_do(
    name: str, shape: tuple[int, int]
) -> None:
    backend, layer = find_backend(name), sharpened(shape)
    assert isinstance(backend, ClosedForm)
    w, seen = layer.weight, layer.seen
    found = backend.decompose(w, seen, 60)
    metric = backend.metric(w, seen)
    inner = None if metric.inner is None else metric.inner.float()
    careless = projection.decompose(projection.Metric(inner, metric.outer.float()))
    arrays = {"basis": careless.basis, "dual": careless.dual}

    def excess(kept: dict[str, Tensor]) -> float:
        worst = 0.0
        for rank in range(0, 55, 3):
            up, down = backend.factors(w, kept, rank)
            worst = max(worst, layer.error(name, up @ down) / float(found.losses[rank]) - 1.0)
        return worst

    assert excess({kind: array.float() for kind, array in found.kept.items()}) <= 1e-6
    assert excess({k: arrays[k] for k in found.kept if arrays[k] is not None}) > 1e-5  # type: ignore[misc]


@pytest.mark.parametrize("case", [case for case in CASES if "decades" in case])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLOSED)
def test_full_rank_gives_float32_weights_back_from_float32_arrays(
    name: str, shape: str, case: str
) -> None:
    backend, layer = find_backend(name), made(SHAPES[shape], case)
    weight, full = layer.weight.float(), min(layer.weight.shape)
    kept = backend.decompose(weight, layer.seen, full).kept
    kept = {kind: array.float() for kind, array in kept.items()}
    up, down = backend.factors(weight, kept, full)
    assert up.dtype == down.dtype == torch.float32
    assert (up @ down - weight).abs().max() <= 1e-4 * weight.abs().max()


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_more_is_kept_than_the_largest_rank_needs(name: str) -> None:
    layer, largest = made((7, 12)), 4
    backend = find_backend(name)
    few = backend.decompose(layer.weight, layer.seen, largest)
    many = backend.decompose(layer.weight, layer.seen, 7)
    if name == "tfwsvd":
        assert few.ranks is not None and few.ranks[-1] == largest
        return
    assert torch.equal(few.losses, many.losses)
    assert all(array.shape == (7, largest) for array in few.kept.values())
    for rank in (1, largest):
        a, b = (backend.factors(layer.weight, found.kept, rank) for found in (few, many))
        assert torch.allclose(a[0] @ a[1], b[0] @ b[1], atol=1e-12)


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_was_not_collected_is_asked_for_by_name(name: str) -> None:
    backend, layer = find_backend(name), made((7, 12))
    for statistic in backend.needs:
        without = dataclasses.replace(layer.seen, **{statistic: None})
        with pytest.raises(ProfileError, match=statistic):
            backend.decompose(layer.weight, without, 3)
    # Numbers of a layer are always summed; arrays are, where they are asked for.
    rest = dict.fromkeys(set(STATISTICS) - backend.needs)
    seen = dataclasses.replace(layer.seen, **rest)
    alone = backend.decompose(layer.weight, seen, 3).losses
    assert torch.equal(alone, backend.decompose(layer.weight, layer.seen, 3).losses)
