"""table.md: the claims, how far each method stays behind, and every row."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from claims import SAME, Claim

Row = dict[str, Any]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def claims_table(claims: Sequence[Claim]) -> str:
    """What the run must show and what it found."""
    rows = [(claim.text, claim.found, "yes" if claim.holds else "NO") for claim in claims]
    return _table(("claim", "found", "holds"), rows)


def behind(rows: Sequence[Row]) -> str:
    """For each method the retained information it misses, as a part of the optimum's."""
    best = {_key(r): r["retained"] for r in rows if r["method"] == "exact"}
    methods = dict.fromkeys(row["method"] for row in rows if row["objective"] == "sum")
    lines = []
    for method in methods:
        ours = [r for r in rows if r["method"] == method and r["objective"] == "sum"]
        missed = [1 - r["retained"] / best[_key(r)] for r in ours if r["retained"] is not None]
        optimal = [row for row in ours if row["status"] == "optimal"]
        # On the grid HiGHS is right about another problem, which has no bound of its own here.
        wrong = [r for r in optimal if r["own_gap"] is not None and r["gap"] > SAME]
        spent = [row["cpu"] for row in ours if row["cpu"] is not None]
        lines.append(
            (
                method,
                f"{len(missed)} of {len(ours)}",
                _number(statistics.median(missed) if missed else None, ".1e"),
                _number(max(missed, default=None), ".1e"),
                str(len(optimal)),
                str(len(wrong)),
                _number(statistics.median(spent) if spent else None, ".3f"),
                _number(max(spent, default=None), ".3f"),
            )
        )
    header = (
        "method",
        "found a choice",
        "missed, median",
        "missed, most",
        "says optimal",
        "and is not",
    )
    return _table((*header, "CPU s, median", "CPU s, most"), lines)


def concave(rows: Sequence[Row]) -> str:
    """Our figures where rank r costs r (m + n - r)."""
    lines = [
        (
            row["instance"],
            row["objective"],
            f"{row['keep']:.0%}",
            f"{row['options']:,}",
            row["status"],
            _number(row["retained"], ".6%"),
            _number(row["gap"], ".1e"),
            _number(row["build"], ".3f"),
            _number(row["cpu"], ".3f"),
            str(row["nodes"]),
            f"{row['core']:,}",
        )
        for row in rows
    ]
    header = ("instance", "objective", "keep", "options", "status", "retained", "gap")
    return _table((*header, "building, CPU s", "solving, CPU s", "cases", "core"), lines)


def _key(row: Row) -> tuple[Any, ...]:
    return row["instance"], row["multiple"], row["keep"], row["objective"]


def all_rows(rows: Sequence[Row]) -> str:
    """One table for each instance and rank multiple."""
    ends = ("retained", "gap", "own gap", "CPU s", "budget used")
    header = ("keep", "objective", "method", "status", *ends)
    parts = []
    for name, group in itertools.groupby(
        rows, key=lambda r: f"{r['instance']}, multiple {r['multiple']}, {r['options']:,} options"
    ):
        lines = [
            (
                f"{row['keep']:.0%}",
                row["objective"],
                row["method"],
                row["status"],
                _number(row["retained"], ".6%"),
                _number(row["gap"], ".1e"),
                _number(row["own_gap"], ".1e"),
                _number(row["cpu"], ".3f"),
                _number(row["used"], ".3%"),
            )
            for row in group
        ]
        parts.append(f"### {name}\n\n{_table(header, lines)}")
    return "\n".join(parts)


def document(
    rows: Sequence[Row], pivoted: Sequence[Row], claims: Sequence[Claim], left_out: Sequence[str]
) -> str:
    """The whole file."""
    notes = "".join(f"- {line}\n" for line in left_out) or "- nothing\n"
    return (
        f"## What the run must show\n\n{claims_table(claims)}\n"
        f"## Retained information missed, as a part of the optimum's\n\n{behind(rows)}\n"
        f"## Concave costs: every rank of the pivoted form\n\n{concave(pivoted)}\n"
        f"## Left out\n\n{notes}\n"
        f"## Every row\n\n"
        "`gap`: the part of the loss that the exact solver's bound leaves avoidable; `own gap`: "
        f"the part that the method's own bound does.\n\n{all_rows(rows)}"
    )
