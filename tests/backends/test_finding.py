"""Backends by name: those that are built in, and those of other distributions."""

import sys
import textwrap
from pathlib import Path

import pytest

from rankopt import OptionError, make_plan, profile_model
from rankopt.backends import BUILT_IN, find_backend, known_backends
from tests import tiny


def test_an_unknown_backend_lists_those_that_exist() -> None:
    with pytest.raises(OptionError, match="'pca'; known: fwsvd, fwsvd_two_sided, kronecker, svd"):
        find_backend("pca")


PLUGIN = """
    import dataclasses
    from rankopt.backends import find_backend

    BACKEND = dataclasses.replace(find_backend("svd"), name="plain", source="a plug-in")
    NUMBER = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed distribution that offers backends; the name of its module."""
    name = "fake_backends_plugin"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(PLUGIN))
    (tmp_path / "backend_raises_on_import.py").write_text("raise RuntimeError('no licence found')")
    info = tmp_path / "fake_backends-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-backends\nVersion: 1.0\n")
    points = f"plain = {name}:BACKEND\nnumber = {name}:NUMBER\nsvd = {name}:NUMBER\n"
    points += "broken = backend_raises_on_import:BACKEND\n"
    (info / "entry_points.txt").write_text(f"[rankopt.backends]\n{points}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_another_distributions_backend_is_loaded_when_named_and_planned_with(plugin: str) -> None:
    assert known_backends() == (*BUILT_IN, "broken", "number", "plain")
    assert plugin not in sys.modules
    model = tiny.bert()
    batches = tiny.batches(model)
    theirs, ours = (profile_model(model, batches, backends=[name]) for name in ("plain", "svd"))
    assert theirs.info.backends[0].source == "a plug-in"
    a, b = (make_plan(profile, keep=0.5) for profile in (theirs, ours))
    assert a.ranks == b.ranks and a.backend == "plain"
    # A name that is built in stays what it is.
    assert find_backend("svd").source.startswith("Eckart")


def test_a_plugin_that_is_no_backend_is_refused_by_name(plugin: str) -> None:
    with pytest.raises(OptionError, match=rf"'number' \({plugin}:NUMBER\) is a int without"):
        find_backend("number")
    with pytest.raises(OptionError, match=r"'broken' .* does not load: no licence found"):
        find_backend("broken")
