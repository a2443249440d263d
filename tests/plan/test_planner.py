"""Plans keep their promises, whichever strategy makes them; all without torch."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt import Profile, make_plan
from rankopt.errors import InfeasibleBudgetError, OptionError
from rankopt.layers import DENSE
from rankopt.plan.allocation import allocation
from rankopt.plan.budget import at_least, find_budget
from rankopt.plan.plan import Plan
from rankopt.plan.planner import known_solvers
from rankopt.profile.curves import LossCurve
from rankopt.profile.info import BackendInfo, ScaleInfo
from rankopt_solvers import Problem, certify
from tests.synthetic import SHAPES, synthetic_profile, tails

OBJECTIVES = ("total", "layerwise", "maxmin")
FAST = ("uniform", "proportional", "threshold", "greedy")
EVERY = list(itertools.product((*FAST, "density", "exact", "knapsack"), OBJECTIVES))
PROFILE = synthetic_profile()
DENSE_COST = PROFILE.info.planned_parameters


def smooth_profile(shapes: Any = SHAPES, seed: int = 0, **options: Any) -> Profile:
    """Spectra that fall slowly, so that every further rank is worth something."""
    made = synthetic_profile(shapes, seed, **options)
    rng = np.random.default_rng(seed)

    def smooth(size: int) -> LossCurve:
        energies = np.sort(rng.gamma(2.0, 1.0, size - 1))[::-1] / np.arange(1, size)
        return LossCurve.complete(tails(energies))

    curves = {
        name: {layer: smooth(curve.losses.size) for layer, curve in found.items()}
        for name, found in made.curves.items()
    }
    return dataclasses.replace(made, curves=curves)


SMOOTH = smooth_profile()


def with_fisher(profile: Profile, factors: dict[str, float]) -> Profile:
    """The same profile with some layers' Fisher information multiplied."""
    rows = {k: v * factors.get(k, 1.0) for k, v in profile.fisher_rows.items()}
    return dataclasses.replace(profile, fisher_rows=rows)


def check(plan: Plan, profile: Profile) -> None:
    """Everything that a plan claims, recounted from the profile."""
    curves = profile.curves[plan.backend]
    assert [entry.layer for entry in plan.layers] == list(profile.info.layers)
    spent, kept_bytes, losses, retained, full, kept = 0, 0, [], [], [], []
    for entry in plan.layers:
        out, into = entry.layer.out_features, entry.layer.in_features
        members = 1 + len(entry.layer.partners)
        cost = out * into if entry.rank is None else members * entry.rank * (out + into)
        assert entry.parameters == cost
        if entry.rank is not None:
            assert entry.rank >= 1 and cost < out * into and entry.rank % plan.rank_multiple == 0
        curve = curves[entry.layer.name].losses
        grid = curves[entry.layer.name].ranks.tolist()
        tail = 0.0 if entry.rank is None else curve[grid.index(entry.rank)]
        whole = curve[0]
        share = 1 - tail / whole if whole > 0 else 1.0
        assert entry.retained == pytest.approx(share, abs=1e-12)
        factor = 0.5 / out if plan.scale == "nats" else 1.0
        losses.append(tail * factor if plan.objective == "total" else 1 - share)
        full.append(whole * factor)
        kept.append(whole * factor * share)
        retained.append(share)
        spent += cost
        kept_bytes += cost * entry.layer.itemsize
    info, size = profile.info, plan.size
    assert spent == size.planned <= plan.budget.parameters
    assert size.planned_dense == info.planned_parameters
    assert size.model_dense == info.model_parameters
    assert size.model == info.model_parameters - info.planned_parameters + spent
    assert size.model_bytes == info.model_bytes - info.planned_bytes + kept_bytes
    loss = max(losses) if plan.objective == "maxmin" else math.fsum(losses)
    assert plan.certificate.loss == pytest.approx(loss, rel=1e-9, abs=1e-15)
    assert plan.certificate.bound <= plan.certificate.loss
    assert (plan.certificate.status == "optimal") == (plan.certificate.gap == 0)
    assert plan.retained_worst == min(entry.retained for entry in plan.layers)
    assert plan.retained_total == pytest.approx(sum(kept) / sum(full) if sum(full) else 1.0)
    worst = next(x for x in plan.layers if x.layer.name == plan.worst_layer)
    assert worst.retained == plan.retained_worst
    assert (plan.profile_digest, plan.fingerprint) == (profile.digest(), info.fingerprint)


