"""Budgets of bytes, FLOPs and latency: kept exactly, by the best ranks there are, or refused."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankopt import LatencyTable, Plan, Profile, make_plan
from rankopt.errors import (
    BudgetError,
    DataError,
    InfeasibleBudgetError,
    OptionError,
    PlanError,
)
from rankopt.layers import DENSE
from rankopt.plan.allocation import allocation
from tests.synthetic import synthetic_profile

pytest.importorskip("cvxpy")

PROFILE = synthetic_profile()
SMALL = synthetic_profile(((6, 5), (4, 9), (7, 7)), seed=3, tied=(1,))


def table(profile: Profile, seed: int = 0, form: str = "pairs") -> LatencyTable:
    """Of every rank of every layer, in no order that has to do with parameters."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for layer in profile.info.layers:
        ranks = [*range(1, layer.largest_rank() + 1), "dense"]
        rows += [
            {"layer": layer.name, "form": form, "rank": r, "microseconds": rng.uniform(1, 9)}
            for r in ranks
        ]
    return LatencyTable.of(rows)


def spent(plan: Plan) -> dict[str, int]:
    return {limit.kind: limit.spent for limit in plan.limits}


def counted(plan: Plan) -> tuple[int, int]:
    """Bytes and FLOPs of a plan of pairs, counted here."""
    of_bytes, flops = 0, 0
    for entry in plan.layers:
        out, into = entry.layer.out_features, entry.layer.in_features
        members = 1 + len(entry.layer.partners)
        dense = entry.rank is None
        parameters = out * into if dense else members * entry.rank * (out + into)
        of_bytes += parameters * entry.layer.itemsize
        flops += 2 * (members * out * into if dense else parameters)
    return of_bytes, flops


@pytest.mark.parametrize("seed", range(8))
def test_the_best_ranks_within_all_budgets_are_found(seed: int) -> None:
    """Against all choices of three small layers, one of them shared and all of two dtypes."""
    rng = np.random.default_rng(seed)
    offered = allocation(SMALL)
    latencies = table(SMALL, seed)
    costs = {
        "max_params": [group.cost for group in offered.groups],
        "max_bytes": [
            g.cost * x.itemsize for g, x in zip(offered.groups, offered.layers, strict=True)
        ],
        "max_flops": [
            2 * np.where(r == DENSE, len(x.members) * x.dense_cost, g.cost)
            for g, x, r in zip(offered.groups, offered.layers, offered.ranks, strict=True)
        ],
        "max_latency": [
            latencies.nanoseconds(x, r, "pairs")
            for x, r in zip(offered.layers, offered.ranks, strict=True)
        ],
    }
    named = list(rng.permutation(list(costs)))[: int(rng.integers(1, 5))]
    asked: dict[str, Any] = {}
    for name in named:
        low, high = (sum(int(f(c)) for c in costs[name]) for f in (np.min, np.max))
        limit = int(low + rng.uniform(0.3, 0.8) * (high - low))
        asked[name] = limit / 1000 if name == "max_latency" else limit
    if "max_latency" in asked:
        asked["latency_table"] = latencies
    limits = {n: asked[n] * (1000 if n == "max_latency" else 1) for n in named}
    fitting = [
        math.fsum(float(g.loss[j]) for g, j in zip(offered.groups, choice, strict=True))
        for choice in itertools.product(*[range(g.cost.size) for g in offered.groups])
        if all(
            sum(int(c[j]) for c, j in zip(costs[n], choice, strict=True)) <= limits[n]
            for n in named
        )
    ]
    if not fitting:
        with pytest.raises(InfeasibleBudgetError, match="no ranks fit"):
            make_plan(SMALL, **asked)
        return
    plan = make_plan(SMALL, **asked)
    assert plan.certificate.loss == pytest.approx(min(fitting), rel=1e-12)
    assert plan.certificate.status == "optimal"
    assert Plan.from_json(plan.to_json()) == plan
    assert {limit.kind for limit in plan.limits} == set(named) - {"max_params"}
    for kind, count in {"max_bytes": counted(plan)[0], "max_flops": counted(plan)[1]}.items():
        assert spent(plan).get(kind, count) == count
    for limit in plan.limits:
        assert limit.spent <= limit.allowed and f"budget {limit.allowed:,}"[:9] in str(plan)
    if "max_latency" in named:
        took = [
            int(latencies.nanoseconds(e.layer, np.array([e.rank or DENSE]), "pairs")[0])
            for e in plan.layers
        ]
        assert [entry.nanoseconds for entry in plan.layers] == took
        assert spent(plan)["max_latency"] == sum(took)
    assert all(limit.price is not None for limit in plan.limits)
    assert (plan.certificate.multiplier is None) == ("max_params" not in named)


