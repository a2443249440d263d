"""Proofs by cases: honest ones are accepted, no tampering makes a false bound acceptable."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rankopt_solvers import Group, Problem, Solution, SolutionError, certify, solve, verify
from rankopt_solvers.solution import Case, Proof

Problems = Callable[..., st.SearchStrategy[Problem]]
Choices = Callable[[Problem], list[tuple[int, ...]]]


def group(name: str, cost: list[int], loss: list[float]) -> Group:
    return Group(name, np.array(cost), np.array(loss))


@pytest.fixture
def coins() -> tuple[Problem, Solution, Solution]:
    """A problem whose multiplier proves little; its optimum of 3.1, and a choice that loses 5."""
    tables = {"a": ([0, 5], [5.0, 0.0]), "b": ([0, 5], [5.5, 0.0]), "c": ([0, 4], [3.1, 0.0])}
    # Nothing costs exactly the budget: what stays unspent is what a negative price would pay for.
    problem = Problem(tuple(group(name, *table) for name, table in tables.items()), 13)
    best = solve(problem)
    assert best.status == "optimal" and best.proof is not None and best.loss == 3.1
    worse = certify(problem, (0, 1, 1), "worse")
    assert worse.loss == 5.0 and worse.bound < 3.1
    return problem, best, worse


def test_without_its_proof_a_bound_is_not_believed(
    coins: tuple[Problem, Solution, Solution],
) -> None:
    problem, best, _ = coins
    verify(problem, best)
    with pytest.raises(SolutionError, match="not proven"):
        verify(problem, dataclasses.replace(best, proof=None))


@pytest.mark.parametrize("at", ["root", "leaf", "both"])
@pytest.mark.parametrize(
    "multiplier", [math.nan, math.inf, -math.inf, -1.0, -1e300, 0.0, 0.5, 1.1, 1e3, 1e300]
)
def test_no_multiplier_of_a_proof_proves_too_much(
    coins: tuple[Problem, Solution, Solution], multiplier: float, at: str
) -> None:
    problem, _, worse = coins
    root = multiplier if at != "leaf" else 1.0
    leaf = multiplier if at != "root" else 1.0
    for cases in (
        (Case(leaf),),
        (Case(0.0, 0, 5, 1, 2), Case(leaf), Case(leaf)),
        (Case(0.0, 2, 4, 1, 2), Case(1.0), Case(leaf)),
    ):
        claim = dataclasses.replace(
            worse, bound=worse.loss, status="optimal", proof=Proof(root, cases)
        )
        with pytest.raises(SolutionError):
            verify(problem, claim)


@pytest.mark.parametrize("leaf", [1e5, 1e8, 1e12, 1e16, 1e20, 1e100, 1e300])
def test_a_price_that_swallows_the_losses_hides_no_choice(leaf: float) -> None:
    # Costs 32 + 58 and 45 + 45 are equal, and so are their prices up to rounding.
    table = [32, 45, 53, 58, 64], [1.1819e-4, 1.4264e-8, 1.691e-9, 3.98e-11, 7.12e-12]
    problem = Problem((group("a", *table), group("b", *table)), 96)
    worse = certify(problem, (4, 0), "worse")
    proof = Proof(1.17e-14, (Case(leaf),))
    claim = dataclasses.replace(worse, bound=worse.loss, status="optimal", proof=proof)
    with pytest.raises(SolutionError):
        verify(problem, claim)


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param((), id="empty"),
        pytest.param((Case(0.0, 0, 5, 1, 2), Case(1.0)), id="a-case-is-missing"),
        pytest.param((Case(0.0, 0, 5, 0, 1), Case(1.0)), id="its-own-case"),
        pytest.param((Case(0.0, 0, 5, -1, 1), Case(1.0)), id="no-such-case"),
        pytest.param((Case(0.0, 3, 5, 1, 2), Case(1.0), Case(1.0)), id="no-such-group"),
        pytest.param((Case(0.0, 7, 5, 1, 2), Case(1.0), Case(1.0)), id="far-group"),
    ],
)
def test_a_malformed_proof_is_refused(
    coins: tuple[Problem, Solution, Solution], cases: tuple[Case, ...]
) -> None:
    problem, best, worse = coins
    for claim in (best, dataclasses.replace(worse, bound=worse.loss, status="optimal")):
        with pytest.raises(SolutionError, match="proof"):
            verify(problem, dataclasses.replace(claim, proof=Proof(1.0, cases)))


@pytest.fixture
def branched(
    layers: Callable[..., Problem], always_branching: None
) -> list[tuple[Problem, Solution]]:
    """Solutions with proofs of many cases, for different layers and for identical ones."""
    found = []
    for seed in range(3):
        kinds = layers([(12, 16), (16, 24), (24, 12), (8, 12), (12, 12)], 1.0, seed, 0.9).groups
        for copies in (1, 3):
            groups = tuple(
                Group(f"{kind.name} {i}", kind.cost, kind.loss)
                for i in range(copies)
                for kind in kinds
            )
            most = sum(int(g.cost.max()) for g in groups)
            for share in (0.6, 0.75):
                problem = Problem(groups, int(share * most))
                solution = solve(problem, "exact", max_nodes=300)
                if solution.proof is not None and len(solution.proof.cases) > 2:
                    found.append((problem, solution))
    assert len(found) >= 4
    assert any(len({g.loss.tobytes() for g in p.groups}) < len(p.groups) for p, _ in found)
    return found


def test_proofs_by_cases_are_accepted(branched: list[tuple[Problem, Solution]]) -> None:
    for problem, solution in branched:
        verify(problem, solution)


def leaves(proof: Proof) -> list[int]:
    return [index for index, case in enumerate(proof.cases) if case.group < 0]


def with_case(solution: Solution, index: int, **change: Any) -> Solution:
    assert solution.proof is not None
    cases = list(solution.proof.cases)
    cases[index] = dataclasses.replace(cases[index], **change)
    return dataclasses.replace(
        solution, proof=dataclasses.replace(solution.proof, cases=tuple(cases))
    )


def test_a_raised_bound_outgrows_its_proof(
    branched: list[tuple[Problem, Solution]], best_losses: Callable[..., Any]
) -> None:
    for problem, solution in branched:
        greedy = solve(problem, "density")
        best = best_losses(problem)(problem.budget)
        if greedy.loss <= best * (1 + 1e-9):
            continue
        for raised in (best * (1 + 1e-9), greedy.loss):
            claim = dataclasses.replace(greedy, bound=raised, proof=solution.proof)
            with pytest.raises(SolutionError, match="proof"):
                verify(problem, claim)


def test_a_proof_without_one_of_its_cases_is_refused(
    branched: list[tuple[Problem, Solution]],
) -> None:
    for problem, solution in branched:
        assert solution.proof is not None
        shorter = dataclasses.replace(solution.proof, cases=solution.proof.cases[:-1])
        with pytest.raises(SolutionError, match="proof has no case"):
            verify(problem, dataclasses.replace(solution, proof=shorter))


def test_a_leaf_whose_multiplier_proves_nothing_is_refused_or_enumerated(
    branched: list[tuple[Problem, Solution]], best_losses: Callable[..., Any]
) -> None:
    # Any multiplier >= 0 is allowed: it may cost enumeration, it must never prove a false bound.
    for problem, solution in branched:
        assert solution.proof is not None
        verify(problem, with_case(solution, leaves(solution.proof)[0], multiplier=0.0))
        worse = solve(problem, "density")
        if worse.loss > best_losses(problem)(problem.budget) * (1 + 1e-9):
            claim = dataclasses.replace(worse, bound=worse.loss, proof=solution.proof)
            for leaf in leaves(solution.proof):
                for multiplier in (0.0, 1e-9, 1e9, -1e9, math.nan, math.inf):
                    with pytest.raises(SolutionError):
                        verify(problem, with_case(claim, leaf, multiplier=multiplier))


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_proof_makes_a_bound_above_the_optimum_acceptable(
    ugly: Problems,
    feasible_choices: Choices,
    optimum: Callable[[Problem], float],
    data: st.DataObject,
) -> None:
    problem = data.draw(ugly())
    best = optimum(problem)
    # What verify allows for rounding, which of the smallest numbers is one of them.
    slack = 1e-9 * best + math.ulp(0.0) * 4 * len(problem.groups) * (1 + len(problem.side_budgets))
    worse = [c for c in feasible_choices(problem) if problem.loss_of(c) > best + slack]
    assume(worse)
    honest = certify(problem, data.draw(st.sampled_from(worse[:20])), "any")
    slopes = problem.hulls.slope[problem.hulls.slope > 0].tolist()
    usual = max(slopes, default=1.0)
    lams = st.one_of(
        st.sampled_from([*slopes, 0.0, -usual, 1e300, -1e300, math.nan, math.inf]),
        # Prices so high that the losses are lost in their rounding.
        st.integers(3, 18).map(lambda digits: 10.0**digits * usual),
        st.floats(0.0, 2.0).map(lambda x: x * usual),
    )
    # A random tree: each split replaces a leaf.
    cases: list[Case] = [Case(data.draw(lams))]
    for _ in range(data.draw(st.integers(0, 3))):
        leaf = data.draw(st.sampled_from([i for i, c in enumerate(cases) if c.group < 0]))
        g = data.draw(st.integers(0, len(problem.groups) - 1))
        cost = int(data.draw(st.sampled_from(problem.groups[g].cost.tolist())))
        cases[leaf] = Case(cases[leaf].multiplier, g, cost, len(cases), len(cases) + 1)
        cases += [Case(data.draw(lams)), Case(data.draw(lams))]
    proof = Proof(data.draw(lams), tuple(cases))
    claim = dataclasses.replace(honest, bound=honest.loss, status="optimal", proof=proof)
    with pytest.raises(SolutionError):
        verify(problem, claim)
