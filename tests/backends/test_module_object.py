"""A backend that is named ``module:object``, from the profile to the smaller model."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from rankopt import (
    ModelError,
    OptionError,
    Profile,
    ProfileError,
    apply_plan,
    make_plan,
    profile_model,
    search_plan,
)
from rankopt import backends as registry
from rankopt.backends import find_backend, find_backends
from rankopt.plan.compare import Strategy, compare
from rankopt.testing import check_backend
from tests import tiny
from tests.cli.test_cli import ROOT, Run, done, files, run

__all__ = ["files", "run"]
MODULE = "a_users_backends"
MINE, LIGHT = f"{MODULE}:Mine.whitened", f"{MODULE}:LIGHT"
TEXT = """
    import dataclasses

    from rankopt.backends import find_backend
    from rankopt.backends.base import Backend


    class Mine:
        whitened = dataclasses.replace(find_backend("whitened"), name="mine")


    #: Can be decomposed again without the data.
    LIGHT = dataclasses.replace(find_backend("fwsvd"), name="light")
    AGAIN = dataclasses.replace(LIGHT, source="another")
    SVD = dataclasses.replace(find_backend("fwsvd"), name="svd")
    SPACED = dataclasses.replace(LIGHT, name="two words")
    NUMBER = 3
    SCALELESS = dataclasses.replace(LIGHT, name="scaleless", scales={})
    NEEDY = dataclasses.replace(LIGHT, name="needy", needs=7)


    class Broken:
        source, needs, scales = LIGHT.source, LIGHT.needs, LIGHT.scales
        factors, error = LIGHT.factors, LIGHT.error

        @property
        def name(self):
            raise KeyError("no name")

        def decompose(self, weight, statistics, largest):
            raise KeyError("first\\nsecond")


    BROKEN = Broken()
    FAILING = type("Failing", (Broken,), {"name": "failing"})()
    CLASS = type("Shell", (), {name: None for name in (
        "name", "source", "needs", "scales", "decompose", "factors", "error")})
"""


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been loaded from module:object."""
    monkeypatch.setattr(registry, "_LOADED", {})


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a module with backends, on the path, in a process that has not loaded it."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / f"{MODULE}.py").write_text(textwrap.dedent(TEXT))
    (folder / "raises_on_import.py").write_text("raise RuntimeError('no licence found')")
    (folder / "leaves_on_import.py").write_text("raise SystemExit('goodbye')")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    another_process(monkeypatch)
    return folder


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_profile_plan_and_apply_in_one_process(module: Path, tmp_path: Path) -> None:
    batches = tiny.batches(tiny.bert())
    measured = profile_model(tiny.bert(), batches, backends=[MINE, "svd", LIGHT])
    assert measured.backends == ("mine", "svd", "light")
    assert [b.loaded_from for b in measured.info.backends] == [MINE, None, LIGHT]
    measured.save(tmp_path / "p.safetensors")
    profile = Profile.load(tmp_path / "p.safetensors")
    assert profile.info == measured.info and profile.digest() == measured.digest()
    built_in = profile_model(tiny.bert(), batches, backends=["whitened", "svd", "fwsvd"])
    for where, name, same in ((MINE, "mine", "whitened"), (LIGHT, "light", "fwsvd")):
        plan = make_plan(profile, keep=0.5, backend=where)
        assert plan == make_plan(profile, keep=0.5, backend=name) and plan.backend == name
        (row,) = compare(profile, [0.5], [Strategy.parse(f"exact@{where}")])
        assert row.plan == plan
        applied, wanted = tiny.bert(), tiny.bert()
        apply_plan(applied, plan, profile)
        apply_plan(wanted, make_plan(built_in, keep=0.5, backend=same), built_in)
        found, expected = weights(applied), weights(wanted)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    with pytest.raises(ProfileError, match="no losses for backend 'elsewhere:IT', only for mine"):
        make_plan(profile, keep=0.5, backend="elsewhere:IT")