def test_bytes_are_those_of_the_plans_size_and_dense_is_their_largest() -> None:
    plan = make_plan(PROFILE, max_bytes=5000)
    dense = make_plan(PROFILE, max_bytes=10**18)
    assert Plan.from_json(dense.to_json()) == dense
    before, after = dense.limits[0], plan.limits[0]
    assert before.spent == before.dense == PROFILE.info.planned_bytes
    assert plan.size.model_bytes_dense - plan.size.model_bytes == before.spent - after.spent
    assert "bytes" in str(plan) and "budget 5,000" in str(plan)
    assert plan.solver == "exact" and plan.certificate.status == "optimal"
    for limit, entries in ((before, dense.layers), (after, plan.layers)):
        assert limit.spent == sum(x.parameters * x.layer.itemsize for x in entries)


def test_a_budget_of_another_kind_is_the_same_where_costs_are_proportional() -> None:
    one = make_plan(PROFILE, max_params=1500)
    assert make_plan(PROFILE, max_flops=3000).ranks == one.ranks
    both = make_plan(PROFILE, max_params=1500, max_flops=3001)
    assert both.ranks == one.ranks and both.certificate.status == "optimal"
    assert make_plan(PROFILE, max_flops=3000, solver="greedy").layers
    assert make_plan(PROFILE, max_flops=3000, objective="maxmin").ranks == (
        make_plan(PROFILE, max_params=1500, objective="maxmin").ranks
    )


def test_floors_and_pins_hold_beside_several_budgets() -> None:
    asked: dict[str, Any] = {"keep": 0.8, "max_bytes": 5200, "min_retained": 0.9}
    plan = make_plan(PROFILE, **asked, pins={"block.2.proj": 6})
    assert plan.ranks["block.2.proj"] == 6
    assert all(x.retained >= 0.9 for x in plan.layers if x.layer.name != "block.2.proj")
    assert spent(plan)["max_bytes"] == counted(plan)[0] <= 5200


def test_pivoted_ranks_have_their_own_flops() -> None:
    info = PROFILE.info.model_copy(update={"form": "pivoted"})
    plan = make_plan(dataclasses.replace(PROFILE, info=info), max_flops=3000)
    assert plan.form == "pivoted"
    flops = [
        2 * out * into if e.rank is None else 2 * e.rank * (out + into - e.rank)
        for e in plan.layers
        for out, into in [(e.layer.out_features, e.layer.in_features)]
    ]
    assert spent(plan)["max_flops"] == sum(flops) <= 3000


ROWS = (
    {"kind": "proj", "rank": "dense", "microseconds": 20},
    {"kind": "proj", "form": "pairs", "rank": 2, "microseconds": 3},
    {"kind": "proj", "form": "pairs", "rank": 6, "microseconds": 4.0015},
    {"out_features": 30, "in_features": 30, "form": "pairs", "rank": 9, "microseconds": 1},
    {"layer": "block.[3]*", "form": "pairs", "rank": 4, "microseconds": 7},
)


def test_latencies_between_listed_ranks_are_interpolated_and_the_nearest_rows_count() -> None:
    listed = LatencyTable.of(ROWS)
    first, *_, third, last = PROFILE.info.layers
    ranks = np.array([1, 2, 3, 6, DENSE])
    assert listed.nanoseconds(first, ranks, "pairs").tolist() == [3000, 3000, 3251, 4002, 20000]
    assert listed.known(first, np.array([6, 7, DENSE]), "pairs").tolist() == [True, False, True]
    # A kind goes before a shape, a name before both.
    assert listed.nanoseconds(third, np.array([2]), "pairs").tolist() == [3000]
    assert listed.nanoseconds(last, np.array([4, DENSE]), "pairs").tolist() == [7000, 20000]
    plan = make_plan(PROFILE, max_latency=45, latency_table=listed)
    offered = {e.layer.name: e.rank for e in plan.layers if e.rank is not None}
    assert all(rank <= (4 if "3" in name else 6) for name, rank in offered.items())
    assert sum(e.nanoseconds or 0 for e in plan.layers) <= 45_000
    shared = synthetic_profile(tied=(0,)).info.layers[0]
    assert listed.nanoseconds(shared, np.array([2]), "pairs").tolist() == [6000]


