"""What is drawn lies where its figures say, also where some of them have no logarithm."""

import re
from typing import Any

import pytest

from rankopt.report.charts import PAPER, frontier_chart, layer_chart, predicted_chart

library = pytest.importorskip("vl_convert")


def places(spec: dict[str, Any], **data: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Of the marks that are points, in the order of their data."""
    drawn = library.vegalite_to_svg(spec | {"width": 300, "datasets": data})
    found = re.findall(
        r'<path aria-label="[^"]*" role="graphics-symbol" aria-roledescription="point" '
        r'transform="translate\(([-\d.]+),([-\d.]+)\)',
        drawn,
    )
    return [(float(x), float(y)) for x, y in found]


LOSSES = [0.01, -0.02, 0.1, 0.0, 1.0]


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_predicted_and_measured(scale: Any) -> None:
    """At equal steps of a logarithm, or of the figures; what has none is left out."""
    points = [
        {"strategy": "s", "keep": 0.5, "backend": "b", "predicted": 0.1, "measured": loss}
        for loss in LOSSES
    ]
    ends = [{"predicted": 0.01, "measured": 0.01}, {"predicted": 1.0, "measured": 1.0}]
    found = places(
        predicted_chart(["b"], "increase over dense", scale, PAPER), points=points, diagonal=ends
    )
    heights = [y for _, y in found]
    if scale == "log":
        assert len(found) == 3
        assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], rel=1e-3)
        assert heights[0] - heights[2] > 50
    else:
        assert len(found) == 5
        slope = (heights[4] - heights[3]) / 1.0
        expected = [heights[3] + slope * loss for loss in LOSSES]
        assert heights == pytest.approx(expected, abs=0.1)
    assert len({x for x, _ in found}) == 1


def test_a_plan_that_loses_nothing_does_not_flatten_the_others() -> None:
    shares, losses = (0.2, 0.5, 1.0), (1.0, 0.01, 0.0)
    marks = [
        {"name": "a", "share": s, "loss": loss} for s, loss in zip(shares, losses, strict=True)
    ]
    spec = frontier_chart(["a"], ["pairs"], False, "nats", "log", PAPER)
    line = [{"form": "pairs", "share": m["share"], "loss": m["loss"]} for m in marks]
    low, high = places(spec, frontier=line, plans=marks)
    assert high[1] - low[1] > 50
    ranks = [{"name": "a", "rank": 1, "loss": 1.0}, {"name": "a", "rank": 2, "loss": 0.0}]
    ranks.append({"name": "a", "rank": 3, "loss": 0.01})
    spec = layer_chart(["a"], "nats", "log", PAPER)
    first, last = places(spec, curve=ranks, marks=ranks)
    assert last[1] - first[1] > 50
