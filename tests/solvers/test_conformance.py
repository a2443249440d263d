"""Our own solvers keep every promise of the kit, and the kit reports as it says."""

import re
from collections.abc import Callable

import pytest

from rankopt_solvers import Problem, Solution
from rankopt_solvers.greedy import solve_greedy
from rankopt_solvers.testing import (
    CHECKS,
    CheckResult,
    ConformanceError,
    check_solver,
    optimum,
    parametrize_with_checks,
    random_problem,
    run_check,
)


@parametrize_with_checks(["exact", "greedy", "density"])
def test_our_solvers_conform(solver: str, check: Callable[[str], None]) -> None:
    check(solver)


@pytest.mark.slow
@parametrize_with_checks(["knapsack"])
def test_the_integer_program_conforms(solver: str, check: Callable[[str], None]) -> None:
    check(solver)


def tolerant(problem: Problem, **_: object) -> Solution:
    """Keeps every promise but one."""
    return solve_greedy(problem)


FAULT = "check_unknown_option_refused"


@parametrize_with_checks([tolerant], expected_failed_checks={FAULT: "takes anything"})
def test_expected_failures_are_strict_xfails(
    solver: Callable[..., Solution], check: Callable[[Callable[..., Solution]], None]
) -> None:
    check(solver)


def test_all_failures_come_in_one_error_that_tells_how_to_repeat_them() -> None:
    def over_budget(problem: Problem) -> Solution:
        return solve_greedy(problem.with_budget(problem.budget + 20))

    seen: list[CheckResult] = []
    with pytest.raises(ConformanceError) as caught:
        check_solver(over_budget, callback=seen.append)
    assert [result.check for result in seen] == list(CHECKS)
    message = str(caught.value)
    for result in seen:
        assert (f"over_budget: {result.check}\n" in message) == (result.outcome == "failed")
    assert "promise: One existing option of every group, together within the budget." in message
    assert re.search(r"the choice costs \d+ of \d+", message)
    assert "rankopt_solvers.testing.random_problem('falling', 0)" in message


@pytest.mark.slow
def test_a_failure_can_be_expected_warned_of_or_only_returned() -> None:
    def outcomes(results: list[CheckResult]) -> dict[str, str]:
        return {r.check: r.outcome for r in results if r.outcome not in ("passed", "skipped")}

    assert outcomes(check_solver(tolerant, on_fail=None)) == {FAULT: "failed"}
    with pytest.warns(UserWarning, match=FAULT):
        assert outcomes(check_solver(tolerant, on_fail="warn")) == {FAULT: "failed"}
    expected = check_solver(tolerant, expected_failed_checks={FAULT: "takes anything"})
    assert outcomes(expected) == {FAULT: "expected_failure"}


@pytest.mark.slow
def test_an_expected_failure_that_passes_is_a_failure() -> None:
    with pytest.raises(ConformanceError, match=r"check_bound was expected to fail \(old\)"):
        check_solver("greedy", expected_failed_checks={"check_bound": "old"})


def test_a_check_that_does_not_exist_cannot_be_expected_to_fail() -> None:
    with pytest.raises(ValueError, match="check_bond"):
        check_solver("greedy", expected_failed_checks={"check_bond": "typo"})
    with pytest.raises(ValueError, match="check_bond"):
        parametrize_with_checks(["greedy"], expected_failed_checks={"check_bond": "typo"})


def test_an_option_that_a_solver_has_not_is_skipped() -> None:
    outcomes = {r.check: r.outcome for r in check_solver("greedy")}
    assert outcomes["check_time_limit"] == outcomes["check_should_stop"] == "skipped"
    assert set(outcomes.values()) == {"passed", "skipped"}


def test_a_solver_can_be_named_by_module_and_function() -> None:
    run_check("check_bound", "rankopt_solvers.greedy:solve_greedy")


@pytest.mark.parametrize("family", ["falling", "ties", "wide", "shared"])
def test_the_enumeration_is_the_enumeration(
    family: str, feasible_choices: Callable[[Problem], list[tuple[int, ...]]]
) -> None:
    problem = random_problem(family, 5)
    best = min(map(problem.loss_of, feasible_choices(problem)))
    assert optimum(problem) == pytest.approx(best, rel=1e-14, abs=0.0)
