"""Search keeps its promises: within the budget, never worse than a plan, nothing measured twice."""

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankopt_solvers import Group, Problem, ProblemError, SolutionError, solve, verify
from rankopt_solvers.search import (
    Choice,
    SearchError,
    SearchResult,
    StudyError,
    search,
)
from rankopt_solvers.search.multipliers import multiplier_names, multiplier_weights, reweighted

pytest.importorskip("optuna")

KINDS, LAYERS = ("query", "value", "up", "down"), 6
LABELS = [kind for _ in range(LAYERS) for kind in KINDS]
DEPTHS = [layer / (LAYERS - 1) for layer in range(LAYERS) for _ in KINDS]


def instance(seed: int = 0) -> tuple[Problem, np.ndarray]:
    """A problem, and how much a unit of each group's loss truly matters."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(len(LABELS)):
        energies = rng.gamma(1.0) * np.sort(rng.gamma(1.0, 1.0, 24))[::-1] / np.arange(1, 25)
        tails = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
        cost = np.append(np.arange(1, 13) * 48, 24 * 24)
        groups.append(Group(f"g{index}", cost, np.append(tails[1:13], 0.0)))
    by_kind = dict(zip(KINDS, rng.normal(0.0, 0.8, len(KINDS)), strict=True))
    logs = np.array([by_kind[kind] for kind in LABELS]) + np.sin(4 * np.array(DEPTHS))
    budget = sum(int(group.cost.max()) for group in groups) // 2
    return Problem(tuple(groups), budget), np.exp(logs + 0.2 * rng.standard_normal(len(LABELS)))


class Truth:
    """The measured loss, which remembers what it was asked."""

    def __init__(self, problem: Problem, weights: np.ndarray) -> None:
        self.problem, self.weights = problem, weights
        self.asked: list[Choice] = []

    def __call__(self, choice: Choice) -> float:
        self.asked.append(choice)
        pairs = zip(self.problem.groups, self.weights, choice, strict=True)
        return 1.0 + math.fsum(w * float(group.loss[j]) for group, w, j in pairs)


def run(sampler: Any = "thompson", trials: int = 12, seed: int = 0, **more: Any) -> SearchResult:
    problem, weights = instance()
    evaluate = more.pop("evaluate", None) or Truth(problem, weights)
    return search(
        problem,
        evaluate,
        **{"kinds": LABELS, "depths": DEPTHS, "solver": "greedy"}
        | {"trials": trials, "sampler": sampler, "seed": seed}
        | more,
    )


def cheapest(problem: Problem) -> list[int]:
    return [int(np.argmin(group.cost)) for group in problem.groups]


@pytest.mark.parametrize("sampler", ["thompson", "tpe", "cmaes", "gp", "random"])
def test_every_trial_is_new_within_the_budget_and_the_best_is_returned(sampler: str) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    if sampler == "gp":
        pytest.importorskip("torch")
    problem, weights = instance()
    truth, seen = Truth(problem, weights), []
    result = run(
        sampler,
        evaluate=truth,
        plans={"cheapest": cheapest(problem)},
        progress=lambda measured, done: seen.append((measured, done)),
    )
    assert len(truth.asked) == len(set(truth.asked)) == 12 == result.measured_now
    assert [trial.choice for trial in result.trials] == truth.asked
    assert all(problem.cost_of(choice) <= problem.budget for choice in truth.asked)
    assert [done for _, done in seen] == list(range(1, 13))
    assert [measured for measured, _ in seen] == list(result.trials)
    assert [trial.source for trial in result.trials] == ["cheapest", "unweighted"] + 10 * [sampler]
    losses = [Truth(problem, weights)(trial.choice) for trial in result.trials]
    assert [trial.loss for trial in result.trials] == losses
    assert result.loss == min(losses) == Truth(problem, weights)(result.solution.choice)
    assert result.plan_loss == min(losses[:2]) and result.improvement >= 0.0
    assert result.solution.solver == "search" and not result.exhausted
    verify(problem, result.solution)


def test_a_search_that_finds_nothing_better_returns_the_plan() -> None:
    problem, _ = instance()
    best = solve(problem, "greedy").choice
    result = run(evaluate=lambda choice: 1.0 + (choice != best))
    assert result.solution.choice == best
    assert (result.best_plan, result.improvement, result.loss) == ("unweighted", 0.0, 1.0)


def test_plans_with_the_same_choice_are_one_and_cost_one_trial() -> None:
    problem, weights = instance()
    best = solve(problem, "greedy").choice
    truth = Truth(problem, weights)
    result = run(evaluate=truth, plans={"a": best, "low": cheapest(problem), "b": best}, trials=2)
    assert [trial.source for trial in result.trials] == ["a = b = unweighted", "low"]
    assert len({trial.digest for trial in result.trials}) == 2


def test_the_same_seed_repeats_and_another_does_not() -> None:
    for sampler in ("thompson", "tpe"):
        first, again, other = (run(sampler, seed=seed) for seed in (1, 1, 2))
        choices = [[trial.choice for trial in found.trials] for found in (first, again, other)]
        assert choices[0] == choices[1] != choices[2]


def test_thompson_closes_more_of_the_gap_than_random_and_tpe() -> None:
    """Median over instances, of the way from the unweighted optimum to the true one."""
    closed: dict[str, list[float]] = {"thompson": [], "random": [], "tpe": []}
    for seed in range(4):
        problem, weights = instance(seed)
        truth = Truth(problem, weights)
        start = truth(solve(problem, "greedy").choice)
        end = truth(solve(reweighted(problem, weights), "greedy").choice)
        for sampler, shares in closed.items():
            found = search(
                problem,
                truth,
                trials=25,
                kinds=LABELS,
                depths=DEPTHS,
                sampler=sampler,
                seed=seed,
                solver="greedy",
            )
            shares.append((start - found.loss) / (start - end))
    median = {sampler: float(np.median(shares)) for sampler, shares in closed.items()}
    assert median["thompson"] > 0.6
    assert median["thompson"] >= median["tpe"]
    assert median["thompson"] > median["random"] + 0.1


def test_few_choices_end_the_search_and_none_is_measured_twice() -> None:
    groups = tuple(Group(f"g{i}", np.array([0, 1]), np.array([1.0 + i, 0.0])) for i in range(3))
    problem = Problem(groups, 1)
    for sampler in ("thompson", "tpe"):
        asked: list[Choice] = []

        def evaluate(choice: Choice, asked: list[Choice] = asked) -> float:
            asked.append(choice)
            return float(choice[1])

        found = search(problem, evaluate, trials=100, sampler=sampler, solver="greedy")
        assert found.exhausted and len(asked) == len(set(asked)) == len(found.trials) < 5
        assert found.loss == 0.0


def test_loss_that_is_not_finite_is_never_the_best_and_not_asked_again() -> None:
    problem, weights = instance()
    truth = Truth(problem, weights)
    best = solve(problem, "greedy").choice
    values = iter([math.nan, math.inf, -math.inf])

    def evaluate(choice: Choice) -> float:
        loss = truth(choice)
        return loss if len(truth.asked) % 2 else next(values, math.nan)

    found = run(evaluate=evaluate, plans={"low": cheapest(problem)})
    assert len(truth.asked) == len(set(truth.asked)) == 12
    assert [trial.loss is None for trial in found.trials] == [False, True] * 6
    assert math.isfinite(found.loss) and found.best_plan == "low"
    assert best == found.trials[1].choice
    with pytest.raises(SearchError, match="none of 12 measured choices has a finite loss"):
        run(evaluate=lambda choice: math.nan)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("sampler", ["thompson", "tpe"])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_interrupted_search_goes_on(
    tmp_path: Path, sampler: str, at: int, interruption: type[BaseException]
) -> None:
    problem, weights = instance()
    truth = Truth(problem, weights)

    def failing(choice: Choice) -> float:
        if len(truth.asked) == at:
            raise interruption("stop")
        return truth(choice)

    more = {"storage": tmp_path / "s.journal", "plans": {"low": cheapest(problem)}}
    with pytest.raises(interruption, match="stop"):
        run(sampler, evaluate=failing, **more)
    assert len(truth.asked) == at
    found = run(sampler, evaluate=truth, **more)
    assert found.measured_now == 12 - at and len(found.trials) == 12
    assert len(truth.asked) == len(set(truth.asked)) == 12
    assert {"low", "unweighted"} <= {trial.source for trial in found.trials}
    again = run(sampler, evaluate=truth, **more)
    assert again.measured_now == 0 and len(truth.asked) == 12
    assert dataclasses.replace(again, measured_now=12 - at) == found


def test_another_problem_label_or_parametrisation_is_refused(tmp_path: Path) -> None:
    storage = tmp_path / "s.journal"
    run(storage=storage, label="model a", trials=3)
    with pytest.raises(StudyError, match="another label"):
        run(storage=storage, label="model b", trials=3)
    with pytest.raises(StudyError, match="another parameters"):
        run("tpe", storage=storage, label="model a", trials=3)
    problem, _ = instance()
    with pytest.raises(StudyError, match=r"another problem .* give another storage or study name"):
        search(
            dataclasses.replace(problem, budget=problem.budget - 1),
            lambda choice: 0.0,
            trials=3,
            solver="greedy",
            storage=storage,
            label="model a",
        )
    # Beside it, under another name, there is room.
    assert run("tpe", storage=storage, label="model b", trials=3, study_name="b").measured_now == 3


def test_damaged_journal_is_named_with_its_line_and_a_torn_tail_is_cut(tmp_path: Path) -> None:
    storage = tmp_path / "s.journal"
    run(storage=storage, trials=4)
    whole = storage.read_bytes()
    storage.write_bytes(whole + b'{"op_code": 4, "tri')
    assert run(storage=storage, trials=6).measured_now == 2
    lines = storage.read_bytes().splitlines(keepends=True)
    storage.write_bytes(b"".join([*lines[:5], lines[5][:7] + b"\n", *lines[6:]]))
    with pytest.raises(StudyError, match=r"s\.journal, line 6: the journal is damaged"):
        run(storage=storage, trials=6)
    with pytest.raises(StudyError, match="name a file in a folder that exists"):
        run(storage=tmp_path / "no" / "s.journal", trials=6)


def test_what_cannot_be_searched_is_refused() -> None:
    problem, _ = instance()
    with pytest.raises(SearchError, match=r"unknown sampler 'tea'.*cmaes, tpe, thompson"):
        run("tea")
    with pytest.raises(SearchError, match="1 trials are too few: 2 plans"):
        run(trials=1, plans={"low": cheapest(problem)})
    with pytest.raises(ProblemError, match="give objective 'sum'"):
        search(dataclasses.replace(problem, objective="max"), lambda choice: 0.0, trials=3)
    with pytest.raises(ProblemError, match="3 kinds for 24 groups"):
        run(kinds=["a"] * 3)
    with pytest.raises(ProblemError, match=r"'g0': depths lie in \[0, 1\], got 2"):
        run(depths=[2.0] * 24)
    dense = [group.cost.size - 1 for group in problem.groups]
    with pytest.raises(SolutionError, match="dense: the choice costs"):
        run(plans={"dense": dense})


@pytest.mark.parametrize(("sampler", "missing"), [("cmaes", "cmaes"), ("tpe", "optuna")])
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, sampler: str, missing: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(ImportError, match=f"needs {missing}, which is not installed: pip install"):
        run(sampler)


def test_samplers_of_optunas_own_search_the_multipliers() -> None:
    from optuna.samplers import NSGAIISampler as Own

    found = run(Own(seed=1))
    assert [trial.source for trial in found.trials] == ["unweighted"] + 11 * ["NSGAIISampler"]
    assert len({trial.choice for trial in found.trials}) == 12


def test_zero_multipliers_are_the_problem_as_given() -> None:
    problem, _ = instance()
    names = multiplier_names(problem, LABELS, DEPTHS)
    assert len(names) == len(KINDS) + 2
    zeros = dict.fromkeys(names, 0.0)
    assert (multiplier_weights(problem, LABELS, DEPTHS, zeros) == 1.0).all()
    up = multiplier_weights(problem, LABELS, DEPTHS, {"kind: up": math.log(3.0)})
    assert up.tolist() == pytest.approx([3.0 if kind == "up" else 1.0 for kind in LABELS])
    linear = multiplier_weights(problem, LABELS, DEPTHS, {"depth: linear": 1.0})
    assert linear[0] == pytest.approx(math.exp(-1.0)) and linear[-1] == pytest.approx(math.e)
    # A single kind changes no ratio, nor does a single depth.
    assert multiplier_names(problem, ["a"] * 24, [0.5] * 24) == []
    assert len(multiplier_names(problem, None, None)) == 24
