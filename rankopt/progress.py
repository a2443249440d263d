"""One kind of progress bar: on stderr, and only where stderr is a terminal."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Quiet:
    """Whether bars that nobody asked for are left out: what ``rankopt -q`` sets."""

    on = False


def bar(
    items: Iterable[T],
    what: str,
    unit: str,
    progress: bool | None = None,
    total: int | None = None,
) -> "tqdm[T]":
    """Iterate over items with a bar.

    Args:
        items: what to iterate over.
        what: stands before the bar.
        unit: of what is counted.
        progress: show it; by default if stderr is a terminal, and it is not to be quiet.
        total: how many there are, if items do not know.
    """
    hidden = (True if Quiet.on else None) if progress is None else not progress
    return tqdm(items, desc=what, unit=unit, disable=hidden, total=total)
