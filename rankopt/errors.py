"""Errors that a user can act on. The command line prints their message and no traceback."""

import unicodedata
from collections.abc import Iterable

#: Categories of characters that a terminal obeys or does not show: control, format (writing
#: direction), surrogates, line and paragraph separators.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str, keep: str = "") -> str:
    r"""The text with characters that a terminal would obey as escapes, ``\u001b``.

    Args:
        text: from a file, a model or a path.
        keep: characters that stay, such as line ends in a text of several lines.
    """
    if text.isprintable():
        return text
    return "".join(
        f"\\u{ord(each):04x}"
        if unicodedata.category(each) in _UNSEEN and each not in keep
        else each
        for each in text
    )


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says first, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def require_a(kind: type, value: object, error: "type[RankoptError]", instead: str) -> None:
    """Refuse a path, say, in the place of what lies there.

    Args:
        kind: wanted.
        value: given.
        error: raised where it is of another kind.
        instead: what to do.
    """
    if not isinstance(value, kind):
        raise error(
            f"wanted is a {kind.__name__}, not a value of type {type(value).__name__}: {instead}"
        )


def few(names: Iterable[str], shown: int = 3, between: str = ", ") -> str:
    """The first of some names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return between.join(listed[:shown]) + more


class RankoptError(Exception):
    """Something the user gave cannot be used; the message says what, where and what to do.

    Attributes:
        exit_code: what the command line returns.
    """

    exit_code = 2

    def __str__(self) -> str:
        """One line, whatever names from files it has in it."""
        return printable(super().__str__())


class WriteError(RankoptError):
    """The system refuses to write: disk full, permission denied, read-only, quota."""


class ModelError(RankoptError):
    """The model cannot be profiled, changed or saved as asked."""


class DataError(RankoptError):
    """A data file, a column or a batch is not what was announced."""


class ProfileError(RankoptError):
    """A profile is missing, damaged, or lacks what was asked of it."""


class PlanError(RankoptError):
    """A plan is malformed or belongs to something else."""


class ResultsError(RankoptError):
    """A results file is missing, malformed, or of another model or other data."""


class BudgetError(RankoptError):
    """The budget is not one: out of range, missing, or asked for in two ways at once."""


class OptionError(RankoptError, ValueError):
    """An unknown name, a number out of range, or options that do not go together."""


class NotFiniteError(ModelError):
    """A loss or a gradient of the dense model is NaN or infinite."""


class InfeasibleBudgetError(RankoptError):
    """No ranks fit the budget; the message names the smallest budget that can be met."""

    exit_code = 3


class MissingExtraError(RankoptError, ImportError):
    """An optional library is needed; the message names the extra to install."""

    def __init__(self, purpose: str, library: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed: pip install 'rankopt[{extra}]'"
        )
