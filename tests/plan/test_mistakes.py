"""What cannot be planned, and what is said of it."""

import math
import re
from typing import Any

import pytest

from rankopt import make_lora_plan, make_plan
from rankopt.errors import BudgetError, InfeasibleBudgetError, OptionError, ProfileError
from rankopt.plan.planner import known_solvers
from tests.plan.test_planner import PROFILE, SMOOTH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a budget is needed: keep, keep_total, max_params, max_bytes"),
        ({"keep": 0.5, "max_params": 9}, "one budget, not keep and max_params"),
        ({"keep": 0.0}, "keep is a share above 0 and at most 1, got 0.0"),
        ({"keep": 1.5}, r"got 1\.5"),
        ({"keep": -0.5}, r"got -0\.5"),
        ({"keep": math.nan}, "got nan"),
        ({"keep": "0.5"}, "got '0.5'"),
        ({"keep": True}, "got True"),
        ({"keep_total": 2}, "keep_total is a share"),
        ({"keep_total": math.inf}, "got inf"),
        ({"max_params": 0}, "whole number above 0"),
        ({"max_params": 3.5}, "whole number above 0"),
        ({"max_params": math.nan}, "whole number above 0"),
        ({"max_params": math.inf}, "whole number above 0"),
        ({"max_params": "many"}, "whole number above 0"),
        ({"solver": "threshold", "share": 0.0}, "share must be above 0 and at most 1"),
        ({"solver": "threshold", "share": 1.1}, "share must be above 0 and at most 1"),
        ({"solver": "threshold", "share": math.nan}, "share must be above 0 and at most 1"),
    ],
)
def test_mistakes_are_budget_errors_that_say_what_is_wanted(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BudgetError, match=message) as caught:
        make_plan(PROFILE, **arguments)
    assert caught.value.exit_code == 2


def test_a_path_is_no_profile() -> None:
    wanted = "wanted is a Profile, not a value of type str: read it with rankopt.Profile.load"
    for make in (make_plan, make_lora_plan):
        with pytest.raises(ProfileError, match=wanted):
            make("profile.safetensors", keep=0.5)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.5, "share": 0.9}, "share belongs to the threshold strategy, not to exact"),
        ({"keep": 0.5, "rank_multiple": 0}, "rank_multiple"),
        ({"keep": 0.5, "rank_multiple": 1.5}, "rank_multiple"),
        ({"keep": 0.5, "rank_multiple": True}, "rank_multiple"),
        ({"keep": 0.5, "rank_multiple": math.nan}, "rank_multiple"),
        ({"keep": 0.5, "solver": "magic"}, f"'magic'; known: {', '.join(known_solvers())}"),
        ({"keep": 0.5, "objective": "fame"}, "'fame'; known: total, layerwise, maxmin"),
        ({"keep": 0.5, "scale": "metric"}, "no scale 'metric'; known: nats, sum"),
        ({"keep": 0.5, "backend": "svd", "scale": "nats"}, "known: frobenius"),
        ({"solver": "threshold", "share": 0.9, "depth": 3}, "no options, got depth"),
        ({"keep": 0.5, "solver": "uniform", "depth": 3}, "no options, got depth"),
        ({"keep": 0.5, "solver": "greedy", "depth": 3}, "solver greedy takes no option depth"),
        ({"keep": 0.5, "solver": "knapsack", "time_limit": 0.0}, "time_limit must be a positive"),
    ],
)
def test_mistakes_are_option_errors_that_say_what_is_wanted(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        make_plan(PROFILE, **arguments)
    assert caught.value.exit_code == 2


def test_unknown_backend_names_those_of_the_profile() -> None:
    with pytest.raises(ProfileError, match="'kronecker', only for fwsvd, svd"):
        make_plan(PROFILE, keep=0.5, backend="kronecker")


@pytest.mark.parametrize("solver", known_solvers())
@pytest.mark.parametrize(
    "asked", [{"keep": 0.01}, {"keep_total": 0.26}, {"keep_total": 0.1}, {"max_params": 3}]
)
def test_infeasible_budget_names_the_smallest_that_works(
    asked: dict[str, Any], solver: str
) -> None:
    (kind,) = asked
    with pytest.raises(InfeasibleBudgetError) as caught:
        make_plan(PROFILE, solver=solver, **asked)
    assert caught.value.exit_code == 3
    found = re.search(rf"is ([\d,]+) \({kind} ([\d.]+)\)", str(caught.value))
    assert found is not None
    smallest = int(found[1].replace(",", ""))
    plan = make_plan(PROFILE, solver=solver, max_params=smallest)
    assert plan.size.planned == smallest == sum(x.cost(1) for x in PROFILE.info.layers)
    with pytest.raises(InfeasibleBudgetError):
        make_plan(PROFILE, solver=solver, max_params=smallest - 1)
    named = int(found[2]) if kind == "max_params" else float(found[2])
    assert make_plan(PROFILE, solver=solver, **{kind: named}).size.planned >= smallest


def test_floor_beyond_the_budget_names_the_smallest_that_keeps_it() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"min_retained=0\.9") as error:
        make_plan(SMOOTH, keep=0.3, min_retained=0.9)
    smallest = int(re.findall(r"is ([0-9,]+) \(keep", str(error.value))[0].replace(",", ""))
    assert make_plan(SMOOTH, max_params=smallest, min_retained=0.9).size.planned <= smallest


def test_an_option_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="unknown solver"):
        make_plan(PROFILE, keep=0.5, solver="magic")
