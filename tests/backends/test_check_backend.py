"""The conformance kit passes what is sound, and finds backends that were broken on purpose."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rankopt import OptionError
from rankopt.backends import BUILT_IN, find_backend
from rankopt.backends.base import Backend, ClosedForm, Decomposition, Scale
from rankopt.backends.statistics import Statistics
from rankopt.testing import (
    CHECKS,
    CheckResult,
    ConformanceError,
    check_backend,
    parametrize_with_checks,
    run_check,
)
from rankopt_solvers import testing as solver_kit


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_backends_keep_their_promises(name: str) -> None:
    check_backend(name)
    check_backend(find_backend(name))


@dataclasses.dataclass
class Own:
    """A sound backend written from scratch: FWSVD by plain SVD of W D, for D without zeros."""

    name: str = "own"
    source: str = "a test"
    needs: frozenset[str] = frozenset({"rows"})
    scales: Mapping[str, Scale] = dataclasses.field(
        default_factory=lambda: {"nats": Scale("nats per {unit}", lambda shape, seen: 0.5)}
    )

    def root(self, seen: Statistics) -> Tensor:
        return (seen.need("rows") / seen.units).sqrt()

    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        root = self.root(statistics)
        u, s, _ = torch.linalg.svd(weight.double() * root, full_matrices=False)
        tails = (s**2).flip(0).cumsum(0).flip(0)
        return Decomposition(torch.cat([tails, tails.new_zeros(1)]), {"basis": u[:, :largest]})

    def factors(
        self, weight: Tensor, kept: Mapping[str, Tensor], rank: int
    ) -> tuple[Tensor, Tensor]:
        up = torch.linalg.qr(kept["basis"][:, :rank].double()).Q
        return up, up.T @ weight.double()

    def error(self, weight: Tensor, approximation: Tensor, statistics: Statistics) -> float:
        difference = weight.double() - approximation.double()
        return float(((difference * self.root(statistics)) ** 2).sum())


def test_a_sound_backend_of_someone_else_passes() -> None:
    check_backend(Own())


BROKEN: list[tuple[str, Callable[[], Backend]]] = []


def fails(*checks: str) -> Callable[[Callable[[], Backend]], Callable[[], Backend]]:
    def register(made: Callable[[], Backend]) -> Callable[[], Backend]:
        BROKEN.extend((check, made) for check in checks)
        return made

    return register


@fails("check_protocol")
def of_a_name_that_no_file_takes() -> Backend:
    return Own(name="own:best")


@fails("check_protocol")
def without_scales() -> Backend:
    return Own(scales={})


@fails("check_protocol")
def of_unknown_needs() -> Backend:
    return Own(needs=frozenset({"rows", "hessian"}))


@fails("check_protocol")
def without_error() -> Backend:
    class Bare:
        name, source, needs, scales = "bare", "a test", frozenset({"rows"}), Own().scales
        decompose, factors = Own.decompose, Own.factors

    return Bare()  # type: ignore[return-value]


@fails("check_needs")
def reads_more_than_it_says() -> Backend:
    return Own(needs=frozenset())


@fails("check_losses")
class CountsFromRankOne(Own):
    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        found = super().decompose(weight, statistics, largest)
        return Decomposition(found.losses[1:], found.kept)


@fails("check_losses")
class LossesInFloat32(Own):
    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        found = super().decompose(weight, statistics, largest)
        return Decomposition(found.losses.float(), found.kept)


@fails("check_losses", "check_curve")
class KeepsInsteadOfLosing(Own):
    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        found = super().decompose(weight, statistics, largest)
        return Decomposition(found.losses[0] - found.losses, found.kept)


@fails("check_curve")
class WeightsTheFactorsNotTheLoss(Own):
    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        plain = find_backend("svd").decompose(weight, statistics, largest)
        return Decomposition(plain.losses, super().decompose(weight, statistics, largest).kept)


@fails("check_curve")
class SquareRootForgotten(Own):
    """The textbook's I^-1 without the square: a published slip."""

    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        found = super().decompose(weight, statistics, largest)
        u = torch.linalg.svd(weight.double() * self.root(statistics) ** 2, full_matrices=False)[0]
        return Decomposition(found.losses, {"basis": u[:, :largest]})


