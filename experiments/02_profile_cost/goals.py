"""What was promised, against what was measured, and the tables of both."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from models import Case

Row = dict[str, Any]

ROWS = "rankopt: rows"
COLUMNS = "rankopt: rows, columns"
SECOND = "rankopt: rows, second moment"
BOTH = "rankopt: rows, both moments"
ELEMENTS = "rankopt: elements"
#: What of ours is timed, by the statistics it asks for.
OURS: dict[str, frozenset[str]] = {
    ROWS: frozenset(),
    COLUMNS: frozenset({"columns"}),
    SECOND: frozenset({"second_moment"}),
    BOTH: frozenset({"second_moment", "gradient_moment"}),
    ELEMENTS: frozenset({"elements"}),
}
PLAIN = "plain forward + backward"
LOOP = "one example at a time"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure that is to stay below (or above) a target.

    Attributes:
        name: G1 to G14.
        text: what is measured.
        target: the target.
        values: what was measured; the worst counts.
        above: whether the target is a lower limit.
    """

    name: str
    text: str
    target: float
    values: Sequence[float]
    above: bool = False

    @property
    def met(self) -> bool | None:
        """None if nothing was measured."""
        if not self.values:
            return None
        return min(self.values) >= self.target if self.above else max(self.values) <= self.target

    def row(self) -> Row:
        """For JSON and the table."""
        return {
            "goal": self.name,
            "text": self.text,
            "target": f"{'>=' if self.above else '<='} {self.target:g}",
            "measured": _span(self.values),
            "met": {True: "yes", False: "NO", None: "not measured"}[self.met],
        }


