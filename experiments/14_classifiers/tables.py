"""Paired differences, and results as markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Figures = NDArray[np.float64]
#: By their names in results.json; beside the mean of these a paired difference.
METRICS = ("accuracy", "loss", "divergence")
HEADS = {"divergence": "KL from dense"}
DIGITS = {"divergence": 4}


def right(losses: Sequence[float]) -> Figures:
    """1 for each example of two classes that is classified correctly: its loss is below a coin's.

    Args:
        losses: of the examples, in nats.
    """
    return (np.asarray(losses) < math.log(2)).astype(np.float64)


def divergence(losses: Sequence[float], dense: Sequence[float]) -> Figures:
    """KL(dense || compressed) of each example: of two classes, a loss is the whole distribution.

    Args:
        losses: of the examples, in nats.
        dense: of the dense model on the same examples.
    """
    import torch

    from rankopt.refinement.divergence import divergences

    def logits(of: Sequence[float]) -> torch.Tensor:
        # A loss that float32 rounds to 0 would be a class that never occurs.
        label = -torch.tensor(of, dtype=torch.float64).clamp(min=1e-9)
        return torch.stack([label, (-torch.expm1(label)).log()], -1)

    labels = torch.zeros(len(losses), dtype=torch.long)
    found = divergences("sequence-classification", logits(losses), logits(dense), labels)
    return np.asarray(found.numpy(), dtype=np.float64)


def paired(ours: Mapping[str, Figures], theirs: Mapping[str, Figures]) -> dict[str, Any]:
    """Mean differences on the same examples, each with its standard error."""
    found: dict[str, Any] = {}
    for name in METRICS:
        differences = ours[name] - theirs[name]
        mean = float(differences.mean())
        error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
        found[name] = {"difference": mean, "error": error, "beyond": abs(mean) > 2 * error}
    return found


def summed_up(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The dense model's figures, and rows with paired differences, without the examples.

    Args:
        kept: name -> measurement, one of them ``dense``.
    """
    dense = kept["dense"]
    rows = [row for name, row in kept.items() if name != "dense"]

    def each(measured: Mapping[str, Any]) -> dict[str, Figures]:
        losses = measured["example_losses"]
        kl = divergence(losses, dense["example_losses"])
        return {"accuracy": right(losses), "loss": np.asarray(losses), "divergence": kl}

    examples = {(row["strategy"], row["keep"]): each(row.get("after", row)) for row in rows}
    found = []
    for row in rows:
        ours = examples[row["strategy"], row["keep"]]
        theirs = examples["uniform/" + row["strategy"].partition("/")[2], row["keep"]]
        plain = _plain(row)
        if "after" in row:
            before = each(row["before"])
            for when, figures in {"before": before, "after": ours}.items():
                kl = float(figures["divergence"].mean())
                plain[when] = _plain(row[when]) | {"divergence": kl}
            plain["gained"] = paired(ours, before)
        else:
            plain["divergence"] = float(ours["divergence"].mean())
        if ours is not theirs:
            plain["to_uniform"] = paired(ours, theirs)
        found.append(plain)
    return {"dense": {**_plain(dense), "examples": len(dense["example_losses"])}, "rows": found}


def _plain(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in measured.items() if name != "example_losses"}


def _figure(row: Mapping[str, Any], metric: str) -> str:
    return f"{row[metric]:.{DIGITS.get(metric, 3)}f}"


def _cell(row: Mapping[str, Any], metric: str, to_uniform: Mapping[str, Any]) -> str:
    """A figure and its difference to uniform ranks; bold beyond two standard errors."""
    if metric not in to_uniform:
        return _figure(row, metric)
    paired, digits = to_uniform[metric], DIGITS.get(metric, 3)
    shown = f"({paired['difference']:+.{digits}f} ± {paired['error']:.{digits}f})"
    return f"{_figure(row, metric)} " + (f"**{shown}**" if paired["beyond"] else shown)


def table(found: dict[str, Any]) -> str:
    """Markdown: for each task what the closed form reaches, then what refining does to it."""
    lines: list[str] = []
    for name, parts in found["tasks"].items():
        lines += [f"## {name}", ""]
        f1 = ["f1"] if name == "mrpc" else []
        metrics = (*METRICS, *f1)
        dense = next(iter(parts.values()))["dense"]
        figures = ", ".join(f"{m} {_figure(dense, m)}" for m in ("accuracy", "loss", *f1))
        lines += [f"Dense: {figures}; {dense['examples']} rows.", ""]
        if "closed" in parts:
            lines += _closed(parts["closed"]["rows"], metrics)
        if "refined" in parts:
            lines += _refined(parts["refined"]["rows"], metrics)
    return "\n".join(lines[:-1]) + "\n"


def _closed(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[str]:
    by_plan = {(row["strategy"], row["keep"]): row for row in rows}
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    lines = []
    for metric in metrics:
        head = " | ".join(f"kept {keep:g}" for keep in keeps)
        lines += [f"| {HEADS.get(metric, metric)} | {head} |", "|---|" + "---|" * len(keeps)]
        for strategy in dict.fromkeys(row["strategy"] for row in rows):
            each = [by_plan[strategy, keep] for keep in keeps]
            cells = (_cell(row, metric, row.get("to_uniform", {})) for row in each)
            lines.append(f"| {strategy} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _refined(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[str]:
    head = " | ".join(HEADS.get(metric, metric) for metric in metrics)
    lines = [f"| refined | kept | {head} | KL on training rows not fitted |"]
    lines += ["|---|---|" + "---|" * len(metrics) + "---|"]
    for row in rows:
        before, after, kl = row["before"], row["after"], row["not_fitted"]
        to_uniform = row.get("to_uniform", {})
        cells = (f"{_figure(before, m)} → {_cell(after, m, to_uniform)}" for m in metrics)
        kls = f"{kl['before']:.4f} → {kl['after']:.4f}"
        lines.append(f"| {row['strategy']} | {row['keep']:g} | {' | '.join(cells)} | {kls} |")
    return [*lines, ""]
