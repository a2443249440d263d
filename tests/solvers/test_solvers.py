"""Promises of solve(): feasible, bounded, exact where it says so, repeatable."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt_solvers import (
    SOLVERS,
    Group,
    InfeasibleError,
    Problem,
    Solution,
    SolutionError,
    UnknownSolverError,
    certify,
    solve,
    verify,
)
from rankopt_solvers.problem import Objective

Problems = Callable[..., st.SearchStrategy[Problem]]
Optimum = Callable[[Problem], float]


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


def neighbour_by_neighbour(problem: Problem) -> list[int]:
    """What greedy would be without the hull: the best next option, one at a time."""
    choice = [0] * len(problem.groups)
    while True:
        left = problem.budget - problem.cost_of(choice)
        steps = [
            ((g.loss[j] - g.loss[j + 1]) / (g.cost[j + 1] - g.cost[j]), i)
            for i, (g, j) in enumerate(zip(problem.groups, choice, strict=True))
            if j + 1 < g.cost.size and g.cost[j + 1] - g.cost[j] <= left
        ]
        if not steps:
            return choice
        choice[max(steps)[1]] += 1


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_greedy_sum_is_bounded_by_the_optimum(
    problems: Problems, optimum: Optimum, scale: float, data: st.DataObject
) -> None:
    problem = data.draw(problems(scale=scale))
    solution = solve(problem)
    verify(problem, solution)
    best = optimum(problem)
    assert solution.cost <= problem.budget
    assert solution.bound <= best <= solution.loss
    assert solution.status == "feasible" or solution.loss == best
    assert 0.0 <= solution.gap <= 1.0
    assert not affordable_improvements(problem, solution.choice, np.inf)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_max_is_exact_and_the_rest_of_the_budget_is_spent(
    problems: Problems, optimum: Optimum, data: st.DataObject
) -> None:
    problem = data.draw(problems("max"))
    solution = solve(problem)
    verify(problem, solution)
    best = optimum(problem)
    assert solution.loss == solution.bound == best and solution.status == "optimal"
    chosen = [g.loss[j] for g, j in zip(problem.groups, solution.choice, strict=True)]
    assert max(chosen) == best
    assert not affordable_improvements(problem, solution.choice, best)


def test_the_second_stage_of_max_lowers_the_sum() -> None:
    # "stuck" sets the level at 5 whatever is spent; the other group can still be improved.
    groups = (group("stuck", [1, 100], [5.0, 0.0]), group("free", [0, 2, 9], [5.0, 3.0, 1.0]))
    assert solve(Problem(groups, 10, "max")).choice == (0, 2)


def test_the_jump_to_dense_is_seen_from_far() -> None:
    # From one option to the next "ranks" saves 0.1 per unit, then 18.8; "other" saves 1 all along.
    ranks = group("ranks", [0, 4, 8, 10], [38.4, 38.0, 37.6, 0.0])
    other = group("other", [0, 5, 10], [10.0, 5.0, 0.0])
    problem = Problem((ranks, other), 10)
    solution = solve(problem)
    verify(problem, solution)
    assert solution.choice == (3, 0) and solution.loss == 10.0
    assert problem.loss_of(neighbour_by_neighbour(problem)) > 3 * solution.loss


@pytest.mark.parametrize(("saved_by_small", "choice"), [(1.5, (0, 1)), (15.0, (1, 0))])
def test_the_edge_at_which_the_budget_breaks_is_weighed(
    saved_by_small: float, choice: tuple[int, int]
) -> None:
    # "small" saves more per unit, but once it is taken the long edge no longer fits.
    small = group("small", [0, 1], [saved_by_small, 0.0])
    dense = group("dense", [0, 10], [12.0, 0.0])
    assert solve(Problem((small, dense), 10)).choice == choice


@pytest.mark.parametrize("objective", ["sum", "max"])
def test_the_smallest_budget_is_met_exactly(
    objective: Objective, generic: Callable[..., Problem]
) -> None:
    problem = dataclasses.replace(generic(6, 8, 0.0), objective=objective)
    solution = solve(problem)
    verify(problem, solution)
    assert solution.cost == problem.budget == problem.smallest_cost
    with pytest.raises(InfeasibleError):
        solve(dataclasses.replace(problem, budget=problem.budget - 1))


def test_among_equally_cheap_options_the_best_is_taken() -> None:
    problem = Problem((group("a", [2, 2, 2], [3.0, 1.0, 2.0]), group("b", [0, 1], [1.0, 0.0])), 2)
    assert solve(problem).choice == (1, 0)


@pytest.mark.parametrize("objective", ["sum", "max"])
@pytest.mark.parametrize("budget", [10**9, 10**30])
def test_a_huge_budget_takes_every_smallest_loss(
    generic: Callable[..., Problem], objective: Objective, budget: int
) -> None:
    problem = dataclasses.replace(generic(5, 9), budget=budget, objective=objective)
    solution = solve(problem)
    verify(problem, solution)
    taken = [g.loss[j] for g, j in zip(problem.groups, solution.choice, strict=True)]
    assert solution.status == "optimal" and solution.gap == 0.0
    if objective == "sum":
        assert taken == [g.loss.min() for g in problem.groups]
    else:
        assert max(taken) == max(g.loss.min() for g in problem.groups)


@pytest.mark.parametrize("objective", ["sum", "max"])
def test_costs_of_1e15_are_counted_exactly(optimum: Optimum, objective: Objective) -> None:
    unit = 10**15
    groups = tuple(
        group(f"g{i}", [i, unit + i, 3 * unit + i], [4.0 + i, 1.5, 0.0]) for i in range(5)
    )
    total = 10 + 7 * unit
    problem = Problem(groups, total, objective)
    solution = solve(problem)
    verify(problem, solution)
    assert solution.cost == total
    one_less = dataclasses.replace(problem, budget=total - 1)
    assert solve(one_less).cost < total
    assert solve(one_less).bound <= optimum(one_less) <= solve(one_less).loss


@pytest.mark.parametrize("objective", ["sum", "max"])
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_groups_does_not_change_the_loss(
    generic: Callable[..., Problem], objective: Objective, seed: int
) -> None:
    # Without ties: between equally good edges greedy takes the first group's.
    problem = dataclasses.replace(generic(12, 6, seed=seed), objective=objective)
    order = np.random.default_rng(seed).permutation(12)
    shuffled = dataclasses.replace(problem, groups=tuple(problem.groups[i] for i in order))
    one, two = solve(problem), solve(shuffled)
    assert (one.loss, one.cost) == (two.loss, two.cost)
    assert [one.choice[i] for i in order] == list(two.choice)


@pytest.mark.parametrize("objective", ["sum", "max"])
def test_the_same_problem_gives_the_same_solution_and_stays_as_it_was(
    generic: Callable[..., Problem], objective: Objective
) -> None:
    problem = dataclasses.replace(generic(20, 10), objective=objective)
    before = problem.digest()
    first = solve(problem)
    assert solve(problem) == first
    assert solve(dataclasses.replace(generic(20, 10), objective=objective)) == first
    assert problem.digest() == before


def test_an_unknown_solver_lists_the_known_ones(generic: Callable[..., Problem]) -> None:
    with pytest.raises(UnknownSolverError, match="'gredy'") as caught:
        solve(generic(2, 2), "gredy")
    assert all(name in str(caught.value) for name in SOLVERS)


@pytest.mark.parametrize("objective", ["sum", "max"])
def test_a_third_party_solver_is_called_with_its_options_and_recounted(
    generic: Callable[..., Problem], objective: Objective
) -> None:
    def cheapest(problem: Problem, *, note: str) -> Solution:
        assert problem.objective == "sum"
        choice = [int(g.cost.argmin()) for g in problem.groups]
        honest = certify(problem, choice, "ignored", stats={"note": note})
        return dataclasses.replace(honest, loss=0.0, bound=0.0, cost=0, status="optimal")

    problem = dataclasses.replace(generic(4, 5), objective=objective)
    solution = solve(problem, cheapest, note="hello")
    verify(problem, solution)
    assert solution.solver == "cheapest" and solution.stats == {"note": "hello"}
    assert solution.cost == problem.cost_of(solution.choice) > 0
    assert solution.loss == problem.loss_of(solution.choice) > 0


@pytest.mark.parametrize("objective", ["sum", "max"])
@pytest.mark.parametrize(
    ("answer", "complaint"),
    [((1, 1), "costs 20"), ((2, 0), "no option 2"), ((-1, 0), "no option -1"), ((0,), "1 choices")],
)
def test_a_solver_that_returns_no_valid_choice_is_refused_by_name(
    objective: Objective, answer: tuple[int, ...], complaint: str
) -> None:
    def wishful(problem: Problem) -> Solution:
        return Solution(answer, 0, 0.0, 0.0, 0.0, "optimal", "wishful")

    table = ([0, 10], [1.0, 0.0])
    problem = Problem((group("a", *table), group("b", *table)), 15, objective)
    with pytest.raises(SolutionError, match=f"wishful: .*{complaint}"):
        solve(problem, wishful)


def test_a_solver_is_not_asked_about_an_infeasible_problem() -> None:
    def never(problem: Problem) -> Solution:
        raise AssertionError("called")

    with pytest.raises(InfeasibleError):
        solve(Problem((group("a", [5], [0.0]),), 4), never)


def test_a_time_limit_is_passed_on_unless_the_bound_proves_the_choice() -> None:
    problem = Problem((group("a", [0, 3], [1.0, 0.0]), group("b", [0, 4], [2.0, 0.0])), 5)
    assert certify(problem, (0, 1), "s", timed_out=True).status == "time_limit"
    rich = dataclasses.replace(problem, budget=7)
    assert certify(rich, (1, 1), "s", timed_out=True).status == "optimal"
