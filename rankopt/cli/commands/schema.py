"""The command ``rankopt schema``."""

from typing import Annotated

import typer

from rankopt.cli.options import show_json
from rankopt.errors import OptionError

EXAMPLES = """\b
Examples:
  rankopt schema evaluate
  rankopt schema

Fields are added from one minor version to the next; none is renamed or taken away.
"""


def schema(
    command: Annotated[str | None, typer.Argument(help="One that takes --json; or all.")] = None,
) -> None:
    """Print the JSON Schema of what a command prints with --json."""
    from rankopt.cli.outputs import OUTPUTS, schema_of

    if command is None:
        show_json({name: schema_of(name) for name in OUTPUTS})
        return
    known = [name for name in OUTPUTS if name == command]
    if not known:
        raise OptionError(f"{command!r} prints no JSON; those that do: {', '.join(OUTPUTS)}")
    show_json(schema_of(known[0]))
