"""The knapsack as an integer program through cvxpy and HiGHS, and constraints that ``exact`` lacks.

*When to prefer it.* With one budget and no other constraint ``exact`` is faster and proves what it
finds: on 70 instances of up to 10^5 options (experiments/01_exactness) HiGHS ends within 5 s on 60,
and there ``knapsack`` gives the optimum of ``exact`` at loss scales from 1e-12 to 1e6; on the other
ten (Llama-7B's shapes) it ends up to 2e-5 above. ``exact`` takes at most 0.33 s on all of them.
Without the reduction and the scale HiGHS calls 14 of 62 choices optimal that are not. ``knapsack``
is an independent answer by a general solver, and the solver for

* several budgets (``problem.side_budgets``): see several;
* forced and forbidden options: options that are left out, so ``exact`` solves what is left;
* at most k groups that differ from a given choice (an earlier plan, say): a budget of its own, in
  which the given option costs 0 and every other one 1.

*One budget.* Reduced-cost fixing: with the greedy loss U, the Lagrangian bound D and its multiplier
lam, an option whose reduced loss ``loss + lam*cost - min`` exceeds U - D cannot be in a better
choice and is left out (Dembo & Hammer 1980). The rest goes to HiGHS, scaled (see integer_program).

*Recount.* What HiGHS takes is counted again in integers; if it is missing, over a budget or worse
than the choice that was there before, that one is returned and ``stats["kept_greedy"]`` says so.
The bound and the status are ours: HiGHS's ``optimal``, within its tolerances, proves nothing here.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from rankopt_solvers.exact.branch_and_bound import solve_exact
from rankopt_solvers.greedy import solve_greedy
from rankopt_solvers.knapsack.budgets import (
    Budgets,
    Claim,
    Priced,
    claim,
    normal_form,
    of_table,
    priced,
)
from rankopt_solvers.knapsack.constraints import AtMostChanged, constrained
from rankopt_solvers.knapsack.enumeration import best_of_all
from rankopt_solvers.knapsack.integer_program import require_milp, solve_program
from rankopt_solvers.knapsack.several import (
    bound_of_several,
    program_of,
    relaxed,
    solve_several,
)
from rankopt_solvers.knapsack.single import singles
from rankopt_solvers.problem import Problem, ProblemError, alone
from rankopt_solvers.solution import Case, Proof, Solution, bound_of, certify
from rankopt_solvers.table import EPS


@dataclasses.dataclass(frozen=True)
class _Clock:
    deadline: float
    should_stop: Callable[[], bool] | None

    def remaining(self) -> float:
        return max(self.deadline - time.monotonic(), 1e-3)

    def stopped(self) -> bool:
        if self.should_stop is not None and self.should_stop():
            return True
        return time.monotonic() > self.deadline


def solve_knapsack(
    problem: Problem,
    *,
    time_limit: float = 30.0,
    should_stop: Callable[[], bool] | None = None,
    forced: Mapping[str, int] | None = None,
    forbidden: Mapping[str, Collection[int]] | None = None,
    at_most_changed: tuple[Sequence[int], int] | None = None,
) -> Solution:
    """Solve a sum problem with any number of budgets; with one, never worse than greedy.

    Args:
        problem: a sum problem, with side budgets or without.
        time_limit: seconds. HiGHS looks at it now and then: a call may overrun it.
        should_stop: asked before HiGHS starts, which cannot be interrupted; when it says True, what
            was found without HiGHS is returned.
        forced: for some groups, by name, the option to take.
        forbidden: for some groups, by name, options not to take.
        at_most_changed: a choice, one option index for each group, and the number of groups that
            may take another option.

    Returns:
        ``bound`` holds for the problem as given, without forced, forbidden and at_most_changed;
        with any of them, ``stats`` has a ``constrained_bound`` that takes them into account, and
        the ``constrained_status``. Always in ``stats``: ``columns`` (options that HiGHS saw),
        ``highs_status``, ``kept_greedy``; where HiGHS has one, ``highs_gap``, by its own account,
        relative to what was to be gained.

    Raises:
        InfeasibleError: no choice meets the budgets and constraints, proven without HiGHS.
        NoChoiceFoundError: several budgets, and no choice that meets them was found.
        ProblemError: a constraint names an unknown group or option, or leaves a group no option;
            the objective is not the sum.
        ImportError: cvxpy or highspy is missing; names the extra ``milp``. Of several budgets of
            which one counts it is not needed.
        ValueError: the time limit is not positive.
    """
    if not time_limit > 0 or not math.isfinite(time_limit):
        raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit!r}")
    if problem.objective != "sum":
        raise ProblemError(
            f"knapsack takes the sum objective, got {problem.objective!r}: "
            "rankopt_solvers.solve reduces it to a sum"
        )
    if not problem.side_budgets:
        require_milp()
    clock = _Clock(time.monotonic() + time_limit, should_stop)
    limits = None if at_most_changed is None else AtMostChanged(*at_most_changed)
    problem.require_feasible()
    inner, kept = constrained(problem, forced or {}, forbidden or {}, limits)
    if inner is problem:
        return _one_budget(problem, clock) if not problem.side_budgets else _any(problem, clock)
    found = _any(inner, clock)
    choice = [int(k[j]) for k, j in zip(kept, found.choice, strict=True)]
    least, lam, side_lams = _bound(problem, clock)
    stats = {**found.stats, "constrained_bound": found.bound, "constrained_status": found.status}
    return certify(
        problem,
        choice,
        "knapsack",
        timed_out=found.status == "time_limit",
        stats=stats,
        bound=(least, lam),
        side_multipliers=side_lams,
    )


def _one_budget(problem: Problem, clock: _Clock) -> Solution:
    """Greedy, reduced-cost fixing, HiGHS, recount."""
    greedy = solve_greedy(problem)
    proven = (greedy.bound, greedy.multiplier)
    stats: dict[str, Any] = {"columns": 0, "kept_greedy": True}
    if greedy.status == "optimal":
        stats["highs_status"] = "not needed: greedy reaches the bound"
        return certify(problem, greedy.choice, "knapsack", stats=stats, bound=proven)
    if clock.stopped():
        stats["highs_status"] = "not tried: out of time"
        return certify(
            problem, greedy.choice, "knapsack", timed_out=True, stats=stats, bound=proven
        )
    table = problem.table
    budgets = of_table(table, problem.budget)
    at = priced(budgets, np.array([greedy.multiplier * budgets.unit[0]]))
    gap = greedy.loss - greedy.bound
    kept = np.flatnonzero(at.reduced <= gap * (1 + 1e-9) + 8 * EPS * at.least)
    taken, said = solve_program(program_of(budgets, at, gap, kept), clock.remaining())
    choice = greedy.choice if taken is None else table.options_at(kept[taken])
    better = problem.cost_of(choice) <= problem.budget and problem.loss_of(choice) <= greedy.loss
    stats |= said
    stats["kept_greedy"] = taken is None or not better
    return certify(
        problem,
        choice if better else greedy.choice,
        "knapsack",
        timed_out="limit" in said["highs_status"],
        stats=stats,
        bound=proven,
    )


def _any(problem: Problem, clock: _Clock) -> Solution:
    """Any number of budgets; those that count are solved, by ``exact`` if it is only one."""
    budgets = normal_form(problem)
    if budgets.room.size <= 1:
        return _left_to_exact(problem, budgets, clock)
    require_milp()
    linear = relaxed(problem, budgets, clock.stopped)
    least, lam, side_lams = _best_claim(problem, budgets, linear.at)
    proof: Proof | None = None
    choices = []
    for one in singles(problem, budgets, linear.at, clock.remaining, clock.stopped):
        if one.bound > least:
            least, lam, side_lams = one.bound, one.multipliers[0], one.multipliers[1:]
            proof = one.proof
        choices += [one.choice] if problem.keeps(one.choice) else []
    timed_out, stats = False, {**linear.stats, "columns": 0, "kept_greedy": False}
    stats["highs_status"] = "not needed: one budget and the prices of the others prove the choice"
    choice = min(choices, key=problem.loss_of, default=None)
    if choice is None or problem.loss_of(choice) > least:
        found = solve_several(problem, budgets, linear, clock.stopped, clock.remaining)
        timed_out, stats = found.timed_out, found.stats
        choices.append(tuple((found.position - budgets.start[:-1]).tolist()))
        choice = min(choices, key=problem.loss_of)
        gap = problem.loss_of(choice) - linear.at.bound
        everything, position = False, None
        if not clock.stopped():
            everything, position = best_of_all(budgets, linear.at, gap)
        if everything:
            if position is not None:
                choices.append(tuple((position - budgets.start[:-1]).tolist()))
                choice = min(choices, key=problem.loss_of)
            _, lam, side_lams = claim(problem, budgets, linear.at)
            least, proof = problem.loss_of(choice), Proof(lam, (), budget=None)
    return certify(
        problem,
        choice,
        "knapsack",
        timed_out=timed_out,
        stats=stats,
        bound=(least, lam),
        side_multipliers=side_lams,
        proof=proof,
    )


def _left_to_exact(problem: Problem, budgets: Budgets, clock: _Clock) -> Solution:
    """One budget counts, perhaps a side budget: its costs make an ordinary problem."""
    one, row = dataclasses.replace(problem, side_budgets=()), 0
    if budgets.which and budgets.which[0]:
        row = budgets.which[0]
        one = alone(problem, row)
    found = solve_exact(one, time_limit=clock.remaining(), should_stop=clock.should_stop)
    stats = {
        **found.stats,
        "columns": 0,
        "highs_status": "not needed: one budget counts, exact solved it",
        "kept_greedy": False,
    }
    if problem.side_budgets:
        stats |= {"exact_bound": found.bound, "exact_status": found.status}
    proof, lam = found.proof, found.multiplier
    lams = [0.0] * (1 + len(problem.side_budgets))
    lams[row] = lam
    if row:
        # What its multiplier proves is about the options that its costs leave, too.
        of_row = proof or Proof(lam, (Case(lam),))
        proof = dataclasses.replace(of_row, budget=row)
    return certify(
        problem,
        found.choice,
        "knapsack",
        timed_out=found.status == "time_limit",
        stats=stats,
        bound=(found.bound, lams[0]),
        side_multipliers=tuple(lams[1:]),
        proof=proof,
    )


def _bound(problem: Problem, clock: _Clock) -> Claim:
    """The best bound on the problem as given."""
    if not problem.side_budgets:
        return (*bound_of(problem), ())
    return _best_claim(problem, *bound_of_several(problem, clock.stopped))


def _best_claim(problem: Problem, budgets: Budgets, at: Priced) -> Claim:
    """What the prices prove, or what the budget alone does: that may use that it is a knapsack."""
    alone = (*bound_of(problem), (0.0,) * len(problem.side_budgets))
    return max(claim(problem, budgets, at), alone, key=lambda found: found[0])
