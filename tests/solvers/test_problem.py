"""What a problem accepts, what it refuses and how it says so; what its variants share."""

import dataclasses
import pickle
from collections.abc import Callable

import numpy as np
import pytest

from rankopt_solvers import (
    Group,
    InfeasibleError,
    Problem,
    ProblemError,
    SideBudget,
    SolutionError,
    UnknownSolverError,
    solve,
    verify,
)
from rankopt_solvers.problem import Objective


def group(name: str, cost: list[int], loss: list[float]) -> Group:
    return Group(name, np.array(cost), np.array(loss))


@pytest.mark.parametrize("budget", [True, np.True_, 1.0, "10", None])
def test_a_budget_that_is_not_an_integer_is_refused(budget: object) -> None:
    with pytest.raises(ProblemError, match="budget"):
        Problem((group("a", [1], [0.0]),), budget)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="budget"):
        Problem((group("a", [1], [0.0]),), 1).with_budget(budget)  # type: ignore[arg-type]


def test_a_numpy_integer_is_a_budget() -> None:
    assert type(Problem((group("a", [1], [0.0]),), np.int64(3)).budget) is int  # type: ignore[arg-type]


def test_a_repeated_name_is_refused_and_named() -> None:
    groups = tuple(group(name, [1], [0.0]) for name in ("once", "twice", "twice"))
    with pytest.raises(ProblemError, match="twice") as caught:
        Problem(groups, 5)
    assert "once" not in str(caught.value)


def test_no_groups_and_unknown_objectives_are_refused() -> None:
    with pytest.raises(ProblemError, match="at least one group"):
        Problem((), 5)
    with pytest.raises(ProblemError, match="'mean'"):
        Problem((group("a", [1], [0.0]),), 5, "mean")  # type: ignore[arg-type]


def test_totals_that_could_overflow_are_refused() -> None:
    with pytest.raises(ProblemError, match="larger unit"):
        Problem((group("a", [2**61], [0.0]), group("b", [2**61 + 1], [0.0])), 2**62)
    assert Problem((group("a", [2**61], [0.0]), group("b", [2**61], [0.0])), 2**62).budget == 2**62


@pytest.mark.parametrize("objective", ["sum", "max"])
@pytest.mark.parametrize("solver", ["exact", "greedy", "density", "knapsack"])
def test_infeasible_says_what_would_fit_and_who_costs_most(
    objective: Objective, solver: str
) -> None:
    sizes = {"small": 1, "huge": 100, "tiny": 0, "big": 10}
    groups = tuple(group(name, [size + 5, size], [0.0, 1.0]) for name, size in sizes.items())
    problem = Problem(groups, 110, objective)
    with pytest.raises(InfeasibleError, match="budget of 110: the cheapest costs 111") as caught:
        solve(problem, solver)
    error = caught.value
    assert (error.budget, error.smallest) == (110, 111)
    assert error.largest_groups == ("huge", "big", "small")
    assert all(name in str(error) for name in error.largest_groups)
    assert solve(problem.with_budget(error.smallest)).cost == 111