def _span(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = (
        f"{value:.2f}" if value == 0 or 1e-2 < abs(value) < 1e3 else f"{value:.1e}"
        for value in (min(values), max(values))
    )
    return low if low == high else f"{low} to {high}"


def of_cost(cases: Sequence[Case], rows: Sequence[Row]) -> list[Goal]:
    """G1 to G4, G6, G8, G9: time and agreement."""

    def ratios(way: str, keep: Any, to: str = PLAIN) -> list[float]:
        return [
            row["ratios"][way] / row["ratios"][to]
            for case, row in zip(cases, rows, strict=True)
            if keep(case) and way in row["ratios"] and to in row["ratios"]
        ]

    def encoders(case: Case) -> bool:
        return case.encoder and case.tokens <= 128 and case.examples >= 8

    def short(case: Case) -> bool:
        return case.tokens <= 64 and case.examples >= 8

    def at_128(case: Case) -> bool:
        return case.encoder and case.tokens == 128

    def all_of(case: Case) -> bool:
        return True

    part = "as a part of a plain forward and backward"
    errors = [error for row in rows for way, error in row["errors"].items() if way in OURS]
    return [
        Goal("G1", f"rows, BERT, T <= 128, B >= 8, {part}", 0.90, ratios(ROWS, encoders)),
        Goal("G2", f"rows, language models, T = 256 and 512, {part}", 1.00,
             ratios(ROWS, lambda case: not case.encoder)),
        Goal("G3", f"rows and second moment, {part}", 1.05, ratios(SECOND, all_of)),
        Goal("G3", f"rows and both moments, {part}", 1.10, ratios(BOTH, all_of)),
        Goal("G4", f"elements, T >= 128, {part}", 1.15,
             ratios(ELEMENTS, lambda case: case.tokens >= 128)),
        Goal("G6", "largest relative difference from one example at a time", 1e-5, errors),
        Goal("G8", "rows, T = 128, as a part of Opacus' time", 0.5,
             ratios(ROWS, at_128, "Opacus")),
        Goal("G8", "rows, T = 128, as a part of BackPACK's time", 0.5,
             ratios(ROWS, at_128, "BackPACK")),
        Goal("G9", "rows, T <= 64, B >= 8, as a part of one example at a time", 0.6,
             ratios(ROWS, short, LOOP)),
    ]  # fmt: skip


def of_memory(rows: Sequence[Row]) -> list[Goal]:
    """G5."""

    def parts(*ways: str) -> list[float]:
        return [row["parts"][way] for row in rows for way in ways if way in row["parts"]]

    text = "peak memory above the model, as a part of a plain forward and backward"
    return [
        Goal("G5", f"{text}: rows or elements", 1.05, parts(ROWS, ELEMENTS)),
        Goal("G5", f"{text}: both moments", 1.25, parts(BOTH)),
    ]


def of_spectra(found: Row) -> list[Goal]:
    """G10 to G14."""
    made = found["decompositions"]

    def aspect(row: Row) -> float:
        return float(max(row["out"], row["in"]) / min(row["out"], row["in"]))

    wide = [row["to_svd"] for row in made if aspect(row) >= 2.5]
    square = [row["to_svd"] for row in made if aspect(row) < 2.5]
    extra = [r["time"] - r["parameters"] for r in found["latency"] if r["tokens"] >= 128]
    one = "spectrum and factors, as a part of torch's float32 SVD"
    return [
        Goal("G10", f"{one}, aspect >= 2.5", 0.5, wide),
        Goal("G10", f"{one}, aspect < 2.5", 1.2, square),
        Goal("G11", "retained energy, relative difference from a float64 SVD", 1e-9,
             [row["retained"] for row in found["accuracy"]]),
        Goal("G11", "excess error of factors stored in float32, r <= 0.9 K", 1e-6,
             [max(row["excess"]) for row in found["accuracy"]]),
        Goal("G12", "speed-up of two workers, wall clock", 1.7, [found["workers"]["speedup"]],
             above=True),
        Goal("G13", "factors from what is stored, as a part of the decomposition", 0.1,
             [row["apply"] for row in made]),
        Goal("G14", "a layer's time minus its parameters, parts of dense, T >= 128", 0.10, extra),
    ]  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def goals_table(goals: Sequence[Row]) -> str:
    """Goal, target, measured, met."""
    return table(
        ("goal", "what", "target", "measured", "met"), [list(goal.values()) for goal in goals]
    )


def parts_table(rows: Sequence[Row], key: str) -> str:
    """Ways by case: parts of the plain pass."""
    ways = list(dict.fromkeys(way for row in rows for way in row[key]))
    return table(
        ("", *(row["case"] for row in rows)),
        [
            [way, *(f"{row[key][way]:.2f}" if way in row[key] else "" for row in rows)]
            for way in ways
        ],
    )


def spectra_tables(found: Row) -> str:
    """Decompositions, accuracy and latency."""
    made = table(
        ("matrix", "torch's SVD, s", "ours to SVD", "factors to ours"),
        [
            [
                f"{row['out']} x {row['in']}",
                f"{row['seconds']['torch.linalg.svd']:.3f}",
                f"{row['to_svd']:.2f}",
                f"{row['apply']:.3f}",
            ]
            for row in found["decompositions"]
        ],
    )
    exact = table(
        ("matrix", "condition", "retained energy", "excess at r = 0.25, 0.5, 0.9 K"),
        [
            [
                row["matrix"],
                f"1e{math.log10(row['condition']):.0f}",
                f"{row['retained']:.1e}",
                ", ".join(f"{value:.0e}" for value in row["excess"]),
            ]
            for row in found["accuracy"]
        ],
    )
    timed = table(
        ("layer", "tokens", "rank", "parameters", "time"),
        [
            [
                f"{row['out']} x {row['in']}",
                str(row["tokens"]),
                str(row["rank"]),
                f"{row['parameters']:.2f}",
                f"{row['time']:.2f}",
            ]
            for row in found["latency"]
        ],
    )
    return "\n".join((made, exact, timed))


def iterations_table(rows: Sequence[Row]) -> str:
    """Errors after iterations as parts of the start's, over matrices and ranks."""
    lines = []
    for windows in dict.fromkeys(row["windows"] for row in rows):
        mine = [row for row in rows if row["windows"] == windows]
        for count in mine[0]["own"]:
            own, other = ([row[key][count] for row in mine] for key in ("own", "other"))
            lines.append([str(windows), str(count), _span(own), _span(other)])
    return table(("windows", "iterations", "error, own text", "error, other text"), lines)
