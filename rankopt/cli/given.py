"""Options that would do nothing are refused: who gives one expects it to do something."""

from collections.abc import Iterable

import typer

from rankopt.cli.command import options_of
from rankopt.errors import RankoptError


def require_with(ctx: typer.Context, names: Iterable[str], wanted: str) -> None:
    """Refuse those of the options that were given on the command line.

    Args:
        ctx: of the command that runs.
        names: of parameters that do nothing here.
        wanted: what they need, as it is typed.

    Raises:
        RankoptError: one or more were given.
    """
    given = _given(ctx, names)
    if len(given) == 1:
        raise RankoptError(f"{given[0]} belongs to {wanted}: add that, or leave {given[0]} out")
    if given:
        listed = f"{', '.join(given[:-1])} and {given[-1]}"
        raise RankoptError(f"{listed} belong to {wanted}: add that, or leave them out")


def refuse_with(ctx: typer.Context, name: str, other: str, reason: str) -> None:
    """Refuse an option that was given on the command line beside another.

    Args:
        ctx: of the command that runs.
        name: of the parameter.
        other: what it does not go with, as it is typed.
        reason: why not.

    Raises:
        RankoptError: it was given.
    """
    for option in _given(ctx, [name]):
        raise RankoptError(f"{option} does not go with {other}, {reason}: leave one of the two out")


def _given(ctx: typer.Context, names: Iterable[str]) -> list[str]:
    options = options_of(ctx.command.params)
    return [options[name] for name in names if _source(ctx, name) == "COMMANDLINE"]


def _source(ctx: typer.Context, name: str) -> str | None:
    source = ctx.get_parameter_source(name)
    return None if source is None else source.name
