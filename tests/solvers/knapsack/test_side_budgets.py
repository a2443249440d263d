"""Side budgets: what is refused, and who takes them."""

from typing import Any

import numpy as np
import pytest

from rankopt_solvers import Group, InfeasibleError, Problem, ProblemError, SideBudget, solve


def group(name: str, cost: list[int], loss: list[float]) -> Group:
    return Group(name, np.array(cost), np.array(loss))


@pytest.mark.parametrize(
    "costs",
    [
        [[1.5, 2], [1]],
        [[-1, 2], [1]],
        [[np.nan, 2], [1]],
        [["one", "two"], [1]],
        [[2**62, 0], [1]],
        [[], [1]],
        [[[1, 2]], [1]],
    ],
)
def test_malformed_side_costs_are_refused_by_name(costs: list[Any]) -> None:
    groups = (group("a", [0, 1], [1.0, 0.0]), group("b", [0], [0.0]))
    with pytest.raises(ProblemError, match="latency"):
        Problem(
            groups,
            1,
            side_budgets=(SideBudget("latency", tuple(np.array(c) for c in costs), 5),),
        )


@pytest.mark.parametrize("limit", [1.0, True, "5", None])
def test_a_limit_that_is_not_an_integer_is_refused(limit: object) -> None:
    with pytest.raises(ProblemError, match="'latency'"):
        SideBudget("latency", (np.array([1]),), limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(2,), (2, 1, 1), (1, 1), (2, 2), ()])
def test_side_costs_that_do_not_fit_the_options_are_refused(sizes: tuple[int, ...]) -> None:
    groups = (group("a", [0, 1], [1.0, 0.0]), group("b", [0], [0.0]))
    side = SideBudget("latency", tuple(np.arange(n) for n in sizes), 5)
    with pytest.raises(ProblemError, match="'latency'"):
        Problem(groups, 1, side_budgets=(side,))


def test_repeated_side_budgets_are_refused() -> None:
    side = SideBudget("latency", (np.array([1]),), 5)
    with pytest.raises(ProblemError, match=r"side budget names.*latency"):
        Problem((group("a", [1], [0.0]),), 5, side_budgets=(side, side))


def test_side_costs_are_copied_like_others() -> None:
    cost = np.array([1, 2])
    side = SideBudget("s", (cost,), 5)
    cost[0] = 99
    assert side.costs[0].tolist() == [1, 2] and side.cost_of((1,)) == 2
    assert SideBudget("t", side.costs, 5).costs[0] is side.costs[0]


@pytest.mark.parametrize("solver", ["exact", "greedy", "density"])
def test_solvers_of_one_budget_refuse_more_by_name(solver: str) -> None:
    side = SideBudget("latency", (np.array([1, 2]),), 5)
    with pytest.raises(ProblemError, match=f"{solver}.*latency"):
        solve(Problem((group("a", [0, 1], [1.0, 0.0]),), 1, side_budgets=(side,)), solver)


def test_a_side_budget_below_its_cheapest_choice_is_infeasible_by_name() -> None:
    side = SideBudget("latency", (np.array([4, 3]), np.array([7])), 9)
    groups = (group("a", [0, 1], [1.0, 0.0]), group("b", [0], [0.0]))
    problem = Problem(groups, 5, side_budgets=(side,))
    with pytest.raises(InfeasibleError, match="latency of 9: the cheapest costs 10") as caught:
        problem.require_feasible()
    assert (caught.value.budget, caught.value.smallest) == (9, 10)
    assert caught.value.largest_groups == ("b", "a")
