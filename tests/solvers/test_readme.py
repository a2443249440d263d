"""What solvers/README.md prints runs as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "solvers" / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_there_are_examples_and_all_of_them_are_found() -> None:
    assert len(BLOCKS) >= 2
    assert TEXT.count("```") == 2 * len(BLOCKS)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_example_runs_on_its_own(number: int) -> None:
    exec(compile(BLOCKS[number], f"{README.name}[{number}]", "exec"), {"__name__": "__main__"})
