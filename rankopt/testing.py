"""The conformance kit of backends: the promises of ``rankopt.backends.base``, checked on any.

    from rankopt.testing import check_backend, parametrize_with_checks

    check_backend(my_backend)                    # everywhere; raises with all that failed

    @parametrize_with_checks([my_backend])       # with pytest: one test for each promise
    def test_conformance(backend, check):
        check(backend)

The shape is that of ``rankopt_solvers.testing``. The docstring of a check is the promise. Layers
are made up: W, inputs x and output gradients g, one position a unit, wide, tall and square, seeded,
so that a failure repeats.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal
from unittest import SkipTest

import torch
from torch import Tensor

from rankopt.backends import find_backend
from rankopt.backends.base import Backend, Decomposition, Scale
from rankopt.backends.statistics import STATISTICS, Statistics
from rankopt.profile.info import NAME
from rankopt_solvers.testing.kit import CheckResult as CheckResult
from rankopt_solvers.testing.kit import ConformanceError as ConformanceError
from rankopt_solvers.testing.kit import Kit

if TYPE_CHECKING:
    import pytest

SHAPES = {"wide": (6, 11), "tall": (11, 6), "square": (8, 8)}
_UNITS = 48.0


@dataclasses.dataclass(frozen=True)
class Made:
    """A made-up layer: its kind, W (out, in), what was collected, and K = min(out, in)."""

    kind: str
    weight: Tensor
    seen: Statistics
    full: int


def made_up(kind: str, inputs: float = 1.0, gradients: float = 1.0) -> Made:
    """A layer of a kind of SHAPES, its inputs and gradients multiplied by numbers."""
    n_out, n_in = SHAPES[kind]
    made = torch.Generator().manual_seed(n_out)
    sizes = ((n_out, n_in), (int(_UNITS), n_in), (int(_UNITS), n_out))
    w, x, g = (torch.randn(size, generator=made, dtype=torch.float64) for size in sizes)
    x, g = inputs * x, gradients * g
    x[:, 0] *= 3.0
    g[:, 0] *= 3.0
    elements = g.square().T @ x.square()
    a, b = x if n_in <= n_out else x @ w.T, g if n_out <= n_in else g @ w
    sums = (elements.sum(0), elements.sum(1), elements, a.T @ a, b.T @ b)
    energies = (float(x.square().sum()), float(g.square().sum()))
    return Made(kind, w, Statistics(_UNITS, *sums, _UNITS, *energies), min(n_out, n_in))


def _require(holds: object, happened: str) -> None:
    if not holds:
        raise AssertionError(happened)


def _ranks(found: Decomposition) -> list[int]:
    return list(range(len(found.losses)) if found.ranks is None else found.ranks)


def _products(
    backend: Backend, weight: Tensor, kept: Mapping[str, Tensor], ranks: list[int]
) -> Iterator[tuple[int, Tensor]]:
    for rank in ranks[1:]:
        up, down = backend.factors(weight, kept, rank)
        yield rank, up.double() @ down.double()


def _require_errors(
    backend: Backend, layer: Made, largest: int, dtype: torch.dtype, stored: torch.dtype
) -> None:
    """The curve against the factors."""
    weight = layer.weight.to(dtype)
    found = backend.decompose(weight, layer.seen, largest)
    losses, ranks = found.losses.tolist(), _ranks(found)
    kept = {kind: array.to(stored) for kind, array in found.kept.items()}
    few = [rank for rank in ranks if rank <= largest]
    for rank, product in _products(backend, weight, kept, few):
        error, loss = backend.error(weight, product, layer.seen), losses[ranks.index(rank)]
        close = math.isclose(error, loss, rel_tol=1e-5, abs_tol=1e-7 * losses[0])
        _require(close, f"rank {rank} of {dtype}: loss {loss:.9g}, its factors lose {error:.9g}")


def check_protocol(backend: Backend, layer: Made) -> None:
    """A name, a source, known statistics that it needs, and at least one scale."""
    _require(isinstance(backend, Backend), "attributes or methods of Backend are missing")
    for text in (backend.name, backend.source):
        _require(isinstance(text, str) and text.strip(), f"{text!r} says nothing")
    _require(re.fullmatch(NAME, backend.name), f"{backend.name!r} is not one plain word")
    _require(isinstance(backend.needs, frozenset), f"needs is a {type(backend.needs).__name__}")
    unknown = ", ".join(sorted(set(backend.needs) - set(STATISTICS)))
    _require(not unknown, f"needs {unknown}; there are {', '.join(STATISTICS)}")
    _require(len(backend.scales) > 0, "there is no scale")
    for name, scale in backend.scales.items():
        _require(isinstance(scale, Scale) and scale.unit, f"scale {name!r} is {scale!r}")


def check_needs(backend: Backend, layer: Made) -> None:
    """Only what is in ``needs`` is read."""
    hidden: dict[str, Any] = {name: None for name in STATISTICS if name not in backend.needs}
    found = backend.decompose(layer.weight, dataclasses.replace(layer.seen, **hidden), 2)
    wanted = backend.decompose(layer.weight, layer.seen, 2)
    _require(torch.equal(found.losses, wanted.losses), "other losses without the other statistics")


def check_losses(backend: Backend, layer: Made) -> None:
    """Float64, finite, not negative, not increasing; at ranks 0..K, or at those that it names."""
    for largest in (2, layer.full):
        found = backend.decompose(layer.weight, layer.seen, largest)
        losses, ranks = found.losses, _ranks(found)
        _require(losses.dtype == torch.float64, f"losses are {losses.dtype}")
        shape = (layer.full + 1 if found.ranks is None else len(ranks),)
        _require(losses.shape == shape, f"losses have shape {tuple(losses.shape)}, not {shape}")
        rising = all(a < b for a, b in itertools.pairwise(ranks))
        _require(rising and ranks[0] == 0 and ranks[-1] <= layer.full, f"ranks are {ranks}")
        _require(losses.isfinite().all() and losses.min() >= 0.0, f"losses {losses.tolist()}")
        _require((losses.diff() <= 0.0).all(), f"losses rise: {losses.tolist()}")


def check_factors(backend: Backend, layer: Made) -> None:
    """Rank r is up (out, r) and down (r, in), finite, in float32 or wider."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weight = layer.weight.to(dtype)
        found = backend.decompose(weight, layer.seen, layer.full)
        for rank in _ranks(found)[1:]:
            up, down = backend.factors(weight, found.kept, rank)
            shapes = ((len(weight), rank), (rank, weight.shape[1]))
            _require((up.shape, down.shape) == shapes, f"{up.shape} and {down.shape}, not {shapes}")
            _require(up.isfinite().all() and down.isfinite().all(), f"rank {rank} is not finite")
            narrow = {up.dtype, down.dtype} - {torch.float32, torch.float64}
            _require(not narrow, f"factors are {narrow} for weights of {dtype}")