def test_a_table_is_the_same_as_csv_and_json(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(ROWS))
    names = ("layer", "kind", "out_features", "in_features", "form", "rank", "microseconds")
    lines = [",".join(names)] + [",".join(str(r.get(n, "")) for n in names) for r in ROWS]
    (tmp_path / "t.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    read = [LatencyTable.load(tmp_path / name) for name in ("t.json", "t.csv")]
    assert read[0].points == read[1].points and read[0].digest == read[1].digest
    plans = [
        make_plan(PROFILE, max_latency=45, latency_table=tmp_path / f"t.{x}") for x in ("csv",)
    ]
    assert plans[0].limits[0].table == read[0].digest


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([], "without rows"),
        ([{"rank": 3, "microseconds": 1}], "form must be pairs or pivoted, got None"),
        ([{"rank": 0, "form": "pairs", "microseconds": 1}], "rank .* whole number above 0, got 0"),
        ([{"rank": True, "form": "pairs", "microseconds": 1}], "got True"),
        ([{"rank": "dense", "microseconds": "fast"}], "row 1: microseconds .*'fast'"),
        ([{"rank": "dense", "microseconds": math.nan}], "microseconds .*nan"),
        ([{"rank": "dense", "microseconds": -1}], "microseconds .*-1"),
        ([{"rank": "dense"}], "microseconds .*None"),
        ([{"rank": "dense", "microseconds": 1, "speed": 2}], "has speed; known: layer"),
        ([{"rank": "dense", "microseconds": 1}] * 2, "row 2: dense is listed twice"),
        ([{"rank": "dense", "microseconds": 1, "layer": 3}], "are names"),
        ([7], "row 1: wanted is an object"),
    ],
)
def test_rows_that_are_none_are_refused_by_number(rows: list[Any], wanted: str) -> None:
    with pytest.raises(DataError, match=wanted):
        LatencyTable.of(rows)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("t.csv", "rank,speed\n1,2\n", "the columns are rank, speed; wanted are rank and micro"),
        ("t.csv", "", "the columns are none"),
        ("t.csv", "rank,microseconds\ndense,1,2\n", "row 1: has"),
        ("t.json", "{", "not JSON"),
        ("t.json", "{}", "a list of rows"),
        ("t.txt", "", "ends in .csv or .json"),
        ("missing.csv", None, "no latency table at"),
    ],
)
def test_files_that_are_no_tables_are_refused(
    tmp_path: Path, name: str, text: str | None, wanted: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=wanted):
        make_plan(PROFILE, max_latency=1, latency_table=tmp_path / name)


def test_layers_without_a_latency_are_named_with_what_they_lack() -> None:
    listed = LatencyTable.of([*ROWS[1:3], {**ROWS[0], "kind": None, "layer": "*.0.*"}])
    with pytest.raises(DataError, match=r"block\.1\.proj \(proj, 16 x 40: dense\)"):
        make_plan(PROFILE, max_latency=9, latency_table=listed)
    info = PROFILE.info.model_copy(update={"form": "pivoted"})
    pivoted = dataclasses.replace(PROFILE, info=info)
    with pytest.raises(DataError, match=r"block\.0\.proj \(proj, 24 x 16: form pivoted\)"):
        make_plan(pivoted, max_latency=9, latency_table=LatencyTable.of(ROWS))
    with pytest.raises(OptionError, match=r"block\.0\.proj is pinned to rank 8; .*no\s+latency"):
        make_plan(
            PROFILE, max_latency=9, latency_table=LatencyTable.of(ROWS), pins={"block.0.proj": 8}
        )


def test_the_budget_that_cannot_be_met_is_named_with_the_least_that_can() -> None:
    latencies = table(PROFILE)
    for asked in ({"keep": 0.3}, {"keep": 0.3, "max_bytes": 4000}):
        with pytest.raises(InfeasibleBudgetError, match=r"allows .* beside ") as e:
            make_plan(PROFILE, **asked, max_latency=8, latency_table=latencies)
        assert e.value.exit_code == 3
    with pytest.raises(InfeasibleBudgetError, match=r"max_bytes allows .* 3 bytes.* is 660;"):
        make_plan(PROFILE, max_bytes=3)
    assert make_plan(PROFILE, max_bytes=660).limits[0].spent == 660


