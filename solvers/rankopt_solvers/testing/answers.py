"""Promises about the answer, one function each: the docstring is the promise.

Every demand here holds for heuristics too: a solver may be far from the optimum, but it must not
say otherwise. Two runs are compared only through what both claim: with more budget, or with the
groups in another order, the *bound* of one run may not exceed the *loss* of the other.
"""

import dataclasses
import math

import numpy as np

from rankopt_solvers.problem import Group, InfeasibleError, Problem, ProblemError
from rankopt_solvers.registry import Solver
from rankopt_solvers.testing.claims import (
    bounded,
    each,
    fields,
    optimal_if_claimed,
    recounted,
    require,
    solved,
    sound,
    within,
)
from rankopt_solvers.testing.instances import RELATIVE, optimum, random_problem, two_budgets
from rankopt_solvers.verify import verify

SCALES = (1e-12, 1e-6, 1.0, 1e6, 1e12)


def _range(problem: Problem) -> tuple[int, int]:
    """The cost of the cheapest choice and of the dearest."""
    costs = [group.cost for group in problem.groups]
    return sum(int(cost.min()) for cost in costs), sum(int(cost.max()) for cost in costs)


def check_solution_fields(solver: Solver) -> None:
    """A Solution: ints chosen, finite numbers, a gap >= 0, a known status, a solver's name."""
    each(solver, "falling", lambda s, p: fields(p, s(p)))


def check_choice_within_budget(solver: Solver) -> None:
    """One existing option of every group, together within the budget."""
    each(solver, "falling", lambda s, p: within(p, s(p)))


def check_cost_and_loss(solver: Solver) -> None:
    """The cost and the loss in the solution are those of the choice."""
    each(solver, "falling", lambda s, p: recounted(p, s(p)))


def check_bound(solver: Solver) -> None:
    """The bound is no more than the optimum, the loss no less."""
    each(solver, "falling", lambda s, p: bounded(p, s(p)))


def check_optimal(solver: Solver) -> None:
    """What is called optimal is."""
    each(solver, "falling", lambda s, p: optimal_if_claimed(p, s(p)))


def check_verify(solver: Solver) -> None:
    """``verify`` finds every claim proven by the solution itself."""
    each(solver, "falling", lambda s, p: verify(p, s(p)))


def check_infeasible(solver: Solver) -> None:
    """A budget below the cheapest choice raises InfeasibleError, which names the least budget."""
    for family in ("falling", "large"):
        problem = random_problem(family, 0)
        least, _ = _range(problem)
        try:
            found = solver(dataclasses.replace(problem, budget=least - 1))
        except InfeasibleError as error:
            named = error.smallest
            require(named == least, f"the error says {named:,}, {least:,} is needed")
        else:
            raise AssertionError(f"{least:,} is needed, {least - 1:,} was given: {found}")


def check_smallest_budget(solver: Solver) -> None:
    """With just enough for the cheapest choice, that is the answer, and the best of its equals."""

    def cheapest(solver: Solver, problem: Problem) -> None:
        tight = dataclasses.replace(problem, budget=_range(problem)[0])
        found, best = sound(solver, tight), optimum(tight)
        require(math.isclose(found.loss, best, rel_tol=RELATIVE), f"{found.loss!r}, not {best!r}")

    for family in ("falling", "ties", "beyond_int32"):
        each(solver, family, cheapest)


def check_huge_budget(solver: Solver) -> None:
    """When everything is affordable, every group loses its least."""
    for budget in (10**9, 10**18, 10**30):
        problem = dataclasses.replace(random_problem("unordered", 2), budget=budget)
        found = solved(solver, problem)
        least = [float(group.loss.min()) for group in problem.groups]
        taken = [float(g.loss[j]) for g, j in zip(problem.groups, found.choice, strict=True)]
        require(taken == least, f"budget {budget:,}: losses {taken}, possible {least}")


def check_single_options(solver: Solver) -> None:
    """Groups without alternatives are no obstacle."""
    each(solver, "single", sound)


def check_one_group(solver: Solver) -> None:
    """Of a single group the best option that fits is taken."""

    def best_taken(solver: Solver, problem: Problem) -> None:
        found, best = sound(solver, problem), optimum(problem)
        require(found.loss == best, f"loses {found.loss!r}, not {best!r}")

    each(solver, "one_group", best_taken)


def check_ties_and_duplicates(solver: Solver) -> None:
    """Equal options do no harm, and none is taken that another beats at no more cost."""

    def undominated(solver: Solver, problem: Problem) -> None:
        for group, j in zip(problem.groups, sound(solver, problem).choice, strict=True):
            beaten = (group.cost <= group.cost[j]) & (group.loss < group.loss[j])
            require(not beaten.any(), f"{group.name}: option {j} is beaten by {beaten.argmax()}")

    each(solver, "ties", undominated)


def check_zero_losses(solver: Solver) -> None:
    """Groups that lose nothing, even all of them, divide nothing by zero."""
    each(solver, "zero_losses", sound)


