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

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from rankopt_solvers.registry import Solver, find_solver
from rankopt_solvers.testing import answers, conduct
from rankopt_solvers.testing.instances import FAMILIES as FAMILIES
from rankopt_solvers.testing.instances import hard_problem as hard_problem
from rankopt_solvers.testing.instances import million_options as million_options
from rankopt_solvers.testing.instances import optimum as optimum
from rankopt_solvers.testing.instances import random_problem as random_problem
from rankopt_solvers.testing.instances import two_budgets as two_budgets
from rankopt_solvers.testing.kit import CheckResult as CheckResult
from rankopt_solvers.testing.kit import ConformanceError as ConformanceError
from rankopt_solvers.testing.kit import Kit
from rankopt_solvers.testing.kit import Outcome as Outcome

if TYPE_CHECKING:
    import pytest

Check = Callable[[Solver], None]


def _checks(module: ModuleType) -> dict[str, Check]:
    return {name: check for name, check in vars(module).items() if name.startswith("check_")}


#: Every promise by its name, the slowest last.
CHECKS: dict[str, Check] = _checks(answers) | _checks(conduct)


_KIT: Kit[Solver] = Kit("solver", CHECKS, find_solver)


def run_check(check: str, solver: str | Solver) -> None:
    """Run one check of CHECKS.

    Raises:
        ConformanceError: the promise is not kept, or the solver raised.
        unittest.SkipTest: the check is about an option that the solver does not have.
    """
    _KIT.run(check, solver)


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
    return _KIT.run_all(solver, expected_failed_checks, on_fail, callback)


def parametrize_with_checks(
    solvers: Iterable[str | Solver], *, expected_failed_checks: Mapping[str, str] | None = None
) -> "pytest.MarkDecorator":
    """A pytest decorator: the test's arguments ``solver`` and ``check`` take all combinations.

    Args:
        solvers: as for check_solver; a name is looked up when its test runs.
        expected_failed_checks: check name -> reason, for every solver of the list; becomes a
            strict xfail.
    """
    return _KIT.parametrize(solvers, expected_failed_checks)