def test_what_is_said_to_be_the_least_beside_another_budget_can_be_had() -> None:
    latencies = table(PROFILE, seed=5)
    asked: dict[str, Any] = {"max_latency": 8.0, "latency_table": latencies}
    alone = make_plan(PROFILE, **asked).size.planned
    with pytest.raises(InfeasibleBudgetError, match="beside") as caught:
        make_plan(PROFILE, **asked, max_params=300)
    words = str(caught.value)
    least = words.split("the smallest reachable")[1].split(" is ")[1].split(";")[0]
    number = float(least.replace(",", ""))
    kind = "max_params" if "max_params allows" in words else "max_latency"
    met = {**asked, "max_params": 300, kind: int(number) if kind == "max_params" else number}
    assert make_plan(PROFILE, **met).size.planned <= alone
    less = {**met, kind: number - 1 if kind == "max_params" else number - 0.001}
    with pytest.raises(InfeasibleBudgetError):
        make_plan(PROFILE, **{**less, "max_params": int(less["max_params"])})


@pytest.mark.parametrize(
    ("asked", "error", "wanted"),
    [
        ({"max_bytes": 0}, BudgetError, "max_bytes must be a whole number above 0, got 0"),
        ({"max_bytes": "1kB"}, BudgetError, "max_bytes must be a whole number"),
        ({"max_bytes": 10**19}, BudgetError, r"max_bytes is at most 1e\+18, got 10000"),
        ({"max_flops": 1.5}, BudgetError, "max_flops must be a whole number"),
        ({"max_latency": 5.0}, BudgetError, "belong together"),
        ({"latency_table": LatencyTable.of(ROWS)}, BudgetError, "belong together"),
        (
            {"max_latency": math.nan, "latency_table": LatencyTable.of(ROWS)},
            BudgetError,
            "number of microseconds, got nan",
        ),
        ({"max_bytes": 5000, "solver": "uniform"}, OptionError, "uniform .*cannot meet max_bytes"),
        (
            {"max_bytes": 5000, "solver": "threshold", "share": 0.5},
            OptionError,
            "threshold .*cannot meet max_bytes",
        ),
        ({"max_bytes": 5000, "keep": 0.5, "solver": "greedy"}, OptionError, "greedy takes one"),
        (
            {"max_bytes": 5000, "keep": 0.5, "objective": "maxmin"},
            OptionError,
            "objective maxmin takes one budget, not keep=0.5 and max_bytes=5000",
        ),
        (
            {"max_bytes": 5000, "max_flops": 500, "min_retained": "best"},
            OptionError,
            "min_retained best takes one budget",
        ),
    ],
)
def test_what_does_not_go_together_is_said(
    asked: dict[str, Any], error: type[Exception], wanted: str
) -> None:
    with pytest.raises(error, match=wanted):
        make_plan(PROFILE, **asked)


@pytest.mark.parametrize(
    ("place", "value", "wanted"),
    [
        (("limits", 0, "spent"), 1, "by its layers max_bytes is"),
        (("limits", 0, "allowed"), 1, "is spent, 1 is allowed"),
        (("limits", 0, "kind"), "max_flops", "stated twice|budget is one of max_bytes"),
        (("limits", 1, "kind"), "max_bytes", "stated twice"),
        (("layers", 0, "nanoseconds"), 5, "nanoseconds under max_latency, and none without"),
        (("budget", "kind"), "max_latency", "which no limit states"),
    ],
)
def test_a_plan_file_that_does_not_add_up_is_refused(
    place: tuple[Any, ...], value: Any, wanted: str
) -> None:
    content = json.loads(make_plan(PROFILE, max_bytes=5000, max_flops=3000).to_json())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(PlanError, match=wanted):
        Plan.from_json(json.dumps(content))


def test_plans_without_limits_are_written_as_before() -> None:
    content = json.loads(make_plan(PROFILE, keep=0.5).to_json())
    assert "limits" not in content and "nanoseconds" not in content["layers"][0]
