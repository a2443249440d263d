"""What a backend's factors lose under the Kronecker-factored Fisher information."""

import dataclasses

import pytest
import torch
from torch import Tensor

from rankopt.backends import BUILT_IN, find_backend
from rankopt.backends.kronecker import DAMPING
from rankopt.backends.statistics import Statistics, together
from rankopt.backends.valued import cross_fitted, valued

SHAPES = [(5, 9), (9, 5), (7, 7)]
OTHERS = [name for name in BUILT_IN if name != "kronecker"]


@dataclasses.dataclass
class Seen:
    """A layer, its statistics, and the full moments that they come from."""

    weight: Tensor
    statistics: Statistics
    inputs: Tensor
    outputs: Tensor


def seen(shape: tuple[int, int], seed: int = 0, units: float = 4.0) -> Seen:
    """Correlated inputs and gradients at 40 positions of so many units."""
    out, into = shape
    made = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=made, dtype=torch.float64)

    w, x, g = drawn(out, into), drawn(40, into) @ drawn(into, into), drawn(40, out)
    g = g @ drawn(out, out)
    elements = g.square().T @ x.square()
    behind = x if into <= out else x @ w.T
    before = g if out <= into else g @ w
    statistics = Statistics(
        units,
        elements.sum(0),
        elements.sum(1),
        elements,
        behind.T @ behind,
        before.T @ before,
        40.0,
        float(x.square().sum()),
        float(g.square().sum()),
    )
    inputs, outputs = x.T @ x / 40.0, g.T @ g / units
    inputs += DAMPING * inputs.trace() / into * torch.eye(into, dtype=torch.float64)
    outputs += DAMPING * outputs.trace() / out * torch.eye(out, dtype=torch.float64)
    return Seen(w, statistics, inputs, outputs)


def lost(layer: Seen, product: Tensor) -> float:
    """The definition: one half of the trace."""
    error = layer.weight - product
    return 0.5 * float((layer.outputs @ error @ layer.inputs @ error.T).trace())


def completed(layer: Seen) -> Seen:
    """The moment of the larger side with what is not known of it as the backends take it."""
    out, into = layer.weight.shape
    if out == into:
        return layer
    side = layer.weight if out < into else layer.weight.T
    moment = layer.inputs if out < into else layer.outputs
    inside = torch.linalg.pinv(side) @ side
    known, n = inside @ moment @ inside, max(out, into)
    outside = float(moment.trace() - known.trace()) / (n - min(out, into))
    whole = known + outside * (torch.eye(n, dtype=torch.float64) - inside)
    name = "inputs" if out < into else "outputs"
    return dataclasses.replace(layer, **{name: whole})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OTHERS)