@fails("check_factors")
class Transposed(Own):
    def factors(self, weight: Tensor, kept: Mapping[str, Tensor], rank: int) -> Any:
        up, down = super().factors(weight, kept, rank)
        return down.T, up.T


@fails("check_factors", "check_low_precision")
class HalfPrecision(Own):
    def factors(self, weight: Tensor, kept: Mapping[str, Tensor], rank: int) -> Any:
        return tuple(factor.to(weight.dtype) for factor in super().factors(weight, kept, rank))


@fails("check_full_rank")
class NeverWhole(Own):
    def factors(self, weight: Tensor, kept: Mapping[str, Tensor], rank: int) -> Any:
        up, down = super().factors(weight, kept, rank)
        return up, 0.999 * down


@fails("check_projections")
class ProjectsOnOthers(Own):
    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        plain = find_backend("svd").decompose(weight, statistics, largest)
        found = super().decompose(weight, statistics, largest)
        return dataclasses.replace(found, projections=plain.projections)


@fails("check_projections")
class HasTheFactorsOfTheRankBefore(Own):
    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        found = super().decompose(weight, statistics, largest)
        made = [self.factors(weight, found.kept, max(rank - 1, 0)) for rank in range(largest + 1)]
        return dataclasses.replace(found, made=made)


@fails("check_stored_arrays", "check_largest")
class DifferencesOfLargeNumbers(Own):
    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        found = super().decompose(weight, statistics, largest)
        return Decomposition(found.losses, {"basis": found.kept["basis"] + 1e6})

    def factors(self, weight: Tensor, kept: Mapping[str, Tensor], rank: int) -> Any:
        return super().factors(weight, {"basis": kept["basis"].double() - 1e6}, rank)


@fails("check_largest")
class KeepsOneTooFew(Own):
    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        found = super().decompose(weight, statistics, largest)
        few = found.kept["basis"][:, : max(largest - 1, 1)]
        return Decomposition(found.losses, {"basis": few})

    def factors(self, weight: Tensor, kept: Mapping[str, Tensor], rank: int) -> Any:
        up, down = super().factors(weight, kept, rank)
        more = rank - up.shape[1]
        pad = torch.nn.functional.pad
        return pad(up, (0, more)), pad(down, (0, 0, 0, more))


@fails("check_repeatable")
class Restless(Own):
    def factors(self, weight: Tensor, kept: Mapping[str, Tensor], rank: int) -> Any:
        up, down = super().factors(weight, kept, rank)
        turn = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q
        return up @ turn, turn.T @ down


@fails("check_repeatable")
class WritesIntoTheSums(Own):
    def root(self, seen: Statistics) -> Tensor:
        return seen.need("rows").div_(seen.units).sqrt()


@fails("check_zero")
class DividesByTheSum(Own):
    def root(self, seen: Statistics) -> Tensor:
        rows = seen.need("rows")
        return (rows / rows.sum()).sqrt()


@fails("check_units")
class WithEpsilon(Own):
    def root(self, seen: Statistics) -> Tensor:
        return (seen.need("rows") / seen.units + 1e-8).sqrt()


@fails("check_scales")
class OfSumsInsteadOfMeans(Own):
    def root(self, seen: Statistics) -> Tensor:
        return seen.need("rows").sqrt()


@fails("check_scales")
def of_negative_factors() -> Backend:
    return Own(scales={"nats": Scale("nats", lambda shape, seen: -0.5)})


@fails("check_scales")
def nats_that_are_none() -> Backend:
    return Own(
        scales={"nats": Scale("nats", lambda shape, seen: seen.gradient_energy / seen.units)}
    )


@pytest.mark.parametrize(("check", "made"), BROKEN)
def test_a_broken_backend_fails_the_check_that_should_find_it(
    check: str, made: Callable[[], Backend]
) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_backend(made())
    promise = (CHECKS[check].__doc__ or "").strip()
    assert f"\n{check}\n  promise: {promise}" in str(caught.value)


def test_every_check_can_fail() -> None:
    assert {check for check, _ in BROKEN} == set(CHECKS)


