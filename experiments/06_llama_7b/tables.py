"""Figures as markdown; what was not measured is marked."""

from collections.abc import Mapping
from typing import Any


def table(found: Mapping[str, Any]) -> str:
    """A section for each backend, and one for the collector."""
    lines = []
    for name, each in found.items():
        stages = each["stages"]
        if name == "collector":
            lines += [
                "One block, one window:",
                "",
                "| pass | seconds | peak memory |",
                "|---|---|---|",
            ]
            for what, entry in stages.items():
                peak = f"{entry['peak_bytes'] / 2**30:.2f} GiB"
                lines.append(f"| {what} | {entry['seconds']:.1f} | {peak} |")
            lines.append("")
            continue
        whole = each["decomposed"] == each["layers"]
        note = "" if whole else "; *all* is EXTRAPOLATED from them, by shape"
        plan, workers = stages["plan"], each["settings"]["workers"]
        lines += [
            f"`{name}`: {each['decomposed']} of {each['layers']} matrices decomposed{note}; "
            f"{workers} {'worker' if workers == 1 else 'workers'}.",
            "",
            "| shape | matrices | decompose, seconds of a worker | read | factors |",
            "|---|---|---|---|---|",
        ]
        for shape, taken in stages["decompose"]["shapes"].items():
            made = stages["factors"]["shapes"][shape]
            lines.append(
                f"| {shape} | {taken['matrices']} | {taken['worker_seconds']:.1f} "
                f"| {made['read']:.2f} | {made['factors']:.2f} |"
            )
        lines += ["", "| stage | seconds | all, seconds | peak memory |", "|---|---|---|---|"]
        for what, entry in stages.items():
            total = entry.get("all_seconds", entry["seconds"])
            lines.append(
                f"| {what} | {entry['seconds']:.1f} | {total:.1f} "
                f"| {entry['peak_bytes'] / 2**30:.2f} GiB |"
            )
        size = stages["save"]
        curves = "" if whole else " Curves of the others are those of a like one times a number."
        lines += [
            "",
            f"Profile: {size['bytes'] / 1e9:.2f} GB, all: {size['all_bytes'] / 1e9:.2f} GB. Plan: "
            f"{plan['options']} options, {plan['status']}, gap {plan['gap']:.1e}.{curves}",
            "",
        ]
    return "\n".join(lines)