def test_another_budget_shares_what_was_prepared(generic: Callable[..., Problem]) -> None:
    problem = generic(5, 9)
    fresh = problem.with_budget(problem.budget + 1)
    assert fresh.budget == problem.budget + 1 and fresh.groups is problem.groups
    table, hulls = problem.table, problem.hulls
    other = problem.with_budget(problem.budget // 2).with_budget(problem.budget // 3)
    assert other.table is table and other.hulls is hulls
    assert other.smallest_cost == problem.smallest_cost
    assert problem.budget != other.budget == problem.budget // 3


def test_another_budget_gives_the_same_solution_as_a_new_problem(
    generic: Callable[..., Problem],
) -> None:
    problem = generic(8, 12)
    solve(problem)
    for share in (0.1, 0.5, 0.9):
        new = generic(8, 12, share)
        assert solve(problem.with_budget(new.budget)) == solve(new)


def test_with_budget_keeps_objective_and_side_budgets(generic: Callable[..., Problem]) -> None:
    made = generic(2, 3)
    side = SideBudget("s", tuple(g.cost for g in made.groups), 10**9)
    problem = dataclasses.replace(made, objective="max", side_budgets=(side,))
    other = problem.with_budget(7)
    assert (other.objective, other.side_budgets, other.budget) == ("max", (side,), 7)


def test_restricted_takes_the_same_options_of_everything() -> None:
    a, b = group("a", [0, 4, 9], [3.0, 1.0, 0.0]), group("b", [1, 2], [2.0, 0.0])
    side = SideBudget("s", (np.array([7, 8, 9]), np.array([5, 6])), 14)
    problem = Problem((a, b), 10, "max", (side,))
    assert problem.table.rows == 2
    fewer = problem.restricted([np.array([2, 0]), np.array([1])])
    assert [g.cost.tolist() for g in fewer.groups] == [[9, 0], [2]]
    assert [g.loss.tolist() for g in fewer.groups] == [[0.0, 3.0], [0.0]]
    assert [c.tolist() for c in fewer.side_budgets[0].costs] == [[9, 7], [6]]
    assert (fewer.budget, fewer.objective, fewer.side_budgets[0].limit) == (10, "max", 14)
    assert fewer.smallest_cost == 2 and fewer.table.cost.tolist() == [0, 9, 2]
    with pytest.raises(ProblemError, match="'b'"):
        problem.restricted([np.array([0]), np.array([], dtype=np.int64)])


# Identity


def test_the_digest_tells_problems_apart(generic: Callable[..., Problem]) -> None:
    problem = generic(3, 4)
    first, *rest = problem.groups
    costs = tuple(g.cost for g in problem.groups)

    def side(name: str = "s", limit: int = 10**7, extra: int = 0) -> tuple[SideBudget, ...]:
        return (SideBudget(name, (costs[0] + extra, *costs[1:]), limit),)

    others = [
        dataclasses.replace(problem, budget=problem.budget + 1),
        dataclasses.replace(problem, objective="max"),
        dataclasses.replace(problem, groups=(Group("other", first.cost, first.loss), *rest)),
        dataclasses.replace(problem, groups=(Group("g0", first.cost + 1, first.loss), *rest)),
        dataclasses.replace(problem, groups=(Group("g0", first.cost, first.loss / 2), *rest)),
        dataclasses.replace(problem, groups=(*rest, first)),
        dataclasses.replace(problem, side_budgets=side()),
        dataclasses.replace(problem, side_budgets=side(name="t")),
        dataclasses.replace(problem, side_budgets=side(limit=10**7 + 1)),
        dataclasses.replace(problem, side_budgets=side(extra=1)),
        dataclasses.replace(problem, side_budgets=(*side(), *side("t"))),
    ]
    assert generic(3, 4).digest() == problem.digest()
    assert problem.with_budget(problem.budget).digest() == problem.digest()
    assert len({problem.digest(), *(other.digest() for other in others)}) == 1 + len(others)


def test_problems_and_solutions_survive_pickling(generic: Callable[..., Problem]) -> None:
    made = generic(8, 8)
    side = SideBudget("s", tuple(g.cost for g in made.groups), 10**9)
    for problem in (made, dataclasses.replace(made, side_budgets=(side,))):
        again = pickle.loads(pickle.dumps(problem))
        assert again.digest() == problem.digest()
    solution = solve(made)
    again = pickle.loads(pickle.dumps(made))
    assert solve(again) == solution == pickle.loads(pickle.dumps(solution))
    verify(again, pickle.loads(pickle.dumps(solution)))


@pytest.mark.parametrize(
    "error",
    [
        InfeasibleError(3, 5, ("a", "b")),
        InfeasibleError(3, 5, ("a",), "latency"),
        ProblemError("no groups"),
        SolutionError("cost is 5"),
        UnknownSolverError("unknown solver"),
    ],
)
def test_errors_survive_pickling(error: ValueError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert again.__dict__ == error.__dict__
