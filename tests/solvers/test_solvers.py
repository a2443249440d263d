"""Promises of solve(), whatever the solver: feasible, bounded, repeatable; greedy's own."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt_solvers import Group, InfeasibleError, Problem, certify, solve, verify
from rankopt_solvers.problem import Objective

Problems = Callable[..., st.SearchStrategy[Problem]]
Optimum = Callable[[Problem], float]

OURS = ["exact", "greedy", "density"]


def group(name: str, cost: list[int], loss: list[float]) -> Group:
    return Group(name, np.array(cost), np.array(loss))


def affordable_improvements(problem: Problem, choice: tuple[int, ...], level: float) -> list[str]:
    """Groups in which another option loses less, at most level, and fits what is left."""
    left = problem.budget - problem.cost_of(choice)
    return [
        g.name
        for g, j in zip(problem.groups, choice, strict=True)
        if ((g.cost - g.cost[j] <= left) & (g.loss < g.loss[j]) & (g.loss <= level)).any()
    ]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_greedy_spends_what_can_be_spent(
    ugly: Problems, optimum: Optimum, data: st.DataObject
) -> None:
    problem = data.draw(ugly())
    solution = solve(problem, "greedy")
    verify(problem, solution)
    best = optimum(problem)
    assert solution.bound <= best <= solution.loss and solution.cost <= problem.budget
    assert solution.status == "feasible" or solution.loss == best
    assert 0.0 <= solution.gap <= 1.0
    # 10**30 is more than the costs' type holds, and as good as all of them.
    capped = problem.with_budget(min(problem.budget, 2**62))
    assert not affordable_improvements(capped, solution.choice, np.inf)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(solver=st.sampled_from(OURS), data=st.data())
def test_max_is_exact_and_the_rest_of_the_budget_is_spent(
    problems: Problems, optimum: Optimum, solver: str, data: st.DataObject
) -> None:
    problem = data.draw(problems("max"))
    solution = solve(problem, solver)
    verify(problem, solution)
    best = optimum(problem)
    assert solution.loss == solution.bound == best and solution.status == "optimal"
    chosen = [g.loss[j] for g, j in zip(problem.groups, solution.choice, strict=True)]
    assert max(chosen) == best
    if solver != "density":
        assert not affordable_improvements(problem, solution.choice, best)


@pytest.mark.parametrize("solver", OURS)
def test_the_second_stage_of_max_lowers_the_sum(solver: str) -> None:
    # "stuck" sets the level at 5 whatever is spent; the other group can still be improved.
    groups = (group("stuck", [1, 100], [5.0, 0.0]), group("free", [0, 2, 9], [5.0, 3.0, 1.0]))
    assert solve(Problem(groups, 10, "max"), solver).choice == (0, 2)


def test_the_jump_to_dense_is_seen_from_far() -> None:
    # From one option to the next "ranks" saves 0.1 per unit, then 18.8; "other" saves 1 all along.
    ranks = group("ranks", [0, 4, 8, 10], [38.4, 38.0, 37.6, 0.0])
    other = group("other", [0, 5, 10], [10.0, 5.0, 0.0])
    problem = Problem((ranks, other), 10)
    solution = solve(problem, "greedy")
    verify(problem, solution)
    assert solution.choice == (3, 0) and solution.loss == 10.0
    assert solve(problem, "density").loss > 3 * solution.loss


@pytest.mark.parametrize(("saved_by_small", "choice"), [(1.5, (0, 1)), (15.0, (1, 0))])
def test_the_edge_at_which_the_budget_breaks_is_weighed(
    saved_by_small: float, choice: tuple[int, int]
) -> None:
    # "small" saves more per unit, but once it is taken the long edge no longer fits.
    small = group("small", [0, 1], [saved_by_small, 0.0])
    dense = group("dense", [0, 10], [12.0, 0.0])
    assert solve(Problem((small, dense), 10), "greedy").choice == choice


def test_on_layers_greedy_is_close_and_density_is_not(layers: Callable[..., Problem]) -> None:
    problem = layers([(48, 48), (48, 96), (64, 128)] * 8, 0.5, 0, 0.9)
    best = solve(problem).loss
    assert best <= solve(problem, "greedy").loss < best * 1.005
    assert solve(problem, "density").loss > best * 1.01


@pytest.mark.parametrize("solver", OURS)
@pytest.mark.parametrize("objective", ["sum", "max"])
def test_the_smallest_budget_is_met_exactly(
    objective: Objective, solver: str, generic: Callable[..., Problem]
) -> None:
    problem = dataclasses.replace(generic(6, 8, 0.0), objective=objective)
    solution = solve(problem, solver)
    verify(problem, solution)
    assert solution.cost == problem.budget == problem.smallest_cost
    with pytest.raises(InfeasibleError):
        solve(problem.with_budget(problem.budget - 1), solver)


@pytest.mark.parametrize("solver", OURS)
def test_among_equally_cheap_options_the_best_is_taken(solver: str) -> None:
    problem = Problem((group("a", [2, 2, 2], [3.0, 1.0, 2.0]), group("b", [0, 1], [1.0, 0.0])), 2)
    assert solve(problem, solver).choice == (1, 0)


@pytest.mark.parametrize("solver", OURS)
@pytest.mark.parametrize("objective", ["sum", "max"])
@pytest.mark.parametrize("budget", [10**9, 10**30])
def test_a_huge_budget_takes_every_smallest_loss(
    generic: Callable[..., Problem], objective: Objective, budget: int, solver: str
) -> None:
    problem = dataclasses.replace(generic(5, 9), budget=budget, objective=objective)
    solution = solve(problem, solver)
    verify(problem, solution)
    taken = [g.loss[j] for g, j in zip(problem.groups, solution.choice, strict=True)]
    assert solution.status == "optimal" and solution.gap == 0.0
    if objective == "sum":
        assert taken == [g.loss.min() for g in problem.groups]
    else:
        assert max(taken) == max(g.loss.min() for g in problem.groups)


@pytest.mark.parametrize("solver", OURS)
@pytest.mark.parametrize("objective", ["sum", "max"])
def test_costs_of_1e15_are_counted_exactly(
    optimum: Optimum, objective: Objective, solver: str
) -> None:
    unit = 10**15
    groups = tuple(
        group(f"g{i}", [i, unit + i, 3 * unit + i], [4.0 + i, 1.5, 0.0]) for i in range(5)
    )
    total = 10 + 7 * unit
    problem = Problem(groups, total, objective)
    solution = solve(problem, solver)
    verify(problem, solution)
    assert solution.cost == total
    one_less = problem.with_budget(total - 1)
    assert solve(one_less, solver).cost < total
    assert solve(one_less, solver).bound <= optimum(one_less) <= solve(one_less, solver).loss


@pytest.mark.parametrize("solver", OURS)
@pytest.mark.parametrize("objective", ["sum", "max"])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_groups_does_not_change_the_choice(
    generic: Callable[..., Problem], objective: Objective, seed: int, solver: str
) -> None:
    # Without ties: between equally good edges greedy takes the first group's.
    problem = dataclasses.replace(generic(12, 6, seed=seed), objective=objective)
    order = np.random.default_rng(seed).permutation(12)
    shuffled = dataclasses.replace(problem, groups=tuple(problem.groups[i] for i in order))
    one, two = solve(problem, solver), solve(shuffled, solver)
    assert (one.loss, one.cost) == (two.loss, two.cost)
    assert [one.choice[i] for i in order] == list(two.choice)


@pytest.mark.parametrize("solver", OURS)
@pytest.mark.parametrize("objective", ["sum", "max"])
def test_the_same_problem_gives_the_same_solution_and_stays_as_it_was(
    generic: Callable[..., Problem], objective: Objective, solver: str
) -> None:
    problem = dataclasses.replace(generic(20, 10), objective=objective)
    before = problem.digest()
    first = solve(problem, solver)
    assert solve(problem, solver) == first
    assert solve(dataclasses.replace(generic(20, 10), objective=objective), solver) == first
    assert problem.digest() == before


def test_solvers_leave_prepared_tables_as_they_were(layers: Callable[..., Problem]) -> None:
    problem = layers([(24, 36), (36, 24), (48, 48)] * 3, 0.5)
    table, hulls = problem.table, problem.hulls
    arrays = [table.start, table.cost, table.loss, hulls.start, hulls.vertex, hulls.slope]
    before = [array.copy() for array in arrays]
    for solver in OURS:
        for share in (0.3, 0.6):
            solve(problem.with_budget(int(share * problem.budget)), solver)
    for array, was in zip(arrays, before, strict=True):
        assert np.array_equal(array, was)


def test_a_time_limit_is_passed_on_unless_the_bound_proves_the_choice() -> None:
    problem = Problem((group("a", [0, 3], [1.0, 0.0]), group("b", [0, 4], [2.0, 0.0])), 5)
    assert certify(problem, (0, 1), "s", timed_out=True).status == "time_limit"
    rich = problem.with_budget(7)
    assert certify(rich, (1, 1), "s", timed_out=True).status == "optimal"
