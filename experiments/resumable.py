"""Tables that take hours: a row is kept in a folder once it is measured, and not measured again."""

import dataclasses
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
        published = json.loads(file.read_text("utf-8"))
        before = published if _alike(published["dense"], state["dense"]) else before
    found = {"settings": settings, "dense": state["dense"], "rows": [*before["rows"]]}
    made: dict[str, Any] = found
    for row in rows:
        fields = dataclasses.asdict(row)
        known = _of(fields, state["rows"])
        if known is None:
            measured = measure(row)
            assert fields.keys().isdisjoint(measured), f"{row}: a measure has the name of a field"
            known = {**fields, **measured}
            print(row, {name: known[name] for name in found["dense"]}, flush=True)
            state["rows"].append(known)
            write(kept, json.dumps(state, indent=1) + "\n")
        earlier = _of(fields, found["rows"])
        if earlier is None:
            found["rows"].append(known)
        else:
            found["rows"][found["rows"].index(earlier)] = known
        whole = all(each in state["rows"] for each in found["rows"])
        made = publish(here, how, found, table(found), None if whole else before)
    print(table(found))
    return made


def _of(fields: Mapping[str, Any], rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with these fields."""
    return next((row for row in rows if row.items() >= fields.items()), None)


def _alike(some: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether they are the same losses but for rounding."""
    return some.keys() == other.keys() and all(
        math.isclose(some[name], other[name], rel_tol=1e-4) for name in some
    )
