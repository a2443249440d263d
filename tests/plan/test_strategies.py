"""Strategies as they are written, and side by side."""

import pytest

from rankopt import make_plan
from rankopt.errors import OptionError, ProfileError
from rankopt.plan.compare import Strategy, compare, spread
from tests.plan.test_planner import PROFILE


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("exact", Strategy("exact")),
        ("exact/maxmin", Strategy("exact", "maxmin")),
        ("uniform@svd", Strategy("uniform", "total", "svd")),
        ("exact/layerwise@svd", Strategy("exact", "layerwise", "svd")),
        (
            "rankopt_solvers.greedy:solve_density/maxmin@svd",
            Strategy("rankopt_solvers.greedy:solve_density", "maxmin", "svd"),
        ),
        ("exact/min=0.5", Strategy("exact", min_retained=0.5)),
        ("exact/layerwise/min=0.25@svd", Strategy("exact", "layerwise", "svd", 0.25)),
        ("greedy/min=best", Strategy("greedy", min_retained="best")),
        ("exact/pairs", Strategy("exact", form="pairs")),
        ("exact/maxmin/pivoted@svd", Strategy("exact", "maxmin", "svd", form="pivoted")),
        ("exact/min=0.5/pairs@svd", Strategy("exact", "total", "svd", 0.5, "pairs")),
    ],
)
def test_strategies_are_read_as_they_are_written(text: str, wanted: Strategy) -> None:
    assert Strategy.parse(text) == wanted
    assert str(wanted) == text


@pytest.mark.parametrize(
    "text",
    [
        *("exact@", "@svd", "exact@svd/maxmin@", "exact/@", "exact/", "exact//min=0.5"),
        *("exact/min=", "exact/min=half", "exact/min=nan", "exact/min=1.5", "exact/min=-0.1"),
        *("exact/0.5", "exact/min=0.5/total", "min=0.5", "exact/min=0.5/min=0.6"),
        *("exact/pairs/pairs", "exact/pairs/min=0.5", "exact/triples", "pairs"),
    ],
)
def test_strategies_that_say_less_than_they_should_are_refused(text: str) -> None:
    with pytest.raises(OptionError):
        Strategy.parse(text)


def test_a_strategy_says_the_floor_that_an_option_says() -> None:
    texts = ("exact/min=0.6", "exact/layerwise/min=best", "exact")
    rows = list(compare(PROFILE, [0.7], [Strategy.parse(text) for text in texts]))
    assert rows[0].plan == make_plan(PROFILE, keep=0.7, min_retained=0.6)
    assert rows[1].plan == make_plan(PROFILE, keep=0.7, objective="layerwise", min_retained="best")
    assert rows[2].plan.min_retained is None
    assert rows[0].plan.min_retained == 0.6 and str(rows[1].strategy) == texts[1]
    # Of strategies that say none, it is the option's.
    others = [row.plan for row in compare(PROFILE, [0.7], DEFAULTS, min_retained=0.6)]
    assert others == [rows[0].plan, rows[1].plan]
    with pytest.raises(OptionError, match="uniform goes layer by layer"):
        list(compare(PROFILE, [0.7], [Strategy.parse("uniform/min=0.5")]))


DEFAULTS = [Strategy("exact"), Strategy("exact", "layerwise", min_retained="best")]


def test_backends_are_compared_side_by_side() -> None:
    wanted = [Strategy.parse(x) for x in ("exact", "exact@svd", "uniform@fwsvd")]
    rows = list(compare(PROFILE, [0.5, 0.7], wanted))
    assert [row.plan.backend for row in rows] == ["fwsvd", "svd", "fwsvd"] * 2
    for row in rows:
        made = make_plan(
            PROFILE, keep=row.keep, solver=row.strategy.solver, backend=row.plan.backend
        )
        assert row.plan == made
    other = list(compare(PROFILE, [0.5], wanted, backend="svd"))
    assert [row.plan.backend for row in other] == ["svd", "svd", "fwsvd"]
    with pytest.raises(ProfileError, match="'pca', only for fwsvd, svd"):
        list(compare(PROFILE, [0.5], [Strategy.parse("exact@pca")]))


def test_every_strategy_is_spread_over_backends_and_forms_unless_it_names_its_own() -> None:
    given = [Strategy.parse(text) for text in ("exact", "uniform@svd", "exact/pairs")]
    found = [str(each) for each in spread(given, ["fwsvd", "svd"], ["pairs", "pivoted"])]
    assert found == [
        "exact/pairs@fwsvd",
        "exact/pivoted@fwsvd",
        "exact/pairs@svd",
        "exact/pivoted@svd",
        "uniform/pairs@svd",
        "uniform/pivoted@svd",
    ]
    assert spread(given, [], []) == given
