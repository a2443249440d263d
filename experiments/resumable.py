"""Tables that take hours: a row is kept in a folder once it is measured, and not measured again."""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from published import provenance, publish, write


def measure_rows(
    here: Path,
    folder: Path,
    rows: Iterable[Any],
    dense: Callable[[], Mapping[str, float]],
    measure: Callable[[Any], Mapping[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
    **settings: Any,
) -> dict[str, Any]:
    """Measure the rows that a folder lacks, and write results.json and table.md after each.

    Rows of results.json that the folder lacks stay, unless the dense model's losses are others than
    theirs: then they are of another model or text. A folder whose settings were others is refused.

    Args:
        here: folder of the experiment, where results.json and table.md are.
        folder: keeps what was measured, as rows.json.
        rows: dataclasses; one is there if all its fields are those of a row that is kept.
        dense: the dense model's losses; asked once.
        measure: a row -> what is written beside its fields.
        table: what results.json holds, as Markdown.
        settings: written into results.json beside the versions.

    Returns:
        What results.json holds.
    """
    file, kept = here / "results.json", folder / "rows.json"
    how = provenance(here, folder=folder)
    if kept.exists():
        state: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        if state["settings"] != settings:
            sys.exit(
                f"{kept}: measured with {state['settings']}, not {settings}; give another --folder"
            )
    else:
        state = {"settings": settings, "dense": dict(dense()), "rows": []}
    before: dict[str, Any] = {"rows": []}
    if file.exists():
        earlier = json.loads(file.read_text("utf-8"))
        before = earlier if _alike(earlier["dense"], state["dense"]) else before
    found = {"settings": settings, "dense": state["dense"], "rows": [*before["rows"]]}

    def published() -> dict[str, Any]:
        whole = all(each in state["rows"] for each in found["rows"])
        return publish(here, how, found, table(found), None if whole else before)

    for row in rows:
        fields = dataclasses.asdict(row)
        known, there = _of(fields, state["rows"]), _of(fields, found["rows"])
        new = known is None
        if known is None:
            measured = measure(row)
            assert fields.keys().isdisjoint(measured), f"{row}: a measure has the name of a field"
            known = {**fields, **measured}
            print(row, {name: known[name] for name in found["dense"]}, flush=True)
            state["rows"].append(known)
            write(kept, json.dumps(state, indent=1) + "\n")
        if there is None:
            found["rows"].append(known)
        else:
            found["rows"][found["rows"].index(there)] = known
        if new:
            published()
    print(table(found))
    return published()


def measure_work(
    here: Path,
    folder: Path,
    work: Any,
    rows: Iterable[Any],
    measure: Callable[[Any, Any], Mapping[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
    **settings: Any,
) -> dict[str, Any]:
    """measure_rows of an experiment's ``Work``, which measures its dense model itself."""
    one = functools.partial(measure, work)
    return measure_rows(
        here, folder, rows, lambda: work.measured(work.model), one, table, **settings
    )


def _of(fields: Mapping[str, Any], rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with these fields."""
    return next((row for row in rows if row.items() >= fields.items()), None)


def _alike(some: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether they are the same losses but for rounding."""
    return some.keys() == other.keys() and all(
        math.isclose(some[name], other[name], rel_tol=1e-4) for name in some
    )
