"""The conformance kit: the promises of ``rankopt_solvers``, checked on any solver.

    from rankopt_solvers.testing import check_solver, parametrize_with_checks

    check_solver(my_solver)                      # everywhere; raises with all that failed

    @parametrize_with_checks([my_solver])        # with pytest: one test for each promise
    def test_conformance(solver, check):
        check(solver)

The shape is scikit-learn's ``check_estimator`` and ``parametrize_with_checks``; the promises are in
``answers`` (what is returned) and ``conduct`` (how). The solver is called directly, not through
``solve``, so what it claims itself is what is checked. Problems are seeded: a failure repeats.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Literal
from unittest import SkipTest

from rankopt_solvers.registry import Solver, find_solver
from rankopt_solvers.testing import answers, conduct
from rankopt_solvers.testing.instances import FAMILIES as FAMILIES
from rankopt_solvers.testing.instances import hard_problem as hard_problem
from rankopt_solvers.testing.instances import million_options as million_options
from rankopt_solvers.testing.instances import optimum as optimum
from rankopt_solvers.testing.instances import random_problem as random_problem
from rankopt_solvers.testing.instances import two_budgets as two_budgets

if TYPE_CHECKING:
    import pytest

Check = Callable[[Solver], None]
Outcome = Literal["passed", "failed", "skipped", "expected_failure", "unexpected_pass"]


def _checks(module: ModuleType) -> dict[str, Check]:
    return {name: check for name, check in vars(module).items() if name.startswith("check_")}


#: Every promise by its name, the slowest last.
CHECKS: dict[str, Check] = _checks(answers) | _checks(conduct)


class ConformanceError(AssertionError):
    """A promise is not kept; the message has the promise, what happened and how to repeat it."""


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """What became of one check.

    Attributes:
        solver: name of the solver.
        check: name of the check.
        outcome: ``passed``, ``failed``, ``skipped`` (an option that the solver has not),
            ``expected_failure`` or ``unexpected_pass``; the second and the last are failures.
        reason: the failure's message, or why it was skipped or expected.
        error: the ConformanceError of a failure, expected or not.
    """

    solver: str
    check: str
    outcome: Outcome
    reason: str = ""
    error: ConformanceError | None = None

    @property
    def bad(self) -> bool:
        """Whether this should stop a release."""
        return self.outcome in ("failed", "unexpected_pass")


def run_check(check: str, solver: str | Solver) -> None:
    """Run one check of CHECKS.

    Raises:
        ConformanceError: the promise is not kept, or the solver raised.
        unittest.SkipTest: the check is about an option that the solver does not have.
    """
    name, call = find_solver(solver)
    try:
        CHECKS[check](call)
    except SkipTest:
        raise
    except Exception as error:
        promise = (CHECKS[check].__doc__ or "").strip()
        kind = "" if type(error) is AssertionError else f"{type(error).__name__}: "
        happened = "\n  ".join([f"{kind}{error}", *getattr(error, "__notes__", [])])
        raise ConformanceError(f"{name}: {check}\n  promise: {promise}\n  {happened}") from error


def _known(expected: Mapping[str, str] | None) -> Mapping[str, str]:
    unknown = sorted(set(expected or {}) - set(CHECKS))
    if unknown:
        raise ValueError(f"no such checks: {', '.join(unknown)}; there are: {', '.join(CHECKS)}")
    return expected or {}


def _result(solver: str | Solver, check: str, expected: str | None) -> CheckResult:
    name = find_solver(solver)[0]
    try:
        run_check(check, solver)
    except SkipTest as skip:
        return CheckResult(name, check, "skipped", str(skip))
    except ConformanceError as error:
        if expected is not None:
            return CheckResult(name, check, "expected_failure", expected, error)
        return CheckResult(name, check, "failed", str(error), error)
    if expected is not None:
        reason = f"{name}: {check} was expected to fail ({expected}) but passes"
        return CheckResult(name, check, "unexpected_pass", reason)
    return CheckResult(name, check, "passed")


def check_solver(
    solver: str | Solver,
    *,
    expected_failed_checks: Mapping[str, str] | None = None,
    on_fail: Literal["raise", "warn"] | None = "raise",
    callback: Callable[[CheckResult], None] | None = None,
) -> list[CheckResult]:
    """Run all checks on a solver.

    Args:
        solver: a callable, the name of a solver, or ``"module:function"``.
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
    expected = _known(expected_failed_checks)
    results = []
    for check in CHECKS:
        results.append(_result(solver, check, expected.get(check)))
        if callback is not None:
            callback(results[-1])
    bad = [result.reason for result in results if result.bad]
    if bad:
        message = f"{len(bad)} of {len(results)} checks failed\n" + "\n".join(bad)
        if on_fail == "raise":
            raise ConformanceError(message)
        if on_fail == "warn":
            warnings.warn(message, stacklevel=2)
    return results


def parametrize_with_checks(
    solvers: Iterable[str | Solver], *, expected_failed_checks: Mapping[str, str] | None = None
) -> "pytest.MarkDecorator":
    """A pytest decorator: the test's arguments ``solver`` and ``check`` take all combinations.

    Args:
        solvers: as for check_solver; a name is looked up when its test runs.
        expected_failed_checks: check name -> reason, for every solver of the list; becomes a
            strict xfail.
    """
    import pytest

    expected = _known(expected_failed_checks)
    parameters = []
    for solver in solvers:
        name = solver if isinstance(solver, str) else find_solver(solver)[0]
        for check in CHECKS:
            reason = expected.get(check)
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
            call = functools.partial(run_check, check)
            parameters.append(pytest.param(solver, call, id=f"{name}-{check}", marks=marks))
    return pytest.mark.parametrize(("solver", "check"), parameters)