@pytest.mark.parametrize("where", [MINE, LIGHT])
def test_another_process_must_be_told_once_more(
    module: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.bert()
    profile = profile_model(model, tiny.batches(model), backends=[where])
    plan = make_plan(profile, keep=0.5)
    before = weights(model)
    another_process(monkeypatch)
    with pytest.raises(OptionError) as caught:
        apply_plan(model, plan, profile)
    message = str(caught.value)
    assert f"find_backend({where!r})" in message and f"--backend {where}" in message
    assert f"unknown backend {plan.backend!r}" in message and "rankopt.backends" in message
    after = weights(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert find_backend(where).name == plan.backend
    apply_plan(model, plan, profile)


def test_a_search_takes_it_too(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    model = tiny.bert()
    batches = tiny.batches(model)
    profile = profile_model(model, batches, backends=["svd", LIGHT])
    another_process(monkeypatch)
    how: dict[str, Any] = {"keep": 0.5, "trials": 3, "sampler": "random"}
    found = search_plan(
        model, profile, batches, backend=LIGHT, plans=[f"exact@{LIGHT}", "uniform"], **how
    )
    assert found.plan.backend == "light"
    with pytest.raises(OptionError, match="every trial of a search has the backend light"):
        search_plan(model, profile, batches, backend=LIGHT, plans=["exact@svd"], **how)


def test_planning_imports_neither_the_module_nor_torch(module: Path, tmp_path: Path) -> None:
    model = tiny.bert()
    profile_model(model, tiny.batches(model), backends=[MINE]).save(tmp_path / "p")
    code = f"""
        import sys
        sys.modules["torch"] = None
        from rankopt import Profile, make_plan
        print(make_plan(Profile.load({str(tmp_path / "p")!r}), keep=0.5, backend={MINE!r}).backend)
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'solvers'}"}
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout) == (0, "mine\n"), ended.stderr


def test_profiles_of_installed_backends_say_nothing_of_it() -> None:
    model = tiny.bert()
    info = profile_model(model, tiny.batches(model), backends=["svd"]).info
    assert "loaded_from" not in info.model_dump_json()
    assert "loaded_from" not in json.dumps(info.model_dump(mode="json"))


def test_what_was_loaded_has_its_own_name_from_then_on(module: Path) -> None:
    with pytest.raises(OptionError, match=r"unknown backend 'mine'; .* or module:object of your"):
        find_backend("mine")
    assert find_backends([MINE, "svd", "mine", MINE]).keys() == {"mine", "svd"}
    assert find_backend("mine") is find_backend(MINE)
    check_backend(MINE)
    with pytest.raises(OptionError, match=r"unknown backend 'pca'; known: .*mine"):
        find_backend("pca")


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ("no_such_module:X", "does not load: No module named 'no_such_module'; wanted is module:o"),
        (f"{MODULE}:NONE", "does not load: module .* has no attribute 'NONE'"),
        (f"{MODULE}:", "does not load"),
        (":X", "does not load"),
        ("raises_on_import:X", "does not load: no licence found"),
        ("leaves_on_import:X", "does not load: goodbye"),
        ("unittest.mock:call", "without the attributes of rankopt.backends.base.Backend"),
        (f"{MODULE}:SCALELESS", "without the attributes of rankopt.backends.base.Backend"),
        (f"{MODULE}:NEEDY", "without the attributes of rankopt.backends.base.Backend"),
        (f"{MODULE}:BROKEN", "is a Broken without the attributes"),
        (f"{MODULE}:NUMBER", "is a int without the attributes of rankopt.backends.base.Backend"),
        (f"{MODULE}:CLASS", "is the class Shell: name an object of it"),
        (f"{MODULE}:SPACED", "has the name 'two words', which becomes part of names in files"),
        (f"{MODULE}:SVD", "has the name of the built-in 'svd': give it another name"),
        (f"{MODULE}:AGAIN", f"has the name 'light', as {LIGHT} has: give it another name"),
    ],
)
def test_what_cannot_be_a_backend_is_refused(module: Path, where: str, complaint: str) -> None:
    find_backend(LIGHT)
    with pytest.raises(OptionError, match=complaint) as caught:
        profile_model(tiny.bert(), iter(()), backends=[where])
    assert repr(where) in str(caught.value)
    assert find_backend("svd").source.startswith("Eckart") and find_backend("light").name == "light"


def test_a_backend_that_fails_is_named_with_the_layer(module: Path) -> None:
    model = tiny.bert()
    with pytest.raises(
        ModelError, match=r"layer bert\.\S+: backend failing: KeyError: 'first"
    ) as at:
        profile_model(model, tiny.batches(model), backends=[f"{MODULE}:FAILING"])
    assert "\n" not in str(at.value)


def test_a_built_in_may_be_named_by_its_module(module: Path) -> None:
    assert find_backend("rankopt.backends.svd:BACKEND") is find_backend("svd")


def test_the_name_of_an_installed_backend_is_taken(module: Path) -> None:
    info = module / "installed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1.0\n")
    points = f"light = {MODULE}:AGAIN\nmine = {MINE}\n"
    (info / "entry_points.txt").write_text(f"[rankopt.backends]\n{points}")
    with pytest.raises(OptionError, match=f"has the name 'light', as {MODULE}:AGAIN has"):
        find_backend(LIGHT)
    assert find_backend(MINE) is find_backend("mine")


@pytest.mark.slow
def test_the_command_line_in_processes_of_their_own(
    module: Path, files: Path, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (module, ROOT, ROOT / "solvers"))),
    }

    def rankopt(*arguments: object) -> tuple[int, str, str]:
        given = [sys.executable, "-m", "rankopt", *map(str, arguments)]
        ended = subprocess.run(given, capture_output=True, text=True, env=environment, timeout=120)
        return ended.returncode, ended.stdout, ended.stderr

    model, profile, plan = files / "model", tmp_path / "p.safetensors", tmp_path / "plan.json"
    data = ("--data", files / "train.txt", "--max-length", 16)
    done(rankopt("profile", model, *data, "--backend", "svd", MINE, "-o", profile))
    done(rankopt("plan", profile, "--keep", 0.7, "--backend", MINE, "-o", plan))
    apply = ("apply", model, plan, "--profile", profile, "-o", tmp_path / "smaller")
    code, _, err = rankopt(*apply)
    assert code == 2 and f"--backend {MINE} on the command line" in err and "Traceback" not in err
    assert not (tmp_path / "smaller").exists()
    done(rankopt(*apply, "--backend", MINE))
    assert (tmp_path / "smaller" / "config.json").exists()


def test_commands_that_measure_load_what_they_are_told(
    module: Path, files: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, profile = files / "model", tmp_path / "p.safetensors"
    data = ("--data", files / "heldout.txt", "--max-length", 16)
    done(run("profile", model, *data, "--backend", "svd", LIGHT, "-o", profile))
    row = ("compare", profile, "--keep", 0.7, "--json", "--model", model, *data)
    for how in (("--strategy", f"exact@{LIGHT}"), ("--strategy", "exact", "--backend", LIGHT)):
        another_process(monkeypatch)
        (found,) = json.loads(done(run(*row, *how)))["rows"]
        assert found["backend"] == "light" and found["loss"] > 0
    another_process(monkeypatch)
    code, _, err = run(*row, "--strategy", "exact@light")
    assert code == 2 and f"--backend {LIGHT}" in err
    plan = tmp_path / "plan.json"
    done(run("plan", profile, "--keep", 0.7, "--backend", "svd", "-o", plan))
    code, _, err = run(
        "apply", model, plan, "--profile", profile, "-o", tmp_path / "out", "--backend", LIGHT
    )
    assert code == 2 and f"--backend {LIGHT} is 'light', the plan has the backend 'svd'" in err
    other = tmp_path / "other.json"
    done(run("plan", profile, "--keep", 0.7, "--backend", "light", "-o", other))
    another_process(monkeypatch)
    monkeypatch.setattr("rankopt.model.loading.load_model", lambda *_: pytest.fail("loaded"))
    apply = ("apply", model, other, "--profile", profile, "-o", tmp_path / "out")
    for command in (apply, (*row, "--strategy", "exact@light")):
        code, _, err = run(*command)
        assert code == 2 and f"--backend {LIGHT}" in err, "known before the model is loaded"
