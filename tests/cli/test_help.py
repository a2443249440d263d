"""Every example of every ``--help`` can be copied from a terminal of 80 columns, and runs."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from rankopt.cli import app
from rankopt.cli.commands import plan
from tests.cli.terminal import ESCAPES, in_terminal
from tests.cli.test_cli import COMMANDS, Run, done, run

__all__ = ["run"]
GROUP = typer.main.get_command(app)


def examples(printed: str) -> list[list[str]]:
    """Words of the examples, those of continued lines together."""
    epilog = ESCAPES.sub("", printed).partition("Examples:")[2].replace("\r", "")
    whole = re.sub(r"\\\n", " ", epilog)
    # Copied as they stand: an indented line is an example, or it belongs to the text below them.
    lines = [line.strip() for line in whole.splitlines() if line.startswith("    ")]
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_can_be_copied(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    found: dict[int, list[list[str]]] = {}
    for columns in (80, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        printed = done(run(command, "--help"))
        found[columns] = examples(printed)
        if columns == 80:
            assert max(map(len, printed.splitlines())) <= 80
    assert found[80] == found[40], "not even a narrower terminal breaks them"
    assert found[80]
    context = typer.Context(GROUP)
    known = GROUP.get_command(context, command)  # type: ignore[attr-defined]
    for words in found[80]:
        start = words.index("rankopt")
        assert words[start + 1] == command
        # Option names and numbers of values are click's to check; nothing runs.
        known.make_context(command, words[start + 2 :])


def test_help_in_a_terminal(tmp_path: Path) -> None:
    code, written = in_terminal(80, tmp_path, "plan", "--help")
    assert code == 0
    assert len(examples(written)) == plan.EXAMPLES.count("\n  rankopt plan ") > 1
    assert all(len(line) <= 80 for line in ESCAPES.sub("", written).splitlines())
