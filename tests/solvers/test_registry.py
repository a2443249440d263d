"""Solvers by name: built in, from another distribution, by module:function, or as callables."""

import dataclasses
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankopt_solvers import (
    SOLVERS,
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
from rankopt_solvers.registry import find_solver, installed_solvers, is_solver_name

PLUGIN = """
    from rankopt_solvers import certify

    class Family:
        @staticmethod
        def member(problem):
            return cheapest(problem)

    def cheapest(problem, note="none"):
        choice = [int(group.cost.argmin()) for group in problem.groups]
        return certify(problem, choice, "whatever", stats={"note": note})

    def bare(problem):
        return [int(group.cost.argmin()) for group in problem.groups]

    number = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed distribution that offers solvers; the name of its module."""
    name = "fake_solvers_plugin"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(PLUGIN))
    (tmp_path / "raises_on_import.py").write_text("raise RuntimeError('no licence found')")
    (tmp_path / "misses_a_package.py").write_text("import surely_not_installed_anywhere")
    info = tmp_path / "fake_solvers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-solvers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        textwrap.dedent(f"""
            [rankopt.solvers]
            cheapest = {name}:cheapest
            nested = {name}:Family.member
            bare = {name}:bare
            number = {name}:number
            missing = {name}:not_there
            broken = raises_on_import:solver
            needs_more = misses_a_package:solver
            exact = {name}:bare
            """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in (name, "raises_on_import", "misses_a_package"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return name


@pytest.fixture
def problem(generic: Callable[..., Problem]) -> Problem:
    return generic(4, 5)


def test_another_distributions_solver_is_loaded_only_when_named(
    plugin: str, problem: Problem
) -> None:
    assert set(installed_solvers()) >= {"cheapest", "broken", "needs_more", "number"}
    assert solve(problem, "greedy").solver == "greedy"
    assert is_solver_name("cheapest") and is_solver_name("broken")
    assert plugin not in sys.modules
    solution = solve(problem, "cheapest", note="hello")
    assert plugin in sys.modules and "raises_on_import" not in sys.modules
    verify(problem, solution)
    assert solution.solver == "cheapest" and solution.stats == {"note": "hello"}
    assert solution.cost == problem.smallest_cost
    assert solve(problem, "nested").choice == solution.choice


@pytest.mark.usefixtures("plugin")
def test_a_built_in_name_cannot_be_taken(problem: Problem) -> None:
    assert "exact" not in installed_solvers()
    assert solve(problem, "exact").status == "optimal"


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("broken", "no licence found"),
        ("needs_more", "surely_not_installed_anywhere"),
        ("missing", "not_there"),
        ("number", "not callable"),
    ],
)
def test_a_broken_one_is_an_error_only_when_named(
    problem: Problem, name: str, complaint: str
) -> None:
    assert solve(problem, "cheapest").solver == "cheapest"
    with pytest.raises(UnknownSolverError, match=complaint) as caught:
        solve(problem, name)
    assert repr(name) in str(caught.value)
    assert not isinstance(caught.value, SolutionError)


@pytest.mark.usefixtures("plugin")
def test_an_unknown_name_lists_all_that_are_known(problem: Problem) -> None:
    with pytest.raises(UnknownSolverError, match="'gredy'") as caught:
        solve(problem, "gredy")
    for name in (*SOLVERS, "cheapest", "module:function"):
        assert name in str(caught.value)
    assert not is_solver_name("gredy")


def test_module_and_function_need_no_registration(plugin: str, problem: Problem) -> None:
    for where in (f"{plugin}:cheapest", f"{plugin}:Family.member"):
        assert is_solver_name(where)
        solution = solve(problem, where)
        assert solution.solver == where and solution.cost == problem.smallest_cost


@pytest.mark.parametrize(
    "name", ["no_such_module:f", "math:no_such", "math:pi", "math:", ":f", ".here:f", ":", ""]
)
def test_what_cannot_be_loaded_is_an_unknown_solver(problem: Problem, name: str) -> None:
    with pytest.raises(UnknownSolverError):
        solve(problem, name)


@pytest.mark.parametrize("objective", ["sum", "max"])
@pytest.mark.parametrize("name", ["bare", "fake_solvers_plugin:bare"])
def test_a_bare_choice_is_no_solution(
    plugin: str, problem: Problem, objective: Objective, name: str
) -> None:
    with pytest.raises(TypeError, match=r"returned list, not a Solution.*certify"):
        solve(dataclasses.replace(problem, objective=objective), name)
    with pytest.raises(TypeError, match="NoneType"):
        solve(dataclasses.replace(problem, objective=objective), lambda problem: None)  # type: ignore[arg-type, return-value]


def test_callables_are_found_by_their_own_names() -> None:
    class Configured:
        def __call__(self, problem: Problem, **options: Any) -> Solution:
            raise NotImplementedError

    def mine(problem: Problem) -> Solution:
        raise NotImplementedError

    one = Configured()
    assert find_solver(mine) == ("mine", mine)
    assert find_solver(one) == ("Configured", one)


@pytest.mark.parametrize("objective", ["sum", "max"])
def test_a_third_party_solver_is_called_with_its_options_and_recounted(
    problem: Problem, objective: Objective
) -> None:
    def cheapest(problem: Problem, *, note: str) -> Solution:
        assert problem.objective == "sum"
        choice = [int(g.cost.argmin()) for g in problem.groups]
        honest = certify(problem, choice, "ignored", stats={"note": note})
        return dataclasses.replace(honest, loss=0.0, bound=0.0, cost=0, status="optimal")

    problem = dataclasses.replace(problem, objective=objective)
    solution = solve(problem, cheapest, note="hello")
    verify(problem, solution)
    assert solution.solver == "cheapest" and solution.stats == {"note": "hello"}
    assert solution.cost == problem.cost_of(solution.choice) > 0
    assert solution.loss == problem.loss_of(solution.choice) > 0


def test_a_function_named_like_a_built_in_is_recounted_too(problem: Problem) -> None:
    def exact(problem: Problem) -> Solution:
        honest = certify(problem, [int(g.cost.argmin()) for g in problem.groups], "exact")
        return dataclasses.replace(honest, bound=honest.loss, status="optimal")

    solution = solve(problem, exact)
    verify(problem, solution)
    assert solution.status == "feasible"


@pytest.mark.parametrize("objective", ["sum", "max"])
@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ((1, 1, 1, 1), "costs"),
        ((5, 0, 0, 0), "no option 5"),
        ((-1, 0, 0, 0), "no option -1"),
        ((0,), "1 choices"),
    ],
)
def test_a_solver_that_returns_no_valid_choice_is_refused_by_name(
    problem: Problem, objective: Objective, answer: tuple[int, ...], complaint: str
) -> None:
    def wishful(problem: Problem) -> Solution:
        return Solution(answer, 0, 0.0, 0.0, 0.0, "optimal", "wishful")

    tight = dataclasses.replace(problem, budget=problem.smallest_cost, objective=objective)
    if objective == "max" and complaint == "costs":
        complaint = "no option 1|costs"
    with pytest.raises(SolutionError, match=f"wishful: .*({complaint})"):
        solve(tight, wishful)


def test_a_solver_is_not_asked_about_an_infeasible_problem(problem: Problem) -> None:
    def never(problem: Problem) -> Solution:
        raise AssertionError("called")

    with pytest.raises(InfeasibleError):
        solve(problem.with_budget(problem.smallest_cost - 1), never)


def test_an_option_that_a_solver_does_not_know_is_a_type_error(problem: Problem) -> None:
    for solver in ("exact", "greedy", "density"):
        with pytest.raises(TypeError, match="nonsense"):
            solve(problem, solver, nonsense=1)
