"""Errors that a user can act on. The command line prints their message and no traceback."""


class RankoptError(Exception):
    """Something the user gave cannot be used; the message says what, where and what to do.

    Attributes:
        exit_code: what the command line returns.
    """

    exit_code = 2


class ModelError(RankoptError):
    """The model cannot be profiled, changed or saved as asked."""


class DataError(RankoptError):
    """A data file, a column or a batch is not what was announced."""


class ProfileError(RankoptError):
    """A profile is missing, damaged, or lacks what was asked of it."""


class PlanError(RankoptError):
    """A plan is malformed or belongs to something else."""


class BudgetError(RankoptError):
    """The budget is not one: out of range, missing, or asked for in two ways at once."""


class OptionError(RankoptError, ValueError):
    """An unknown name, a number out of range, or options that do not go together."""


class InfeasibleBudgetError(RankoptError):
    """No ranks fit the budget; the message names the smallest budget that can be met."""

    exit_code = 3


class MissingExtraError(RankoptError, ImportError):
    """An optional library is needed; the message names the extra to install."""

    def __init__(self, purpose: str, library: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed: pip install 'rankopt[{extra}]'"
        )