def test_a_failure_says_with_which_layer_and_an_exception_is_a_failure() -> None:
    class Tall(Own):
        def factors(self, weight: Tensor, kept: Mapping[str, Tensor], rank: int) -> Any:
            if weight.shape[0] > weight.shape[1]:
                raise RuntimeError("out of luck")
            return super().factors(weight, kept, rank)

    with pytest.raises(ConformanceError, match=r"own: \d+ of 14 .*") as caught:
        check_backend(Tall())
    assert "tall (11, 6): RuntimeError: out of luck" in str(caught.value)


def test_failures_can_be_expected_but_not_for_nothing() -> None:
    check_backend(WithEpsilon(), expected_failed_checks={"check_units": "an epsilon, by design"})
    with pytest.raises(ConformanceError, match=r"expected to fail \(no reason\) but passes"):
        check_backend(Own(), expected_failed_checks={"check_units": "no reason"})
    with pytest.raises(ValueError, match="no such checks: check_speed; there are: check_protocol"):
        check_backend(Own(), expected_failed_checks={"check_speed": "slow"})


@parametrize_with_checks(["fwsvd", Own()])
def test_every_promise_is_a_test_of_its_own(
    backend: str | Backend, check: Callable[[str | Backend], None]
) -> None:
    check(backend)


@parametrize_with_checks([WithEpsilon()], expected_failed_checks={"check_units": "by design"})
def test_expected_failures_are_strict_xfails(
    backend: Backend, check: Callable[[Backend], None]
) -> None:
    check(backend)


def test_parameters_are_named_after_backend_and_check_and_names_looked_up_late() -> None:
    mark = parametrize_with_checks(["not_installed", Own()])
    arguments, parameters = mark.args
    assert arguments == ("backend", "check")
    wanted = [f"{name}-{check}" for name in ("not_installed", "own") for check in CHECKS]
    assert [parameter.id for parameter in parameters] == wanted
    with pytest.raises(OptionError, match="unknown backend 'not_installed'"):
        parameters[0].values[1](parameters[0].values[0])
    with pytest.raises(ValueError, match="check_speed"):
        parametrize_with_checks([Own()], expected_failed_checks={"check_speed": "slow"})


def test_a_failure_can_be_expected_warned_of_or_only_returned() -> None:
    def outcomes(results: list[CheckResult]) -> dict[str, str]:
        assert [result.check for result in results] == list(CHECKS)
        assert {result.subject for result in results} == {"own"}
        return {r.check: r.outcome for r in results if r.outcome != "passed"}

    fault, seen = "check_units", list[CheckResult]()
    found = check_backend(WithEpsilon(), on_fail=None, callback=seen.append)
    assert found == seen and outcomes(found) == {fault: "failed"}
    (failed,) = (result for result in found if result.bad)
    assert failed.reason == str(failed.error) and "own: check_units\n  promise: " in failed.reason
    with pytest.warns(UserWarning, match=fault) as warned:
        assert outcomes(check_backend(WithEpsilon(), on_fail="warn")) == {fault: "failed"}
    assert warned[0].filename == __file__
    expected = check_backend(WithEpsilon(), expected_failed_checks={fault: "by design"})
    assert outcomes(expected) == {fault: "expected_failure"}
    passing = check_backend(Own(), on_fail=None, expected_failed_checks={fault: "no reason"})
    assert outcomes(passing) == {fault: "unexpected_pass"}


def test_one_check_can_be_run_alone() -> None:
    run_check("check_units", "svd")
    with pytest.raises(
        ConformanceError, match=r"^own: check_units\n  promise: .*\n  wide \(6, 11\)"
    ):
        run_check("check_units", WithEpsilon())


def test_both_kits_raise_the_same_error() -> None:
    assert ConformanceError is solver_kit.ConformanceError
    assert CheckResult is solver_kit.CheckResult


def test_a_closed_form_of_ours_with_a_wrong_declaration_is_found() -> None:
    """The smallest slip that our own helpers allow: C_out = 1 claimed where it is not."""
    kronecker = find_backend("kronecker")
    assert isinstance(kronecker, ClosedForm)
    with pytest.raises(ConformanceError, match="check_curve"):
        check_backend(dataclasses.replace(kronecker, dual=False))


@pytest.mark.slow
def test_the_kit_does_not_need_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import rankopt.testing as kit; "
    code += "kit.check_backend('svd')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
