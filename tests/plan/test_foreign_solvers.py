"""Whatever is named as a solver and is none ends in one line; one that is a solver is believed."""

import json
import sys
from pathlib import Path

import pytest

from rankopt import Plan, make_plan
from rankopt.cli.app import main
from rankopt.errors import OptionError
from tests.synthetic import synthetic_profile

MODULE = """
import dataclasses
import sys
from rankopt_solvers import InfeasibleError, certify, solve

def shouts(problem):
    print("working")
    return solve(problem, "greedy")

def leaves(problem):
    sys.exit(7)

def two_lines(problem):
    raise KeyError("first\\nsecond")

def dives(problem):
    return dives(problem)

def two(problem, more):
    return None

def gives_up(problem):
    raise InfeasibleError(1, 2, ("a",))

def answered(choice):
    return lambda problem: dataclasses.replace(solve(problem, "greedy"), choice=choice(problem))

none = answered(lambda problem: None)
words = answered(lambda problem: ["a" for _ in problem.groups])
halves = answered(lambda problem: [0.5 for _ in problem.groups])
dear = answered(lambda problem: [int(group.cost.argmax()) for group in problem.groups])
short = answered(lambda problem: [0])
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "odd_solvers.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "leaving.py").write_text("raise SystemExit('no')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "odd_solvers"


@pytest.mark.parametrize("objective", ["total", "maxmin"])
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("math:sqrt", "must be real number"),
        ("os:system", "expected str"),
        ("json:loads", "must be str"),
        ("builtins:dict", "not iterable"),
        ("unittest.mock:MagicMock", "returned MagicMock, not a Solution"),
        ("no_such_module:x", "No module named"),
        ("math:", "cannot load math:"),
        (":x", "cannot load :x"),
        ("leaving:x", "cannot load leaving:x: no"),
        ("odd_solvers:leaves", "SystemExit: 7"),
        ("odd_solvers:two_lines", "KeyError: 'first"),
        ("odd_solvers:dives", "RecursionError"),
        ("odd_solvers:two", "missing 1 required positional argument"),
        ("odd_solvers:gives_up", "InfeasibleError"),
        ("odd_solvers:none", "no list of option indices"),
        ("odd_solvers:words", "no list of option indices"),
        ("odd_solvers:halves", "no list of option indices"),
        ("odd_solvers:dear", "the budget is"),
        ("odd_solvers:short", "1 choices for 4 groups"),
    ],
)
def test_what_is_no_solver_is_a_mistake_in_one_line(
    module: str, name: str, complaint: str, objective: str
) -> None:
    with pytest.raises(OptionError, match=complaint) as caught:
        make_plan(synthetic_profile(), keep=0.7, solver=name, objective=objective)  # type: ignore[arg-type]
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_what_a_solver_prints_is_not_in_the_way_of_the_plan(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.safetensors"
    synthetic_profile().save(path)
    command = ["rankopt", "plan", str(path), "--keep", "0.7", "--json"]
    monkeypatch.setattr(sys, "argv", [*command, "--solver", f"{module}:shouts"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert not ended.value.code
    mine = Plan.from_json(said.out)
    greedy = make_plan(synthetic_profile(), keep=0.7, solver="greedy")
    assert mine.ranks == greedy.ranks
    assert json.loads(said.out)["solver"] == f"{module}:shouts"
    assert "working" in said.err