def check_curve(backend: Backend, layer: Made) -> None:
    """The loss at each rank is the error of the factors of that rank; at rank 0 that of nothing."""
    _require_errors(backend, layer, layer.full, torch.float64, torch.float64)
    w, found = layer.weight, backend.decompose(layer.weight, layer.seen, layer.full)
    none, all_ = (backend.error(w, x, layer.seen) for x in (torch.zeros_like(w), w))
    first = float(found.losses[0])
    _require(none > 0.0 and 0.0 <= all_ <= 1e-12 * none, f"W itself loses {all_:.3g} of {none:.3g}")
    _require(math.isclose(first, none, rel_tol=1e-6), f"rank 0 loses {none:.9g}, not {first:.9g}")


def check_projections(backend: Backend, layer: Made) -> None:
    """Where a decomposition says what it projects on, or has factors at hand, they are these."""
    found = backend.decompose(layer.weight, layer.seen, layer.full)
    for place, (rank, product) in enumerate(
        _products(backend, layer.weight, found.kept, _ranks(found)), 1
    ):
        said = []
        if found.projections is not None:
            z, q = (each[:, :rank] for each in found.projections)
            wide = layer.weight.shape[0] <= layer.weight.shape[1]
            said.append(q @ (z.T @ layer.weight) if wide else (layer.weight @ z) @ q.T)
        if found.made is not None:
            up, down = found.made[place]
            said.append(up.double() @ down.double())
        for each in said:
            away = float((product - each).abs().max())
            _require(away < 1e-5, f"the factors of rank {rank} are {away:.3g} from what it says")