def test_values_are_the_definition_of_what_the_factors_lose(
    name: str, shape: tuple[int, int]
) -> None:
    layer, backend = seen(shape), find_backend(name)
    full = min(shape)
    made = backend.decompose(layer.weight, layer.statistics, full)
    found = valued(backend, layer.weight, layer.statistics, made)
    assert found is not None
    judge = completed(layer) if made.ranks is not None else layer
    wanted = []
    for rank in range(full + 1) if made.ranks is None else made.ranks:
        up, down = backend.factors(layer.weight, made.kept, rank) if rank else (None, None)
        product = torch.zeros_like(layer.weight) if up is None else up.double() @ down.double()
        wanted.append(lost(judge, product))
    envelope = torch.tensor(wanted).flip(0).cummax(0).values.flip(0).double()
    assert torch.allclose(found, envelope, rtol=1e-5, atol=1e-6 * wanted[0])
    assert (found.diff() <= 0.0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_no_factors_lose_less_than_those_of_kronecker(shape: tuple[int, int]) -> None:
    layer, best = seen(shape), find_backend("kronecker")
    least = 0.5 * best.decompose(layer.weight, layer.statistics, min(shape)).losses
    for name in OTHERS:
        backend = find_backend(name)
        made = backend.decompose(layer.weight, layer.statistics, min(shape))
        found = valued(backend, layer.weight, layer.statistics, made)
        ranks = list(range(min(shape) + 1) if made.ranks is None else made.ranks)
        assert found is not None
        if made.ranks is None:
            assert (found >= least[ranks] * (1 - 1e-9)).all()
        assert float(found[0] / least[0]) > 1.0 - 1e-9


def test_the_kronecker_factored_curve_is_its_own_under_it() -> None:
    layer, backend = seen((5, 9)), find_backend("kronecker")
    made = backend.decompose(layer.weight, layer.statistics, 5)
    found = valued(backend, layer.weight, layer.statistics, made)
    assert found is not None
    assert torch.allclose(found, 0.5 * made.losses, rtol=1e-9, atol=1e-12 * float(made.losses[0]))


@pytest.mark.parametrize("missing", ["second_moment", "gradient_moment"])
def test_without_both_moments_there_is_no_value(missing: str) -> None:
    layer, backend = seen((5, 9)), find_backend("fwsvd")
    statistics = dataclasses.replace(layer.statistics, **{missing: None})
    made = backend.decompose(layer.weight, statistics, 5)
    assert made.projections is None
    assert valued(backend, layer.weight, statistics, made) is None


def test_a_complete_curve_that_does_not_say_what_it_projects_on_has_no_value() -> None:
    layer, backend = seen((5, 9)), find_backend("fwsvd")
    made = backend.decompose(layer.weight, layer.statistics, 5)
    silent = dataclasses.replace(made, projections=None)
    assert valued(backend, layer.weight, layer.statistics, silent) is None


@pytest.mark.parametrize("name", OTHERS)
def test_a_layer_that_never_mattered_loses_nothing(name: str) -> None:
    layer, backend = seen((5, 9)), find_backend(name)
    names = [field.name for field in dataclasses.fields(Statistics)]
    none = {each: 0.0 * getattr(layer.statistics, each) for each in names[1:]}
    statistics = dataclasses.replace(layer.statistics, **none)
    made = backend.decompose(layer.weight, statistics, 5)
    found = valued(backend, layer.weight, statistics, made)
    assert found is not None and float(found.abs().max()) == 0.0


@pytest.mark.parametrize("name", ["kronecker", "fwsvd", "tfwsvd"])
def test_cross_fitted_losses_are_of_factors_that_other_data_made(name: str) -> None:
    """Half of the loss on the same data, a quarter of each half's on the other."""
    backend, this, other = find_backend(name), seen((5, 9), seed=1), seen((5, 9), seed=2)
    weight = this.weight
    other = dataclasses.replace(other, weight=weight)
    # What lies behind W is that of one W.
    parts = (this.statistics, moments_of(other))
    whole = together(*parts)
    made = backend.decompose(weight, whole, 5)
    found = cross_fitted(backend, weight, whole, made, parts, 5)
    own = valued(backend, weight, whole, made)
    apart = [
        valued(backend, weight, there, backend.decompose(weight, here, 5))
        for here, there in (parts, parts[::-1])
    ]
    assert found is not None and own is not None
    assert torch.allclose(found, 0.5 * own + 0.25 * sum(each for each in apart if each is not None))
    if name == "kronecker":
        # Its factors are the best of all on the data that made them.
        for here, crossed in zip(parts, apart[::-1], strict=True):
            best = valued(backend, weight, here, backend.decompose(weight, here, 5))
            assert best is not None and crossed is not None
            assert bool((crossed[1:-1] > best[1:-1]).all())
            assert float(crossed[0]) == pytest.approx(float(best[0]))
    assert bool((found.diff() <= 0.0).all()) and float(found[-1]) == 0.0


def moments_of(layer: Seen) -> Statistics:
    """The statistics of other inputs and gradients, of the same weight."""
    w, made = layer.weight, torch.Generator().manual_seed(7)
    x = torch.randn(40, w.shape[1], generator=made, dtype=torch.float64)
    g = torch.randn(40, w.shape[0], generator=made, dtype=torch.float64)
    elements = g.square().T @ x.square()
    return Statistics(
        4.0,
        elements.sum(0),
        elements.sum(1),
        elements,
        w @ x.T @ x @ w.T,
        g.T @ g,
        40.0,
        float(x.square().sum()),
        float(g.square().sum()),
    )


def test_without_moments_nothing_is_cross_fitted() -> None:
    layer, backend = seen((5, 9)), find_backend("fwsvd")
    bare = dataclasses.replace(layer.statistics, second_moment=None)
    made = backend.decompose(layer.weight, bare, 5)
    assert cross_fitted(backend, layer.weight, bare, made, (bare, bare), 5) is None
