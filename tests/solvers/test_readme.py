"""What solvers/README.md prints runs as printed, and its solver keeps what the page promises."""

import re
from pathlib import Path
from typing import Any

import pytest

from rankopt_solvers import SOLVERS
from rankopt_solvers.testing import CHECKS, check_solver

README = Path(__file__).parents[2] / "solvers" / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def run(number: int) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in range(number + 1):  # a page is read from its top
        exec(compile(BLOCKS[block], f"{README.name}[{block}]", "exec"), namespace)
    return namespace


def test_there_are_examples_and_all_of_them_are_found() -> None:
    assert len(BLOCKS) >= 3
    assert TEXT.count("```python\n") == len(BLOCKS)
    assert TEXT.count("```") == 2 * (len(BLOCKS) + TEXT.count("```toml\n"))


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_example_runs_after_those_before(number: int) -> None:
    run(number)


@pytest.mark.slow
def test_its_solver_passes_the_conformance_kit() -> None:
    (number,) = [i for i, block in enumerate(BLOCKS) if "def priced(" in block]
    results = check_solver(run(number)["priced"])
    skipped = {result.check for result in results if result.outcome == "skipped"}
    assert skipped == {"check_time_limit", "check_should_stop"}
    assert len(results) == len(CHECKS)


def test_its_solver_is_as_short_as_promised() -> None:
    body = re.search(r'^def priced.*?\n    """.*?"""\n(.*?)\n\n', "\n".join(BLOCKS), re.S | re.M)
    assert body is not None
    assert len(body[1].splitlines()) <= 15


def test_it_names_the_checks_and_links_the_files_there_are() -> None:
    assert set(re.findall(r"check_[a-z_]+", TEXT)) <= set(CHECKS) | {"check_solver"}
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (README.parent / link).is_file(), link


def test_its_table_lists_every_built_in_solver() -> None:
    assert set(SOLVERS) <= set(re.findall(r"^\| `(\w+)`", TEXT, flags=re.MULTILINE))