@pytest.mark.parametrize(("solver", "objective"), EVERY)
def test_plan_is_within_the_budget_and_says_the_truth(solver: str, objective: Any) -> None:
    for keep in (0.3, 0.8) if solver == "knapsack" else (0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        check(make_plan(PROFILE, keep=keep, solver=solver, objective=objective), PROFILE)


@pytest.mark.parametrize(
    ("backend", "scale"), [("fwsvd", "nats"), ("fwsvd", "sum"), ("svd", "frobenius")]
)
def test_loss_is_the_sum_of_the_tails_in_the_named_unit(backend: str, scale: str) -> None:
    plan = make_plan(PROFILE, keep=0.5, backend=backend, scale=scale)
    assert (plan.backend, plan.scale) == (backend, scale)
    check(plan, PROFILE)
    assert plan == make_plan(PROFILE, keep=0.5, backend=backend, scale=scale)


@pytest.mark.parametrize(("solver", "objective"), EVERY)
def test_budget_is_spent_where_ranks_are_fine_grained(solver: str, objective: Any) -> None:
    """Rounding to ranks leaves less than 0.1 % of the planned parameters unspent."""
    profile = smooth_profile(((96, 64), (80, 96), (64, 240), (120, 120)) * 8)
    for keep in (0.8,) if solver == "knapsack" else (0.3, 0.5, 0.8):
        plan = make_plan(profile, keep=keep, solver=solver, objective=objective)
        left = plan.budget.parameters - plan.size.planned
        assert 0 <= left < 0.001 * plan.size.planned_dense


def test_ranks_are_the_inverse_of_the_options() -> None:
    offered = allocation(PROFILE, "fwsvd", "nats", "total", 2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        choice = [int(rng.integers(group.cost.size)) for group in offered.groups]
        ranks = offered.ranks_of(choice)
        costs = [layer.cost(rank) for layer, rank in zip(offered.layers, ranks, strict=True)]
        assert costs == [int(g.cost[j]) for g, j in zip(offered.groups, choice, strict=True)]
        back = [
            offered.ranks[g].tolist().index(DENSE if rank is None else rank)
            for g, rank in enumerate(ranks)
        ]
        assert back == choice


@pytest.mark.parametrize("keep", [0.4, 0.55, 0.7, 0.9])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bound_is_below_every_choice_and_maxmin_reaches_the_best(
    objective: Any, keep: float
) -> None:
    """Against all choices of a profile of three small layers."""
    profile = smooth_profile(((6, 5), (4, 9), (7, 7)), seed=3)
    offered = allocation(profile, "fwsvd", "nats", objective, 1)
    budget = int(keep * profile.info.planned_parameters)
    problem = offered.problem(budget)
    every = itertools.product(*[range(g.cost.size) for g in offered.groups])
    best = min(problem.loss_of(c) for c in every if problem.cost_of(c) <= budget)
    for solver in FAST:
        plan = make_plan(profile, max_params=budget, solver=solver, objective=objective)
        assert plan.certificate.bound <= best * (1 + 1e-12)
        assert plan.certificate.loss >= best * (1 - 1e-12)
    knapsack = make_plan(profile, max_params=budget, solver="knapsack", objective=objective)
    assert knapsack.certificate.loss == pytest.approx(best, rel=1e-12)
    if objective == "maxmin":
        greedy = make_plan(profile, max_params=budget, solver="greedy", objective=objective)
        assert greedy.certificate.loss == pytest.approx(best, rel=1e-12)
        assert greedy.certificate.status == "optimal"


def test_three_ways_to_ask_for_one_budget_agree() -> None:
    info = PROFILE.info
    keep = make_plan(PROFILE, keep=0.7)
    number = make_plan(PROFILE, max_params=math.floor(0.7 * DENSE_COST))
    fixed = info.model_parameters - DENSE_COST
    share = float(at_least(info, "keep_total", keep.budget.parameters))
    total = make_plan(PROFILE, keep_total=share)
    assert keep.ranks == number.ranks == total.ranks
    assert keep.budget.parameters == number.budget.parameters == total.budget.parameters
    assert total.size.model <= share * info.model_parameters
    assert fixed + keep.size.planned == keep.size.model


def test_shares_are_decimal_numbers_not_binary_ones() -> None:
    info = PROFILE.info.model_copy(update={"layers": PROFILE.info.layers[2:3]})
    assert info.planned_parameters == 900
    for percent in range(1, 101):
        budget = find_budget(info, keep=percent / 100)
        assert budget is not None
        assert budget.parameters == 9 * percent


@pytest.mark.parametrize(("solver", "objective"), EVERY)
def test_everything_stays_dense_when_everything_may_stay(solver: str, objective: Any) -> None:
    for budget in ({"keep": 1.0}, {"keep_total": 1.0}, {"max_params": DENSE_COST + 5}):
        plan = make_plan(PROFILE, solver=solver, objective=objective, **budget)
        assert set(plan.ranks.values()) == {None}
        assert plan.retained_total == plan.retained_worst == 1.0
        assert (plan.certificate.loss, plan.certificate.status) == (0.0, "optimal")


@pytest.mark.parametrize("solver", known_solvers())
def test_rank_multiples_are_kept_and_never_over_budget(solver: str) -> None:
    for multiple, keep in itertools.product((2, 4, 5), (0.6, 0.9)):
        plan = make_plan(PROFILE, keep=keep, solver=solver, rank_multiple=multiple)
        check(plan, PROFILE)
        assert all(rank is None or rank % multiple == 0 for rank in plan.ranks.values())


def test_rank_multiple_that_no_rank_of_a_layer_reaches_leaves_it_dense() -> None:
    largest = [layer.largest_rank() for layer in PROFILE.info.layers]
    multiple = sorted(largest)[-2] + 1
    plan = make_plan(PROFILE, keep=0.93, rank_multiple=multiple)
    check(plan, PROFILE)
    assert [rank is None for rank in plan.ranks.values()] == [x < multiple for x in largest]


@pytest.mark.parametrize("profile", [PROFILE, synthetic_profile(grids={"fwsvd": (0, 1, 2, 3)})])
def test_rank_multiple_that_leaves_no_layer_a_rank_is_an_error(profile: Profile) -> None:
    multiple = 500 if profile is PROFILE else 4
    with pytest.raises(OptionError, match=f"no layer can .*rank_multiple={multiple}"):
        make_plan(profile, keep=1.0, rank_multiple=multiple)


GRID = (0, 1, 3, 4, 8, 12)


@pytest.mark.parametrize("solver", known_solvers())
@pytest.mark.parametrize("multiple", [1, 4])
def test_ranks_that_were_not_measured_are_not_on_offer(solver: str, multiple: int) -> None:
    profile = synthetic_profile(grids={"fwsvd": GRID}, tied=(2,))
    offered = set(GRID[1:] if multiple == 1 else (4, 8, 12))
    allocated = allocation(profile, "fwsvd", "nats", "total", multiple)
    for layer, ranks in zip(allocated.layers, allocated.ranks, strict=True):
        assert set(ranks.tolist()) == {r for r in offered if r <= layer.largest_rank()} | {DENSE}
    for keep in (0.5, 0.7, 0.9):
        plan = make_plan(profile, keep=keep, solver=solver, rank_multiple=multiple)
        check(plan, profile)
        assert {rank for rank in plan.ranks.values() if rank is not None} <= offered
    share = make_plan(profile, share=0.9, solver="threshold", rank_multiple=multiple)
    check(share, profile)
    assert share.retained_worst >= 0.9
    # The other backend of the same profile was measured at every rank.
    assert allocation(profile, "svd", "frobenius", "total", 1).ranks[0].size == 10


@pytest.mark.parametrize(("solver", "objective"), EVERY)
def test_tied_layers_pay_for_every_member_and_are_dense_once(solver: str, objective: Any) -> None:
    alone, tied = smooth_profile(), smooth_profile(tied=(2,))
    layer = tied.info.layers[2]
    assert (layer.cost(1), layer.dense_cost) == (2 * (30 + 30), 900)
    # Both members' factors must be smaller than one matrix.
    assert layer.largest_rank() == 7
    for keep in (0.5, 0.8):
        plan = make_plan(tied, keep=keep, solver=solver, objective=objective)
        check(plan, tied)
        assert Plan.from_json(plan.to_json()) == plan
        assert plan.size.planned_dense == DENSE_COST
    assert make_plan(tied, keep=1.0).size == make_plan(alone, keep=1.0).size
    low = make_plan(tied, max_params=sum(x.cost(1) for x in tied.info.layers), solver=solver)
    assert set(low.ranks.values()) == {1}
    assert low.size.planned == 40 + 56 + 120 + 59
    other = make_plan(alone, max_params=low.size.planned - 60, solver=solver)
    assert set(other.ranks.values()) == {1}
    # A parameter of this layer has two bytes.
    assert low.size.model_bytes - other.size.model_bytes == 2 * 60


def test_unit_and_factors_are_those_that_the_profile_says() -> None:
    """Of a backend that nobody here has heard of."""
    made = synthetic_profile(backends=["theirs"])
    info = made.info
    scale = ScaleInfo(name="joules", unit="joules per token", factors=(3.0, 0.0, 0.5, 2.0))
    theirs = BackendInfo(name="theirs", source="a paper of theirs", scales=(scale,))
    profile = dataclasses.replace(made, info=info.model_copy(update={"backends": (theirs,)}))
    plan = make_plan(profile, keep=0.5)
    assert (plan.backend, plan.scale) == ("theirs", "joules")
    assert plan.certificate.unit == "joules per token"
    lost = [
        factor * profile.curves["theirs"][entry.layer.name].losses[entry.rank]
        for factor, entry in zip(scale.factors, plan.layers, strict=True)
        if entry.rank is not None
    ]
    assert plan.certificate.loss == pytest.approx(math.fsum(lost), rel=1e-12)
    # A layer that counts for nothing gets nothing.
    assert plan.ranks["block.1.proj"] == 1
    shares = make_plan(profile, keep=0.5, objective="layerwise")
    assert shares.certificate.unit == "lost share of a layer's Fisher"
    with pytest.raises(OptionError, match="no scale 'nats'; known: joules"):
        make_plan(profile, keep=0.5, scale="nats")


@pytest.mark.parametrize(("solver", "objective"), list(itertools.product(FAST, OBJECTIVES)))
def test_layers_without_energy_lose_nothing(solver: str, objective: Any) -> None:
    for silent in ((1,), range(len(SHAPES))):
        profile = synthetic_profile(silent=tuple(silent))
        plan = make_plan(profile, keep=0.5, solver=solver, objective=objective)
        check(plan, profile)
        assert plan.layers[1].retained == 1.0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_integer_program_is_never_worse_than_greedy(objective: Any) -> None:
    for seed in range(2):
        profile = synthetic_profile(seed=seed)
        for keep in (0.3, 0.6, 0.9):
            plans = {
                solver: make_plan(profile, keep=keep, solver=solver, objective=objective)
                for solver in ("greedy", "knapsack")
            }
            greedy, knapsack = plans["greedy"].certificate, plans["knapsack"].certificate
            assert knapsack.loss <= greedy.loss
            assert max(knapsack.bound, greedy.bound) <= knapsack.loss


@pytest.mark.parametrize("solver", known_solvers())
def test_planning_twice_gives_the_same_plan(solver: str) -> None:
    first = make_plan(PROFILE, keep=0.55, solver=solver)
    assert make_plan(synthetic_profile(), keep=0.55, solver=solver) == first


def test_solver_may_be_any_callable_and_is_recounted() -> None:
    def cheapest(problem: Problem) -> Any:
        return certify(problem, [0] * len(problem.groups), "boast")

    plan = make_plan(PROFILE, keep=0.5, solver=cheapest)
    check(plan, PROFILE)
    assert plan.solver == "cheapest"
    assert set(plan.ranks.values()) == {1}

    def liar(problem: Problem) -> Any:
        return dataclasses.replace(cheapest(problem), choice=(-1,) * len(problem.groups))

    with pytest.raises(OptionError, match="has no option -1"):
        make_plan(PROFILE, keep=0.5, solver=liar)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(3, 24), st.integers(3, 24)), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    keep=st.floats(0.05, 1.0),
    solver=st.sampled_from(FAST),
    objective=st.sampled_from(OBJECTIVES),
    multiple=st.sampled_from([1, 1, 2, 3]),
    silent=st.sets(st.integers(0, 4), max_size=2),
    grid=st.sets(st.integers(1, 12)),
    tied=st.sets(st.integers(0, 4), max_size=2),
)
def test_any_strategy_makes_a_valid_plan_of_any_profile(
    shapes: list[tuple[int, int]],
    seed: int,
    keep: float,
    solver: str,
    objective: Any,
    multiple: int,
    silent: set[int],
    grid: set[int],
    tied: set[int],
) -> None:
    # An empty grid stands for all ranks.
    grids = {"fwsvd": (0, *sorted(grid))} if grid else None
    profile = synthetic_profile(shapes, seed, silent=tuple(silent), grids=grids, tied=tuple(tied))
    smallest, ranks = 0, 0
    for layer in profile.info.layers:
        measured = grid or range(1, 25)
        costs = [layer.cost(r) for r in measured if r <= layer.largest_rank() and r % multiple == 0]
        smallest += min(costs, default=layer.dense_cost)
        ranks += len(costs)
    arguments: dict[str, Any] = {"keep": keep, "solver": solver, "objective": objective}
    try:
        plan = make_plan(profile, rank_multiple=multiple, **arguments)
    except InfeasibleBudgetError:
        assert smallest > keep * profile.info.planned_parameters - 1
        return
    except OptionError:
        assert not ranks
        return
    assert ranks
    check(plan, profile)
    assert Plan.from_json(plan.to_json()) == plan


def test_solver_of_a_module_plans() -> None:
    plan = make_plan(SMOOTH, keep=0.6, solver="rankopt_solvers.greedy:solve_density")
    assert plan.layers == make_plan(SMOOTH, keep=0.6, solver="density").layers
