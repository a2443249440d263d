"""Tables that take hours: each row is written when it is measured, and not measured again."""

import dataclasses
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def measure_rows(
    here: Path,
    rows: Iterable[Any],
    dense: Callable[[], Mapping[str, float]],
    measure: Callable[[Any], Mapping[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
) -> dict[str, Any]:
    """Bring results.json and table.md of an experiment up to date, row by row.

    Args:
        here: folder of the experiment.
        rows: dataclasses; one is there if all its fields are those of a row in results.json.
        dense: the dense model's losses; asked once.
        measure: a row -> what is written beside its fields.
        table: what results.json holds, as Markdown.

    Returns:
        What results.json holds.
    """
    file = here / "results.json"
    found: dict[str, Any] = {"rows": []}
    if file.exists():
        found = json.loads(file.read_text("utf-8"))
    else:
        found["dense"] = dense()
    found["settings"] = {name: version(name) for name in ("rankopt", "torch", "transformers")} | {
        "python": platform.python_version(),
        "command": f"python experiments/{here.name}/run.py",
    }
    for row in rows:
        fields = dataclasses.asdict(row)
        if any(each.items() >= fields.items() for each in found["rows"]):
            continue
        measured = measure(row)
        assert fields.keys().isdisjoint(measured), f"{row}: a measure has the name of a field"
        found["rows"].append({**fields, **measured})
        print(row, {name: found["rows"][-1][name] for name in found["dense"]}, flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (here / "table.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return found