def check_zero_costs(solver: Solver) -> None:
    """Groups whose options cost nothing lose their least."""

    def least(solver: Solver, problem: Problem) -> None:
        for group, j in zip(problem.groups, sound(solver, problem).choice, strict=True):
            better = not group.cost.any() and group.loss.min() < group.loss[j]
            require(not better, f"{group.name}: option {group.loss.argmin()} is free and better")

    each(solver, "zero_costs", least)


def check_costs_beyond_int32(solver: Solver) -> None:
    """Costs that add up to more than 2^31 do not wrap."""
    each(solver, "beyond_int32", sound)


def check_large_costs(solver: Solver) -> None:
    """Costs that add up to more than 2^53 are counted to the last unit."""

    def to_the_unit(solver: Solver, problem: Problem) -> None:
        most = _range(problem)[1]
        for budget in (problem.budget, most, most - 1):
            sound(solver, dataclasses.replace(problem, budget=budget))

    each(solver, "large", to_the_unit)


def check_wide_losses(solver: Solver) -> None:
    """Losses from 1e-12 to 1e12 in one problem."""
    each(solver, "wide", sound)


def check_loss_scales(solver: Solver) -> None:
    """The unit of the loss, from 1e-12 to 1e12, changes neither claims nor quality."""

    def any_unit(solver: Solver, problem: Problem) -> None:
        plain = solved(solver, problem).loss
        for scale in SCALES:
            groups = tuple(Group(g.name, g.cost, g.loss * scale) for g in problem.groups)
            loss = solved(solver, dataclasses.replace(problem, groups=groups)).loss / scale
            close = math.isclose(loss, plain, rel_tol=1e-9)
            require(close, f"loses {plain!r}, but {loss!r} when losses are times {scale:g}")

    each(solver, "generic", any_unit)


def check_unordered_options(solver: Solver) -> None:
    """Options in any order, and losses that rise with the cost."""
    each(solver, "unordered", sound)


def check_jump_to_dense(solver: Solver) -> None:
    """Curves that end in a jump."""
    each(solver, "dense_jump", sound)


def check_shared_choices(solver: Solver) -> None:
    """Groups summed by ``shared_choice``, with several dents in their curves."""
    each(solver, "shared", sound)


def check_rank_multiples(solver: Solver) -> None:
    """Options thinned to multiples of 16: the choice counts the options there are."""
    each(solver, "rank_multiples", sound)


def check_concave_costs(solver: Solver) -> None:
    """Costs that are concave in the rank, with options ever closer towards the dearest."""
    each(solver, "concave", sound)


def check_group_order(solver: Solver) -> None:
    """The order of the groups changes no claim: no bound above a loss seen in another order."""

    def any_order(solver: Solver, problem: Problem) -> None:
        groups = tuple(np.random.default_rng(0).permutation(np.array(problem.groups, object)))
        one = solved(solver, problem)
        two = solved(solver, dataclasses.replace(problem, groups=groups))
        for a, b in ((one, two), (two, one)):
            fits = a.bound <= b.loss * (1 + RELATIVE)
            require(fits, f"bound {a.bound!r}, but {b.loss!r} in another order")

    each(solver, "generic", any_order)


def check_more_budget(solver: Solver) -> None:
    """More budget: no bound above a loss that less budget allowed."""

    def rising(solver: Solver, problem: Problem) -> None:
        lowest = math.inf
        for budget in np.linspace(*_range(problem), 8).astype(int).tolist():
            found = solved(solver, dataclasses.replace(problem, budget=budget))
            fits = found.bound <= lowest * (1 + RELATIVE)
            require(fits, f"bound {found.bound!r} at {budget:,}; less budget allowed {lowest!r}")
            lowest = min(lowest, found.loss)

    each(solver, "dense_jump", rising)


def check_side_budgets(solver: Solver) -> None:
    """A second budget is met, or refused with ProblemError; never ignored."""

    def met_or_refused(solver: Solver, problem: Problem) -> None:
        best = optimum(problem)
        try:
            found = solver(problem)
        except ProblemError:
            return
        except InfeasibleError:
            require(best == math.inf, f"called infeasible, but {best!r} can be had")
            return
        require(best < math.inf, f"no choice meets both budgets; returned {found}")
        sound(solver, problem)

    each(solver, "rank_multiples", met_or_refused, two_budgets)


def check_nan_refused(solver: Solver) -> None:
    """A NaN that got past Group is refused, or at least neither chosen nor claimed."""
    for seed in range(6):
        groups = random_problem("falling", seed).groups
        loss = groups[-1].loss.copy()
        loss[(0, loss.size // 2, -1)[seed % 3]] = np.nan
        # Group would refuse it; an array changed after the check, or a look-alike, would not.
        object.__setattr__(groups[-1], "loss", loss)
        problem = Problem(groups, sum(int(group.cost.max()) for group in groups) - 1)
        try:
            found = solver(problem)
        except Exception:
            continue
        fields(problem, found)
        require(math.isfinite(problem.loss_of(found.choice)), f"the NaN was chosen, seed {seed}")
