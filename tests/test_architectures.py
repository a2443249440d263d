"""Every architecture goes from profile to reload, and the documentation says just that."""

import pytest

from tests import architectures

REGENERATE = "run `python -m tests.architectures` to write the table in rankopt/README.md anew"


def test_the_documented_table_has_these_architectures_and_steps() -> None:
    lines = architectures.documented().splitlines(keepends=True)
    assert "".join(lines[:2]) == architectures.header(), REGENERATE
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == list(architectures.ROWS), REGENERATE


@pytest.mark.parametrize("name", architectures.ROWS)
def test_an_architecture_does_what_is_documented(name: str) -> None:
    assert architectures.row(name) in architectures.documented(), REGENERATE