def check_full_rank(backend: Backend, layer: Made) -> None:
    """A rank of min(out, in), if there is one, loses nothing and gives W back."""
    found = backend.decompose(layer.weight, layer.seen, layer.full)
    if layer.full in _ranks(found):
        ((_, product),) = _products(backend, layer.weight, found.kept, [0, layer.full])
        away = float((product - layer.weight).abs().max())
        _require(away < 1e-6, f"full rank is {away:.3g} from W")
        _require(found.losses[-1] <= 1e-9 * found.losses[0], f"it loses {found.losses[-1]:.3g}")


def check_stored_arrays(backend: Backend, layer: Made) -> None:
    """Kept arrays in float32, as a profile file has them, do as well."""
    _require_errors(backend, layer, layer.full, torch.float64, torch.float32)


def check_low_precision(backend: Backend, layer: Made) -> None:
    """Weights in bfloat16, float16 or float32 are taken for what they are, but not computed in."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _require_errors(backend, layer, layer.full, dtype, torch.float32)


def check_largest(backend: Backend, layer: Made) -> None:
    """What is kept for ranks up to ``largest`` is enough for them, and no more than W."""
    _require_errors(backend, layer, 3, torch.float64, torch.float32)
    for kind, array in backend.decompose(layer.weight, layer.seen, 3).kept.items():
        size = layer.weight.numel()
        _require(array.numel() <= size, f"{kind} has {array.numel()} numbers, W has {size}")


def check_repeatable(backend: Backend, layer: Made) -> None:
    """The same again gives the same bits, and no argument is changed."""
    fresh = made_up(layer.kind)
    one, two = (backend.decompose(x.weight, x.seen, 4) for x in (layer, fresh))
    _require(torch.equal(one.losses, two.losses), "other losses")
    rank = max(rank for rank in _ranks(one) if rank <= 4)
    kept = {kind: array.clone() for kind, array in one.kept.items()}
    first, second = (backend.factors(layer.weight, x.kept, rank) for x in (one, two))
    _require(all(map(torch.equal, first, second)), "other factors")
    fresh = made_up(layer.kind)
    pairs = [(layer.weight, fresh.weight), *((kept[kind], one.kept[kind]) for kind in kept)]
    pairs += [(layer.seen.need(name), fresh.seen.need(name)) for name in STATISTICS]
    _require(all(torch.equal(a, b) for a, b in pairs), "an argument was changed")


def check_zero(backend: Backend, layer: Made) -> None:
    """A layer that never mattered has finite losses and factors."""
    none = made_up(layer.kind, inputs=0.0, gradients=0.0)
    found = backend.decompose(none.weight, none.seen, none.full)
    _require(found.losses.isfinite().all(), f"losses {found.losses.tolist()}")
    for rank, product in _products(backend, none.weight, found.kept, _ranks(found)):
        _require(product.isfinite().all(), f"the factors of rank {rank} are not finite")


def check_units(backend: Backend, layer: Made) -> None:
    """In other units of inputs and gradients the curve is the same: nothing is added to them."""
    wanted = backend.decompose(layer.weight, layer.seen, layer.full).losses
    for inputs, gradients in ((1e-8, 1.0), (1.0, 1e-8), (1e8, 1.0)):
        other = made_up(layer.kind, inputs, gradients)
        losses = backend.decompose(other.weight, other.seen, other.full).losses
        same = torch.allclose(losses / losses[0], wanted / wanted[0], rtol=1e-4, atol=1e-6)
        _require(same, f"inputs x {inputs:g}, gradients x {gradients:g}: another curve")


def check_scales(backend: Backend, layer: Made) -> None:
    """Positive and finite; the same data twice lose the same; nats grow with squared gradients."""
    shape, steeper = SHAPES[layer.kind], made_up(layer.kind, gradients=2.0).seen
    names = [field.name for field in dataclasses.fields(Statistics)]
    twice = Statistics(**{name: 2 * getattr(layer.seen, name) for name in names})
    for name, scale in backend.scales.items():
        values = []
        for seen in (layer.seen, twice, steeper):
            factor = scale.factor(shape, seen)
            _require(math.isfinite(factor) and factor > 0.0, f"{name}: the factor is {factor!r}")
            losses = backend.decompose(layer.weight, seen, layer.full).losses
            values.append(factor * float(losses[0]))
        once, again, more = values
        _require(math.isclose(once, again, rel_tol=1e-6), f"{name}: {once:.9g}, then {again:.9g}")
        linear = name != "nats" or math.isclose(more, 4.0 * once, rel_tol=1e-6)
        _require(linear, f"{name}: {once:.9g}, with gradients x 2 {more:.9g}")


#: Every promise by its name.
CHECKS: dict[str, Callable[[Backend, Made], None]] = {
    name: check for name, check in list(globals().items()) if name.startswith("check_")
}


def _everywhere(check: Callable[[Backend, Made], None]) -> Callable[[Backend], None]:
    """The check with a layer of every shape; a failure says with which."""

    @functools.wraps(check)
    def on_all(backend: Backend) -> None:
        for kind, shape in SHAPES.items():
            try:
                check(backend, made_up(kind))
            except SkipTest:
                raise
            except Exception as error:
                what = "" if type(error) is AssertionError else f"{type(error).__name__}: "
                raise AssertionError(f"{kind} {shape}: {what}{error}") from error

    return on_all


def _found(backend: str | Backend) -> tuple[str, Backend]:
    found = find_backend(backend) if isinstance(backend, str) else backend
    return str(getattr(found, "name", type(found).__name__)), found


_KIT: Kit[Backend] = Kit(
    "backend",
    {name: _everywhere(check) for name, check in CHECKS.items()},
    _found,
    names_each=False,
)


def run_check(check: str, backend: str | Backend) -> None:
    """Run one check of CHECKS, with a layer of every shape.

    Raises:
        ConformanceError: the promise is not kept, or the backend raised; names the layer.
    """
    _KIT.run(check, backend)


def check_backend(
    backend: str | Backend,
    *,
    expected_failed_checks: Mapping[str, str] | None = None,
    on_fail: Literal["raise", "warn"] | None = "raise",
    callback: Callable[[CheckResult], None] | None = None,
) -> list[CheckResult]:
    """Run all checks on a backend.

    Args:
        backend: the object, or a name that find_backend takes.
        expected_failed_checks: check name -> reason; these may not pass.
        on_fail: after all checks, raise one error with every failure, or warn, or neither.
        callback: called with each result as it comes.

    Returns:
        One result for each check.

    Raises:
        ConformanceError: with ``on_fail="raise"``, when a check failed or one that was expected to
            fail passed.
        ValueError: an expected failure that is not the name of a check.
    """
    return _KIT.run_all(backend, expected_failed_checks, on_fail, callback)


def parametrize_with_checks(
    backends: Iterable[str | Backend], *, expected_failed_checks: Mapping[str, str] | None = None
) -> "pytest.MarkDecorator":
    """A pytest decorator: the test's arguments ``backend`` and ``check`` take all combinations.

    Args:
        backends: as for check_backend; a name is looked up when its test runs.
        expected_failed_checks: check name -> reason, for every backend of the list; becomes a
            strict xfail.
    """
    return _KIT.parametrize(backends, expected_failed_checks)
