"""What the doctor finds is what there is; what is broken ends in exit code 2."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from rankopt.cli.commands import doctor
from tests.cli.test_cli import Run, done, run

__all__ = ["run"]


def test_it_finds_this_environment(run: Run) -> None:
    printed = done(run("doctor"))
    import torch

    version = importlib.metadata.version("torch")
    assert f"torch         {version}" in printed and "computes on   cpu" in printed
    assert f"{torch.get_num_threads()} threads" in printed and "no problems found" in printed
    found = json.loads(done(run("doctor", "--json")))
    assert found["problems"] == [] and found["torch"]["reloads"] is True
    assert found["extras"]["search"] == {"packages": ["cmaes", "optuna"], "lacks": []}
    assert found["packages"]["optuna"] == importlib.metadata.version("optuna")
    assert not {"dev", "docs"} & set(found["extras"])


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that packages have other versions, or are not there."""
    real = importlib.metadata.version

    def pretend(**others: str | None) -> None:
        def version(name: str) -> str:
            found = others[name] if name in others else real(name)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


@pytest.mark.parametrize(
    ("version", "lacks"),
    [(None, True), ("4.8.9", True), ("4.9", False), ("4.10.0", False), ("5.0.0rc1", False)],
)
def test_an_extra_that_is_missing_or_old_is_no_problem(
    run: Run, versions: Callable[..., None], version: str | None, lacks: bool
) -> None:
    versions(optuna=version)
    printed = done(run("doctor"))
    line = next(x for x in printed.splitlines() if x.split()[:1] == ["search"])
    assert ("lacks optuna>=4.9: pip install 'rankopt[search]'" in line) == lacks


def test_without_torch_it_says_so(run: Run, versions: Callable[..., None]) -> None:
    versions(torch=None, transformers=None)
    printed = done(run("doctor"))
    assert "torch         not installed" in printed and "computes on" not in printed
    assert json.loads(done(run("doctor", "--json")))["torch"] is None


def test_a_torch_that_does_not_load_is_a_problem(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def broken(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise OSError("libtorch.so: cannot open shared object\nand more")
        return real(name, *rest)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    code, printed, _ = run("doctor")
    assert code == 2
    assert "problem: torch or transformers cannot be imported: libtorch.so: cannot" in printed


@pytest.mark.parametrize("group", ["rankopt.backends", "rankopt.solvers"])
@pytest.mark.parametrize(("where", "sound"), [("json:dumps", None), ("no_such:thing", False)])
def test_plug_ins_are_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, group: str, where: str, sound: bool | None
) -> None:
    point = importlib.metadata.EntryPoint("mine", where, group)
    real = importlib.metadata.entry_points

    def points(**asked: Any) -> Any:
        return (point,) if asked.get("group") == group else real(**asked)

    monkeypatch.setattr(importlib.metadata, "entry_points", points)
    monkeypatch.setattr("rankopt.backends.entry_points", points)
    code, printed, _ = run("doctor")
    assert f"mine ({where})" in printed
    # Any function may be a solver; a backend has attributes.
    works = sound is None and group == "rankopt.solvers"
    assert (code, "problem: " in printed) == ((0, False) if works else (2, True))


def test_threads_wait_for_each_other_but_shortly_unless_somebody_said_how() -> None:
    """OpenMP reads the environment when torch is loaded: that must be later."""
    code = """
import os, sys
from rankopt.cli import main
assert "torch" not in sys.modules
sys.argv = ["rankopt", "--version"]
try:
    main()
except SystemExit:
    print(os.environ.get("GOMP_SPINCOUNT"))
"""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    plain = {name: value for name, value in os.environ.items() if name not in names}
    for given, wanted in (
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ):
        said = subprocess.run(
            [sys.executable, "-c", code],
            env=plain | given,
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout.split()[-1] == wanted
