"""The charts of a report, as Vega-Lite specifications without data.

A specification names its data sets (``datasets``), which the page's script and the pictures fill
in: what is drawn in a browser is what is drawn for a paper. Colours are a palette's: those of a
page are variables of its style sheet, so that one drawing serves light, dark and paper.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

Spec = dict[str, Any]
ScaleType = Literal["log", "linear"]
SCALES: tuple[ScaleType, ...] = get_args(ScaleType)

_HEIGHT = 340
_SHARES = ".0%"
_PLAIN = "~g"


@dataclasses.dataclass(frozen=True)
class Palette:
    """The colours of a drawing.

    Attributes:
        ink: of text.
        muted: of axes, and of what is not the point.
        grid: of lines behind.
        paper: behind everything.
        series: of plans and backends, used again after the last.
    """

    ink: str
    muted: str
    grid: str
    paper: str
    series: tuple[str, ...]


PAGE = Palette(
    "var(--ink)",
    "var(--muted)",
    "var(--grid)",
    "transparent",
    tuple(f"var(--series-{number})" for number in range(1, 9)),
)
PAPER = Palette(
    "#1b1f24",
    "#5b6470",
    "#e3e6ea",
    "#ffffff",
    ("#0b62c4", "#c92a3a", "#2b7a34", "#a85400", "#6a3fc0", "#0b7285", "#a61e6d", "#5c6b00"),
)


def frontier_chart(
    names: Sequence[str],
    forms: Sequence[str],
    measured: bool,
    unit: str,
    y: ScaleType,
    look: Palette,
) -> Spec:
    """Loss against budget: data sets ``frontier``, ``plans`` and ``measured``.

    Args:
        names: of the plans, in the order of their colours.
        forms: those that have a curve; the first is drawn through.
        measured: whether there are plans of results.
        unit: of the losses.
        y: how they are drawn.
        look: see Palette.
    """
    dash = {"field": "form", "type": "nominal", "legend": _legend("least loss, by form"),
            "scale": {"domain": list(forms), "range": [[1, 0], [5, 3]]}}  # fmt: skip
    line: Spec = {
        "data": {"name": "frontier"},
        "mark": {"type": "line", "color": look.muted, "strokeWidth": 2},
        "encoding": {"strokeDash": dash} if len(forms) > 1 else {},
    }
    rows = {
        "data": {"name": "measured"},
        "mark": {"type": "point", "color": look.muted, "size": 40, "filled": False},
        "encoding": {"tooltip": _tooltip("name", "measured", "share", "loss")},
    }
    plans = _plans("plans", "share", names, look)
    return _chart(look) | {
        "height": _HEIGHT,
        "encoding": {
            "x": {
                "field": "share",
                "type": "quantitative",
                "title": "kept share of planned parameters",
                "axis": {"format": _SHARES, "labelFlush": False, "labelOverlap": True},
                "scale": {"domain": [0, 1]},
            },
            "y": _losses("loss", ["predicted loss", unit], y),
        },
        "layer": _above_zero(
            y, [line, *([rows] if measured else []), *([plans] if names else [])], "loss"
        ),
    }


def ranks_chart(blocks: Sequence[str], kinds: Sequence[str], step: int, look: Palette) -> Spec:
    """Kept share by depth and kind: data set ``cells``; the signal ``chosen`` is a layer's number.

    Args:
        blocks: the columns.
        kinds: the rows.
        step: width of a column in pixels.
        look: see Palette.
    """
    outlined = {"condition": {"test": "datum.layer === chosen", "value": look.ink}, "value": None}
    return _chart(look) | {
        "width": {"step": step},
        "height": {"step": 24},
        "autosize": {"type": "pad"},
        "params": [{"name": "chosen", "value": -1}],
        "data": {"name": "cells"},
        "mark": {"type": "rect", "cursor": "pointer", "strokeWidth": 2.5},
        "encoding": {
            "x": {
                "field": "block",
                "type": "ordinal",
                "title": "block (depth)",
                "scale": {"domain": list(blocks), "paddingInner": 0.06},
                "axis": {
                    "labelAngle": 0,
                    "labelOverlap": True,
                    "grid": False,
                    "titleAnchor": "start",
                },
            },
            "y": {
                "field": "kind",
                "type": "ordinal",
                "title": None,
                "scale": {"domain": list(kinds), "paddingInner": 0.06},
                "axis": {"grid": False, "labelLimit": 260},
            },
            "color": {
                "field": "kept",
                "type": "quantitative",
                "scale": {"domain": [0, 1], "scheme": "viridis"},
                "legend": _legend("kept share of the layer's parameters")
                | {"format": _SHARES, "gradientLength": 220, "titleLimit": 320,
                   "values": [0, 0.25, 0.5, 0.75, 1]},
            },
            "stroke": outlined,
            "tooltip": _tooltip("name", "rank", "kept"),
        },
    }  # fmt: skip


def layer_chart(names: Sequence[str], unit: str, y: ScaleType, look: Palette) -> Spec:
    """Loss of one layer against its rank: data sets ``curve`` and ``marks``.

    Args:
        names: of the plans, in the order of their colours.
        unit: of the losses.
        y: how they are drawn.
        look: see Palette.
    """
    curve = {
        "data": {"name": "curve"},
        "mark": {"type": "line", "color": look.muted, "strokeWidth": 2},
    }
    marks = _plans("marks", "rank", names, look)
    return _chart(look) | {
        "height": _HEIGHT,
        "encoding": {
            "x": {
                "field": "rank",
                "type": "quantitative",
                "title": "rank",
                "axis": {"tickMinStep": 1, "labelOverlap": True},
            },
            "y": _losses("loss", ["loss of the layer", unit], y),
        },
        "layer": _above_zero(y, [curve, *([marks] if names else [])], "loss"),
    }


def predicted_chart(backends: Sequence[str], what: str, scale: ScaleType, look: Palette) -> Spec:
    """Measured increase against the predicted one: data sets ``points`` and ``diagonal``.

    Args:
        backends: in the order of their colours.
        what: was measured; see increase_name.
        scale: of both axes.
        look: see Palette.
    """
    diagonal = {
        "data": {"name": "diagonal"},
        "mark": {"type": "line", "color": look.muted, "strokeDash": [5, 4]},
    }
    points = {
        "data": {"name": "points"},
        "mark": {"type": "point", "filled": True, "size": 90, "opacity": 0.9},
        "encoding": {
            "color": _colours("backend", "backend", backends, look),
            "shape": {"field": "backend", "type": "nominal", "scale": {"domain": list(backends)},
                      "legend": _legend("backend")},
            "tooltip": _tooltip("strategy", "keep", "predicted", "measured"),
        },
    }  # fmt: skip
    return _chart(look) | {
        "height": _HEIGHT,
        "encoding": {
            "x": _losses("predicted", "predicted increase of the loss of a target", scale),
            "y": _losses("measured", f"measured {what}", scale),
        },
        "layer": _above_zero(scale, [diagonal, points], "predicted", "measured"),
    }


def _chart(look: Palette) -> Spec:
    """What all of them have in common."""
    axis = {"labelColor": look.muted, "titleColor": look.ink, "gridColor": look.grid,
            "domainColor": look.muted, "tickColor": look.muted}  # fmt: skip
    below = {"bottom": {"anchor": "start", "direction": "vertical", "margin": 10}}
    size = {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal"}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "background": look.paper,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": {
            "font": "system-ui, sans-serif",
            "view": {"stroke": None},
            "axis": axis | size,
            "legend": {"labelColor": look.ink, "titleColor": look.muted, "layout": below} | size,
            "title": {"color": look.ink, "fontSize": 14, "anchor": "start"},
        },
    }


def _losses(field: str, title: str | list[str], scale: ScaleType) -> Spec:
    """An axis of losses; a title of several lines fits a low drawing."""
    shown: Spec = {"type": scale}
    shown |= {"nice": False, "padding": 8} if scale == "log" else {"zero": False}
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "scale": shown,
        "axis": {"format": _PLAIN, "labelOverlap": True, "tickCount": 6, "titleLimit": _HEIGHT},
    }


def _above_zero(scale: ScaleType, layers: Sequence[Spec], *fields: str) -> list[Spec]:
    """A logarithm has nothing at zero or below. Of layers with data of their own, each is told."""
    if scale != "log":
        return list(layers)
    kept = [{"filter": f"datum.{field} > 0"} for field in fields]
    return [layer | {"transform": kept} for layer in layers]


def _colours(field: str, title: str, names: Sequence[str], look: Palette) -> Spec:
    series = [look.series[number % len(look.series)] for number in range(len(names))]
    return {
        "field": field,
        "type": "nominal",
        "scale": {"domain": list(names), "range": series},
        "legend": _legend(title),
    }


def _legend(title: str) -> Spec:
    """Below the drawing, where a narrow screen has room for it."""
    return {"title": title, "orient": "bottom", "direction": "horizontal", "columns": 2,
            "labelLimit": 120}  # fmt: skip


def _plans(data: str, x: str, names: Sequence[str], look: Palette) -> Spec:
    """A mark for each plan, its colour and shape its own."""
    return {
        "data": {"name": data},
        "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
        "encoding": {
            "color": _colours("name", "plan", names, look),
            "shape": {
                "field": "name",
                "type": "nominal",
                "scale": {"domain": list(names)},
                "legend": _legend("plan"),
            },
            "tooltip": _tooltip("name", x, "loss"),
        },
    }


def _tooltip(*fields: str) -> list[Spec]:
    shares, numbers = ("share", "kept"), ("loss", "measured", "predicted")
    formats = dict.fromkeys(shares, ".2%") | dict.fromkeys(numbers, ".4~g")
    kinds = dict.fromkeys((*shares, *numbers), "quantitative")
    titles = {"share": "kept share", "kept": "kept share", "measured": "measured loss"}
    return [
        {"field": field, "type": kinds.get(field, "nominal"), "title": titles.get(field, field)}
        | ({"format": formats[field]} if field in formats else {})
        for field in fields
    ]
