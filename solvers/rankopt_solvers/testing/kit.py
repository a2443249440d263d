"""What conformance kits share: results, expected failures, a callback, and pytest parameters.

The shape is scikit-learn's ``check_estimator`` and ``parametrize_with_checks``. What is promised,
and of what, is a kit's own: solvers here, backends in ``rankopt.testing``.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Generic, Literal, TypeVar
from unittest import SkipTest

if TYPE_CHECKING:
    import pytest

Subject = TypeVar("Subject")
Outcome = Literal["passed", "failed", "skipped", "expected_failure", "unexpected_pass"]
OnFail = Literal["raise", "warn"] | None


class ConformanceError(AssertionError):
    """A promise is not kept; the message has the promise, what happened and how to repeat it."""


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """What became of one check.

    Attributes:
        subject: name of the solver or backend.
        check: name of the check.
        outcome: ``passed``, ``failed``, ``skipped`` (an option that the solver has not),
            ``expected_failure`` or ``unexpected_pass``; the second and the last are failures.
        reason: the failure's message, or why it was skipped or expected.
        error: the ConformanceError of a failure, expected or not.
    """

    subject: str
    check: str
    outcome: Outcome
    reason: str = ""
    error: ConformanceError | None = None

    @property
    def bad(self) -> bool:
        """Whether this should stop a release."""
        return self.outcome in ("failed", "unexpected_pass")


@dataclasses.dataclass(frozen=True)
class Kit(Generic[Subject]):
    """Promises, and how to find what should keep them.

    Attributes:
        argument: what is checked, in a word: ``solver``; also the argument of a pytest function.
        checks: every promise by its name; the docstring is the promise.
        find: what a user may give -> name and object.
        names_each: whether every line of a summary begins with the name, or the summary alone.
    """

    argument: str
    checks: Mapping[str, Callable[[Subject], None]]
    find: Callable[[str | Subject], tuple[str, Subject]]
    names_each: bool = True

    def run(self, check: str, subject: str | Subject) -> None:
        """Run one check.

        Raises:
            ConformanceError: the promise is not kept, or the subject raised.
            unittest.SkipTest: the check is about an option that the subject does not have.
        """
        name, found = self.find(subject)
        call = self.checks[check]
        try:
            call(found)
        except SkipTest:
            raise
        except Exception as error:
            promise = (call.__doc__ or "").strip()
            kind = "" if type(error) is AssertionError else f"{type(error).__name__}: "
            happened = "\n  ".join([f"{kind}{error}", *getattr(error, "__notes__", [])])
            raise ConformanceError(
                f"{name}: {check}\n  promise: {promise}\n  {happened}"
            ) from error

    def known(self, expected: Mapping[str, str] | None) -> Mapping[str, str]:
        """The expected failures.

        Raises:
            ValueError: one is not the name of a check.
        """
        unknown = sorted(set(expected or {}) - set(self.checks))
        if unknown:
            there_are = ", ".join(self.checks)
            raise ValueError(f"no such checks: {', '.join(unknown)}; there are: {there_are}")
        return expected or {}

    def result(self, check: str, subject: str | Subject, expected: str | None) -> CheckResult:
        """Run one check, of which a failure may be expected, and say what became of it."""
        name = self.find(subject)[0]
        try:
            self.run(check, subject)
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

    def run_all(
        self,
        subject: str | Subject,
        expected_failed_checks: Mapping[str, str] | None,
        on_fail: OnFail,
        callback: Callable[[CheckResult], None] | None,
    ) -> list[CheckResult]:
        """Run all checks; arguments and errors are those of ``check_solver``."""
        expected = self.known(expected_failed_checks)
        results = []
        for check in self.checks:
            results.append(self.result(check, subject, expected.get(check)))
            if callback is not None:
                callback(results[-1])
        bad = [result.reason for result in results if result.bad]
        if bad:
            name = results[0].subject
            if not self.names_each:
                bad = [reason.removeprefix(f"{name}: ") for reason in bad]
            message = "\n".join([f"{name}: {len(bad)} of {len(results)} checks failed", *bad])
            if on_fail == "raise":
                raise ConformanceError(message)
            if on_fail == "warn":
                # The caller of check_solver, say.
                warnings.warn(message, stacklevel=3)
        return results

    def parametrize(
        self,
        subjects: Iterable[str | Subject],
        expected_failed_checks: Mapping[str, str] | None,
    ) -> "pytest.MarkDecorator":
        """A pytest decorator; arguments are those of ``parametrize_with_checks``."""
        import pytest

        expected = self.known(expected_failed_checks)
        parameters = []
        for subject in subjects:
            name = subject if isinstance(subject, str) else self.find(subject)[0]
            for check in self.checks:
                reason = expected.get(check)
                marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
                call = functools.partial(self.run, check)
                parameters.append(pytest.param(subject, call, id=f"{name}-{check}", marks=marks))
        return pytest.mark.parametrize((self.argument, "check"), parameters)
