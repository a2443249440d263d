"""The public interface changes on purpose only."""

import difflib

from tests.public_api import FILE, listed


def test_the_public_interface_is_the_one_that_is_listed() -> None:
    wanted, found = FILE.read_text(encoding="utf-8"), listed()
    change = "\n".join(difflib.unified_diff(wanted.splitlines(), found.splitlines(), lineterm=""))
    assert found == wanted, (
        f"the interface has changed:\n{change}\nIf that is meant, say so in CHANGELOG.md, and "
        "write the list anew: python -m tests.public_api > tests/public_api.txt"
    )


def test_names_signatures_and_methods_are_listed() -> None:
    import rankopt

    assert "rankopt.make_plan(profile, *, keep=None" in listed()
    assert "class rankopt.Profile(" in listed() and "class rankopt.BudgetError(" in listed()
    assert len(listed().splitlines()) > len(rankopt.__all__)
