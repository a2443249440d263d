"""The content of a report as plain values: what the page's script and the pictures draw.

Layers, plans and views go by their numbers: the place in ``layers``, ``plans``, ``views``. All
text that is shown has gone through ``printable``; it is text, never HTML.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rankopt._version import __version__
from rankopt.errors import OptionError, few, printable
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from rankopt.report.charts import (
    PAGE,
    SCALES,
    Palette,
    Spec,
    frontier_chart,
    layer_chart,
    predicted_chart,
    ranks_chart,
)
from rankopt.report.places import blocks_of, kinds_of, places_of
from rankopt.report.shown import Shown, shown_plans, shown_results
from rankopt.report.views import View, curves_of, frontiers_of, rounded, total, views_of
from rankopt.report.words import certificates_of, correlations_of, facts_of, measured_of
from rankopt.results.results import Results
from rankopt.results.summary import Line, increase_name, increases, prediction, summarise

Content = dict[str, Any]
#: Of the heat map: as wide as a page if the columns allow it, in pixels.
_WIDE, _NARROWEST, _WIDEST = 880, 10, 30


def content_of(
    profile: Profile,
    plans: Mapping[str, Plan],
    results: Results | None,
    against: str | None = None,
    layer: str | None = None,
    look: Palette = PAGE,
) -> Content:
    """All that a report shows, as plain values for JSON.

    Args:
        profile: what was measured.
        plans: name -> plan of it.
        results: of its model.
        against: the strategy of the results that others are compared with.
        layer: whose losses are drawn first; by default the first plan's worst.
        look: of the charts.

    Raises:
        PlanError, ResultsError: of another model or another profile; or no such strategy.
        OptionError: no such layer, or something to compare with and no results.
        MissingExtraError: scipy is needed and not there.
    """
    if against is not None and results is None:
        raise OptionError(f"against={against} compares measured losses: give results, too")
    info = profile.info
    given = shown_plans(profile, plans)
    rows = [] if results is None else shown_results(profile, results)
    views = views_of(profile, [(plan.backend, plan.scale) for plan in given])
    forms = list(dict.fromkeys([info.form, *(plan.form for plan in given)]))
    places = places_of(info.layers)
    names = [printable(plan.name) for plan in given]
    described = [
        {
            "name": printable(each.name),
            "kind": printable(place.kind),
            "block": place.block,
            "out": each.out_features,
            "in": each.in_features,
            "parameters": each.dense_cost,
            "members": [printable(member) for member in each.members],
            "largest": each.largest_rank(info.form),
        }
        for each, place in zip(info.layers, places, strict=True)
    ]
    drawn = [_plan(profile, views, shown) for shown in (*given, *rows)]
    content: Content = {
        "rankopt": __version__,
        "title": printable(f"{info.architecture}: the ranks of its layers"),
        "form": info.form,
        "facts": facts_of(profile).to_dict(),
        "certificates": certificates_of(plans).to_dict(),
        "layers": described,
        "first": _first(profile, plans, layer),
        "views": [
            {
                "name": view.name,
                "unit": view.unit,
                "curves": curves,
                "frontier": _frontier(frontiers_of(profile, view, forms), drawn, number),
            }
            for number, (view, curves) in enumerate(
                zip(views, curves_of(profile, views), strict=True)
            )
        ],
        "plans": drawn,
        "charts": {
            "frontier": [
                {y: frontier_chart(names, forms, bool(rows), view.unit, y, look) for y in SCALES}
                for view in views
            ],
            "layer": [
                {y: layer_chart(names, view.unit, y, look) for y in SCALES}
                for view in views
            ],
            "ranks": _ranks(places, look),
        },
    }  # fmt: skip
    if results is not None:
        content |= _measured(results, summarise(results, against), against)
        backends = list(dict.fromkeys(point["backend"] for point in content["points"]))
        content["charts"]["predicted"] = {
            scale: predicted_chart(backends, content["increase"], scale, look) for scale in SCALES
        }
    return content


def ranks_data(content: Content, plan: int) -> dict[str, list[Any]]:
    """Data set of the heat map of a plan; layers in one cell are counted together."""
    cells: dict[tuple[str, str], list[int]] = {}
    for number, layer in enumerate(content["layers"]):
        cells.setdefault((layer["block"], layer["kind"]), []).append(number)
    chosen, layers = content["plans"][plan], content["layers"]
    rows = []
    for (block, kind), members in cells.items():
        dense = sum(layers[k]["parameters"] for k in members)
        kept = sum(layers[k]["parameters"] * chosen["kept"][k] for k in members) / dense
        rank = chosen["ranks"][members[0]]
        alone = len(members) == 1
        rows.append(
            {
                "layer": members[0],
                "block": block,
                "kind": kind,
                "name": layers[members[0]]["name"] if alone else f"{len(members)} layers",
                "rank": ("dense" if rank is None else rank) if alone else "",
                "kept": kept,
            }
        )
    return {"cells": rows}


def layer_data(content: Content, view: int, layer: int) -> dict[str, list[Any]]:
    """Data sets of one layer's losses."""
    curve = content["views"][view]["curves"][layer]
    marks = [
        {
            "name": plan["name"],
            "rank": plan["ranks"][layer],
            "loss": plan["lost"][view][layer],
        }
        for plan in content["plans"]
        if plan["given"] and plan["ranks"][layer] is not None and plan["lost"][view] is not None
    ]
    points = zip(curve["rank"], curve["loss"], strict=True)
    return {"curve": [{"rank": rank, "loss": loss} for rank, loss in points], "marks": marks}


