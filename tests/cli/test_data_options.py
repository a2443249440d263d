"""The data options are written once: every command has all of them, with a few differences."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer

from rankopt.cli import app
from rankopt.cli.data import READING, DataOptions, with_data

GROUP: Any = typer.main.get_command(app)
DEFAULTS = {"split": None, "text_column": "text", "pair_column": None, "label_column": "label",
            "examples": None, "max_length": None, "batch_size": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "needed", "examples"),
    [("profile", True, 256), ("plan", False, None), ("compare", False, None),
     ("evaluate", True, None)],
)  # fmt: skip
def test_every_command_has_the_data_options(
    command: str, needed: bool, examples: int | None
) -> None:
    params = {param.name: param for param in GROUP.commands[command].params}
    assert params["data"].required is needed
    found = {name: params[name].default for name in READING}
    assert found == {**DEFAULTS, "examples": examples}
    for name in READING:
        assert params[name].opts == [f"--{name.replace('_', '-')}"] and params[name].help
    assert "asked" not in params


def test_a_command_is_handed_one_value_in_the_place_of_its_parameter() -> None:
    seen: list[Any] = []

    @with_data(needed=False, about="What for.", examples=3)
    def command(first: int, asked: DataOptions, *, last: str = "z") -> None:
        """What it does."""
        seen.append((first, asked, last))

    names = list(inspect.signature(command).parameters)
    assert names == ["first", "data", *READING, "last"]
    assert command.__doc__ == "What it does."
    command(first=1, data="d.txt", last="y", **{**DEFAULTS, "examples": 3})
    assert seen == [(1, DataOptions(data="d.txt", examples=3), "y")]


def test_the_model_is_looked_at_before_the_data(tmp_path: Path) -> None:
    from rankopt.errors import ModelError

    with pytest.raises(ModelError, match="does not exist"):
        DataOptions(data=str(tmp_path / "none.txt")).read(str(tmp_path / "none"))
