"""The conformance kit finds solvers that were broken on purpose, and every check can fail."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pytest

from rankopt_solvers import InfeasibleError, Problem, Solution, certify
from rankopt_solvers.greedy import solve_greedy
from rankopt_solvers.testing import CHECKS, ConformanceError, conduct, run_check

Solver = Callable[..., Solution]
BROKEN: list[tuple[str, Solver]] = []


def fails(*checks: str) -> Callable[[Solver], Solver]:
    def register(solver: Solver) -> Solver:
        BROKEN.extend((check, solver) for check in checks)
        return solver

    return register


def claimed(problem: Problem, choice: list[int], **claims: object) -> Solution:
    """A solution that nobody has checked, with the bound that is always true."""
    taken = list(zip(problem.groups, choice, strict=True))
    solution = Solution(
        choice=tuple(choice),
        cost=sum(int(g.cost[j]) for g, j in taken),
        loss=float(np.sum([g.loss[j] for g, j in taken])),
        bound=float(np.sum([g.loss.min() for g in problem.groups])),
        multiplier=0.0,
        status="feasible",
        solver="broken",
    )
    return dataclasses.replace(solution, **claims)


def climb(problem: Problem, count: Callable[[list[int]], int], tolerance: float) -> list[int]:
    """The option that saves most, again and again, while ``count`` finds the costs affordable."""
    choice = [int(np.lexsort((g.loss, g.cost))[0]) for g in problem.groups]
    while True:
        best = (tolerance, -1, -1)
        for i, group in enumerate(problem.groups):
            for j in range(group.cost.size):
                costs = [int(g.cost[k]) for g, k in zip(problem.groups, choice, strict=True)]
                costs[i] = int(group.cost[j])
                saved = float(group.loss[choice[i]] - group.loss[j])
                if saved > best[0] and count(costs) <= problem.budget:
                    best = (saved, i, j)
        if best[1] < 0:
            return choice
        choice[best[1]] = best[2]


@pytest.mark.parametrize(
    "check",
    sorted(set(CHECKS) - {"check_million_options", "check_time_limit", "check_should_stop"}),
)
def test_the_climber_that_some_are_made_of_is_sound(check: str) -> None:
    def climber(problem: Problem) -> Solution:
        if problem.side_budgets:
            return solve_greedy(problem)  # refuses
        problem.require_feasible()
        return certify(problem, climb(problem, sum, 0.0), "climber")

    run_check(check, climber)


@fails("check_choice_within_budget", "check_rank_multiples")
def over_budget(problem: Problem) -> Solution:
    problem.require_feasible()
    return solve_greedy(problem.with_budget(problem.budget + problem.budget // 10))


@fails("check_bound", "check_shared_choices")
def bound_too_high(problem: Problem) -> Solution:
    found = solve_greedy(problem)
    return dataclasses.replace(found, bound=found.loss)


@fails("check_verify")
def bound_half_way(problem: Problem) -> Solution:
    found = solve_greedy(problem)
    return dataclasses.replace(found, bound=(found.loss + found.bound) / 2)


@fails("check_jump_to_dense", "check_concave_costs")
def bound_that_believes_in_convexity(problem: Problem) -> Solution:
    found = solve_greedy(problem)
    left, slope = problem.budget - found.cost, 0.0
    for group, j in zip(problem.groups, found.choice, strict=True):
        if j + 1 < group.cost.size and group.cost[j + 1] > group.cost[j]:
            saved, extra = group.loss[j] - group.loss[j + 1], group.cost[j + 1] - group.cost[j]
            slope = max(slope, float(saved / extra))
    return dataclasses.replace(found, bound=max(found.bound, found.loss - slope * left))


@fails("check_optimal")
def claims_optimal(problem: Problem) -> Solution:
    found = solve_greedy(problem)
    return dataclasses.replace(found, bound=found.loss, status="optimal")


@fails("check_cost_and_loss")
def claims_the_whole_budget(problem: Problem) -> Solution:
    return dataclasses.replace(solve_greedy(problem), cost=problem.budget)


@fails("check_cost_and_loss", "check_wide_losses")
def sums_in_float32(problem: Problem) -> Solution:
    found = solve_greedy(problem)
    losses = [g.loss[j] for g, j in zip(problem.groups, found.choice, strict=True)]
    return dataclasses.replace(found, loss=float(np.sum(losses, dtype=np.float32)), bound=0.0)


@fails("check_costs_beyond_int32")
def counts_in_int32(problem: Problem) -> Solution:
    problem.require_feasible()
    wrapped = lambda costs: int(np.array(costs).astype(np.int32).sum(dtype=np.int32))  # noqa: E731
    return claimed(problem, climb(problem, wrapped, 0.0))


@fails("check_large_costs")
def counts_in_float64(problem: Problem) -> Solution:
    problem.require_feasible()
    # What a solver sees that hands costs to a linear program, with its usual tolerance.
    rounded = lambda costs: int(np.sum(costs, dtype=np.float64) * (1 - 1e-15))  # noqa: E731
    return claimed(problem, climb(problem, rounded, 0.0))


@fails("check_loss_scales")
def stops_at_an_absolute_tolerance(problem: Problem) -> Solution:
    problem.require_feasible()
    return certify(problem, climb(problem, sum, 1e-9), "broken")


@fails("check_huge_budget")
def budget_in_int64(problem: Problem) -> Solution:
    return solve_greedy(problem.with_budget(int(np.int64(problem.budget))))


@fails("check_nan_refused")
def takes_numpys_argmin(problem: Problem) -> Solution:
    # argmin finds NaN smaller than any number.
    problem.require_feasible()
    choice, left = [], problem.budget - problem.smallest_cost
    for group in problem.groups:
        fits = np.flatnonzero(group.cost - group.cost.min() <= left)
        choice.append(int(fits[np.argmin(group.loss[fits])]))
        left -= int(group.cost[choice[-1]] - group.cost.min())
    losses = [float(g.loss[j]) for g, j in zip(problem.groups, choice, strict=True)]
    return claimed(problem, choice, loss=float(np.nansum(losses)), bound=0.0)


@fails("check_deterministic")
def unseeded(problem: Problem) -> Solution:
    problem.require_feasible()
    order = np.random.default_rng().permutation(len(problem.groups))
    choice, left = [0] * order.size, problem.budget - problem.smallest_cost
    for i in order.tolist():
        group = problem.groups[i]
        fits = np.flatnonzero(group.cost - group.cost.min() <= left)
        choice[i] = int(fits[np.argmin(group.loss[fits])])
        left -= int(group.cost[choice[i]] - group.cost.min())
    return certify(problem, choice, "broken")


@fails("check_random_state_untouched")
def seeds_the_callers_generator(problem: Problem) -> Solution:
    np.random.seed(0)  # noqa: NPY002
    return solve_greedy(problem)


@fails("check_inputs_untouched")
def sorts_in_place(problem: Problem) -> Solution:
    found = solve_greedy(problem)
    for group in problem.groups:
        order = np.argsort(group.loss)
        for name in ("cost", "loss"):
            object.__setattr__(group, name, getattr(group, name)[order])
    return found


@fails("check_inputs_untouched")
def reorders_the_groups(problem: Problem) -> Solution:
    found = solve_greedy(problem)
    object.__setattr__(problem, "groups", problem.groups[::-1])
    return found


@fails("check_side_budgets")
def ignores_the_side_budget(problem: Problem) -> Solution:
    return solve_greedy(dataclasses.replace(problem, side_budgets=()))


@fails("check_rank_multiples")
def rounds_afterwards(problem: Problem) -> Solution:
    found = solve_greedy(problem)
    return claimed(problem, [(j + 1) // 2 * 2 for j in found.choice])


@fails("check_infeasible")
def takes_the_cheapest_whatever_the_budget(problem: Problem) -> Solution:
    return solve_greedy(problem.with_budget(max(problem.budget, problem.smallest_cost)))


@fails("check_infeasible")
def blames_a_wrong_budget(problem: Problem) -> Solution:
    if problem.smallest_cost > problem.budget:
        raise InfeasibleError(problem.budget, problem.budget + 2, ())
    return solve_greedy(problem)


@fails("check_unordered_options", "check_smallest_budget", "check_ties_and_duplicates")
def takes_options_for_sorted(problem: Problem) -> Solution:
    """Believes that the first option is the cheapest and each next one loses less."""
    choice = [0] * len(problem.groups)
    left = problem.budget - problem.cost_of(choice)
    for i, group in enumerate(problem.groups):
        while choice[i] + 1 < group.cost.size:
            extra = int(group.cost[choice[i] + 1] - group.cost[choice[i]])
            if extra > left:
                break
            choice[i], left = choice[i] + 1, left - extra
    return claimed(problem, choice)


@fails("check_zero_losses")
def normalises_each_group(problem: Problem) -> Solution:
    if min(float(group.loss.max()) for group in problem.groups) == 0.0:
        raise ZeroDivisionError("float division by zero")
    return solve_greedy(problem)


@fails("check_zero_costs")
def divides_by_cost(problem: Problem) -> Solution:
    problem.require_feasible()
    ratios = [float(g.loss.max()) / int(g.cost.max()) for g in problem.groups]
    return dataclasses.replace(solve_greedy(problem), stats={"ratios": ratios})


@fails("check_single_options")
def needs_a_second_option(problem: Problem) -> Solution:
    problem.require_feasible()
    steps = [float(np.diff(np.sort(group.loss)).max()) for group in problem.groups]
    return dataclasses.replace(solve_greedy(problem), stats={"steps": steps})


@fails("check_one_group")
def stops_where_the_relaxation_does(problem: Problem) -> Solution:
    problem.require_feasible()
    choice: list[int] = []
    for lam in np.geomspace(1e-6, 1e6, 200):
        choice = [int(np.argmin(g.loss + lam * g.cost)) for g in problem.groups]
        if problem.cost_of(choice) <= problem.budget:
            break
    return certify(problem, choice, "broken")


CHOICES: dict[tuple[int, int], tuple[int, ...]] = {}


@fails("check_group_order")
def caches_by_size(problem: Problem) -> Solution:
    problem.require_feasible()
    key = (len(problem.groups), problem.budget)
    choice = CHOICES.setdefault(key, solve_greedy(problem).choice)
    return claimed(problem, list(choice))


BOUNDS: dict[bytes, float] = {}


@fails("check_more_budget")
def never_lowers_its_bound(problem: Problem) -> Solution:
    found = solve_greedy(problem)
    key = b"".join(group.loss.tobytes() for group in problem.groups)
    BOUNDS[key] = max(BOUNDS.get(key, 0.0), found.bound)
    return dataclasses.replace(found, bound=BOUNDS[key])


@fails("check_solution_fields")
def chooses_numpy_integers(problem: Problem) -> Solution:
    found = solve_greedy(problem)
    return dataclasses.replace(found, choice=tuple(np.array(found.choice)))


@fails("check_unknown_option_refused")
def swallows_options(problem: Problem, **_: object) -> Solution:
    return solve_greedy(problem)


@fails("check_picklable")
def keeps_a_function(problem: Problem) -> Solution:
    return dataclasses.replace(solve_greedy(problem), stats={"loss": lambda: 0.0})


SCRATCH: list[int] = []


@fails("check_threads")
def works_in_a_global_list(problem: Problem) -> Solution:
    SCRATCH.clear()
    for j in solve_greedy(problem).choice:
        SCRATCH.append(j)
        time.sleep(0.001)
    return certify(problem, SCRATCH, "broken")


@fails("check_time_limit", "check_million_options")
def sleeps(problem: Problem, *, time_limit: float = 60.0) -> Solution:
    if len(problem.groups) > 100:
        time.sleep(1.5)
    return solve_greedy(problem)


@fails("check_should_stop")
def never_asks(problem: Problem, *, should_stop: Callable[[], bool] | None = None) -> Solution:
    return solve_greedy(problem)


@pytest.mark.parametrize(
    ("check", "broken"), BROKEN, ids=[f"{solver.__name__}-{check}" for check, solver in BROKEN]
)
def test_a_broken_solver_is_found(
    check: str, broken: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduct, "GRACE", 1.0)
    monkeypatch.setattr(conduct, "MINUTE", 1.0 if broken is sleeps else 60.0)
    with pytest.raises(ConformanceError, match=f"{broken.__name__}: {check}"):
        run_check(check, broken)


def test_every_check_can_fail() -> None:
    assert {check for check, _ in BROKEN} == set(CHECKS)