def _first(profile: Profile, plans: Mapping[str, Plan], asked: str | None) -> int:
    names = [layer.name for layer in profile.info.layers]
    if asked is not None:
        if asked not in names:
            raise OptionError(f"no layer {asked!r} is planned; there are {few(names)}")
        return names.index(asked)
    worst = next((plan.worst_layer for plan in plans.values()), None)
    return names.index(worst) if worst in names else 0


def _plan(profile: Profile, views: Sequence[View], shown: Shown) -> dict[str, Any]:
    layers = profile.info.layers
    lost = [
        view.lost(profile, shown.ranks) if view.backend == shown.backend else None for view in views
    ]
    kept = [
        layer.cost(rank, shown.form) / layer.dense_cost
        for layer, rank in zip(layers, shown.ranks, strict=True)
    ]
    return {
        "name": printable(shown.name),
        "given": shown.given,
        "backend": shown.backend,
        "form": shown.form,
        "share": shown.parameters / profile.info.planned_parameters,
        "measured": shown.measured,
        "ranks": list(shown.ranks),
        "kept": rounded(kept),
        "retained": None if shown.retained is None else rounded(shown.retained, 5),
        "margins": None if shown.margins is None else [
            None if margin is None else rounded([margin], 3)[0] for margin in shown.margins
        ],
        "lost": [None if each is None else rounded(each) for each in lost],
        "losses": [total(each) for each in lost],
    }  # fmt: skip


def _frontier(
    frontier: list[Spec], plans: Sequence[Content], view: int
) -> dict[str, list[dict[str, Any]]]:
    """Data sets of the frontier: the curve, and the plans on it."""
    marks = [
        {
            "name": plan["name"],
            "share": plan["share"],
            "loss": plan["losses"][view],
            "measured": plan["measured"],
            "given": plan["given"],
        }
        for plan in plans
        if plan["losses"][view] is not None
    ]
    return {
        "frontier": frontier,
        "plans": [mark for mark in marks if mark["given"]],
        "measured": [mark for mark in marks if not mark["given"]],
    }


def _ranks(places: Sequence[Any], look: Palette) -> Spec:
    blocks, kinds = blocks_of(places), [printable(kind) for kind in kinds_of(places)]
    step = min(max(_WIDE // len(blocks), _NARROWEST), _WIDEST)
    return ranks_chart(blocks, kinds, step, look)


def _measured(results: Results, lines: Sequence[Line], against: str | None) -> Content:
    dense = results.dense.loss
    measured = [None] * len(lines) if dense is None else increases(lines, dense)
    points: list[dict[str, Any]] = [
        {
            "strategy": printable(line.strategy),
            "keep": line.keep,
            "backend": printable(line.plans[0].backend),
            "predicted": line.predicted,
            "measured": increase,
        }
        for line, increase in zip(lines, measured, strict=True)
        if line.predicted is not None and increase is not None
    ]
    ranked = {} if dense is None else prediction(lines, dense)
    values = [float(point[name]) for point in points for name in ("predicted", "measured")]
    return {
        "points": points,
        "increase": increase_name(lines),
        "diagonal": {
            "log": _diagonal([value for value in values if value > 0]),
            "linear": _diagonal(values),
        },
        "correlations": correlations_of(ranked).to_dict(),
        "measured": measured_of(results, lines, against).to_dict(),
    }


def _diagonal(values: Sequence[float]) -> list[dict[str, float]]:
    """From the smallest of all values to the largest: both axes have the same."""
    ends = (min(values), max(values)) if values else ()
    return [{"predicted": end, "measured": end} for end in ends]
