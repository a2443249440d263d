"""What the run must show, checked on its rows; a claim that does not hold fails the run."""

import dataclasses
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

#: The sizes and times that the README states.
LARGEST_MEMORY_RATIO = 4.0
EXACT_SECONDS, FRONTIER_SECONDS, LAYERWISE_SECONDS = 0.5, 2.0, 10.0
LAYERWISE_GAP = 1e-6
CONCAVE_SECONDS = 0.4
#: Rounding: the same choice's loss at another scale, or an equally good choice's, is as close.
SAME = 1e-12


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence, what was found, and whether it holds."""

    text: str
    found: str
    holds: bool


def proven(rows: Sequence[Row]) -> Claim:
    ours = [row for row in rows if row["method"] == "exact" and row["objective"] == "sum"]
    closed = sum(row["status"] == "optimal" and row["gap"] == 0.0 for row in ours)
    slowest = max(row["cpu"] for row in ours)
    return Claim(
        "every sum instance is proven optimal",
        f"{closed} of {len(ours)}, slowest {slowest:.2f} s CPU",
        closed == len(ours) > 0,
    )


def layerwise(rows: Sequence[Row]) -> Claim:
    ours = [row for row in rows if row["method"] == "exact" and row["objective"] == "layerwise"]
    done = [r for r in ours if r["status"] == "optimal" and r["cpu"] <= LAYERWISE_SECONDS]
    left = max((row["gap"] for row in ours if row not in done), default=0.0)
    return Claim(
        f"every layer-wise instance is proven within {LAYERWISE_SECONDS:.0f} s of CPU time, "
        f"or its gap is below {LAYERWISE_GAP:g}",
        f"{len(done)} of {len(ours)} proven, largest gap left {left:.1e}, "
        f"slowest {max(row['cpu'] for row in ours):.2f} s CPU",
        bool(ours) and left < LAYERWISE_GAP,
    )


def fast(rows: Sequence[Row]) -> list[Claim]:
    """Llama-3-70B with every rank on offer, at half the parameters."""
    wanted = ("exact", "sum", 1, 0.5)
    return [
        Claim(
            f"{row['instance']}, {row['options']:,} options, keep 50%: proven optimal in under "
            f"{EXACT_SECONDS} s of CPU time",
            f"{row['status']}, gap {row['gap']:g}, {row['cpu']:.3f} s",
            row["status"] == "optimal" and row["gap"] == 0.0 and row["cpu"] < EXACT_SECONDS,
        )
        for row in rows
        if (row["method"], row["objective"], row["multiple"], row["keep"]) == wanted
        and row["instance"].startswith("llama-70b")
    ]


def concave(rows: Sequence[Row]) -> Claim:
    """The pivoted form, every rank on offer."""
    closed = sum(row["status"] == "optimal" and row["gap"] == 0.0 for row in rows)
    slowest = max(row["cpu"] for row in rows)
    return Claim(
        f"concave costs, every rank, {rows[0]['instance'].split()[0]}: every instance is proven "
        f"optimal in at most {CONCAVE_SECONDS} s of CPU time",
        f"{closed} of {len(rows)}, slowest {slowest:.2f} s, building the problem "
        f"{max(row['build'] for row in rows):.3f} s",
        closed == len(rows) > 0 and slowest <= CONCAVE_SECONDS,
    )


def unbeaten(rows: Sequence[Row]) -> Claim:
    """No other method's choice loses less than the exact solver proves possible."""
    others = [row for row in rows if row["method"] != "exact" and row["retained"] is not None]
    beaten = [row for row in others if row["gap"] < -SAME or row["used"] > 1.0]
    return Claim(
        "no other method's choice is better than the exact one, or over the budget",
        f"{len(beaten)} of {len(others)} are",
        bool(others) and not beaten,
    )


def memory(name: str, ratio: float, writable: float) -> Claim:
    return Claim(
        f"{name}: peak memory under {LARGEST_MEMORY_RATIO:g} times the (read-only) input arrays",
        f"{ratio:.2f} times; {writable:.2f} times if they are writable, and so copied first",
        ratio < LARGEST_MEMORY_RATIO,
    )


def bracketed(name: str, found: dict[str, Any]) -> list[Claim]:
    return [
        Claim(
            f"{name}: the frontier in under {FRONTIER_SECONDS:g} s of CPU time",
            f"{found['cpu']:.2f} s",
            found["cpu"] < FRONTIER_SECONDS,
        ),
        Claim(
            f"{name}: at {found['budgets']} budgets, bound <= exact optimum <= value",
            f"violated at {found['violations']}; {found['proven']} optima proven; widest bracket "
            f"{found['widest']:.1e} of the whole",
            found["violations"] == 0 and found["proven"] > 0,
        ),
    ]


def same_optimum(comparisons: Sequence[Row]) -> Claim:
    """``knapsack`` against ``exact``, wherever HiGHS ended."""
    ended = [row for row in comparisons if row["highs"] in ("optimal", "not needed")]
    apart = [abs(row["knapsack"] / row["exact"] - 1) if row["exact"] else 0.0 for row in ended]
    unproven = sum(row["exact_status"] != "optimal" for row in comparisons)
    scales = sorted({row["scale"] for row in comparisons})
    return Claim(
        "knapsack gives exact's optimum wherever HiGHS ends, at loss scales "
        + ", ".join(f"{scale:g}" for scale in scales),
        f"HiGHS ended in {len(ended)} of {len(comparisons)}; largest difference "
        f"{max(apart, default=0.0):.1e}; {unproven} not proven by exact",
        bool(ended) and max(apart) <= SAME and unproven == 0,
    )
