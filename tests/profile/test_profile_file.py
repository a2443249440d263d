"""The profile file: everything comes back, and nothing damaged is ever believed."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankopt.errors import ProfileError, RankoptError
from rankopt.profile.profile import Profile
from rankopt.profile.spilled import SpilledArrays
from tests.synthetic import full_profile, recurved, synthetic_profile


def same_arrays(a: Any, b: Any) -> None:
    """Mappings of mappings of arrays, equal to the bit and the dtype."""
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
        return
    assert sorted(a) == sorted(b)
    for key in a:
        same_arrays(a[key], b[key])


def test_everything_survives_saving_and_loading(saved: Path) -> None:
    made, read = full_profile(), Profile.load(saved)
    assert read.info == made.info
    assert read.backends == made.backends == ("fwsvd", "svd")
    assert read.digest() == made.digest()
    for field in ("fisher_rows", "fisher_columns", "traces", "batch_units"):
        same_arrays(getattr(read, field), getattr(made, field))
    same_arrays(read.batch_fisher, made.batch_fisher)
    assert all(curve.on_grid for curve in read.curves["svd"].values())
    assert not any(curve.on_grid for curve in read.curves["fwsvd"].values())
    for backend in made.backends:
        for layer in made.info.layers:
            got, want = (p.loss_curve(backend, layer.name) for p in (read, made))
            same_arrays(got.ranks, want.ranks)
            same_arrays(got.losses, want.losses)
            for member in layer.members:
                same_arrays(read.kept(backend, member), made.kept(backend, member))
    assert sorted(read.kept("svd", "block.1.proj")) == ["basis", "down"]
    assert list(read.kept("svd", "partner.1")) == ["down"]
    assert read.standard_errors() == made.standard_errors()


def test_saving_a_loaded_profile_again_gives_the_same_file(saved: Path, tmp_path: Path) -> None:
    Profile.load(saved).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_a_loaded_profile_can_replace_its_own_file(saved: Path) -> None:
    before = saved.read_bytes()
    Profile.load(saved).save(saved)
    assert saved.read_bytes() == before


def test_kept_arrays_are_read_only_when_asked_for(saved: Path) -> None:
    read = Profile.load(saved)
    kinds = read.kept("fwsvd", "block.0.proj")
    saved.rename(saved.with_name("moved.safetensors"))
    assert list(kinds) == ["basis"]
    with pytest.raises(ProfileError, match="no profile at"):
        _ = kinds["basis"]
    saved.with_name("moved.safetensors").rename(saved)
    assert kinds["basis"].dtype == np.float32


def test_a_profile_without_kept_arrays_answers_with_none(tmp_path: Path) -> None:
    made = synthetic_profile()
    made.save(tmp_path / "p.safetensors")
    for profile in (made, Profile.load(tmp_path / "p.safetensors")):
        assert not profile.kept("fwsvd", "block.0.proj")
        assert profile.kept("fwsvd", "block.0.proj").get("basis") is None


@pytest.mark.parametrize(
    "name",
    ["nolayer/basis.svd", "block.1.proj/basis.pca", "block.1.proj/losses.svd", "block.1.proj/x"],
)
def test_kept_arrays_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(ProfileError, match=rf"{name} is no kept array"):
        dataclasses.replace(synthetic_profile(), kept_arrays={name: np.zeros(1, np.float32)})


def test_kept_arrays_are_float32(tmp_path: Path) -> None:
    made = dataclasses.replace(
        synthetic_profile(), kept_arrays={"block.1.proj/basis.svd": np.zeros((2, 2))}
    )
    with pytest.raises(ProfileError, match=r"block\.1\.proj/basis\.svd.*float32, not float64"):
        made.save(tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


CHANGES: dict[str, Callable[[Profile], dict[str, Any]]] = {
    "rows": lambda p: {"fisher_rows": louder(p.fisher_rows, "block.2.proj")},
    "rows of a partner": lambda p: {"fisher_rows": louder(p.fisher_rows, "partner.1")},
    "columns": lambda p: {"fisher_columns": louder(p.fisher_columns, "block.2.proj")},
    "no columns": lambda p: {"fisher_columns": {}},
    "traces": lambda p: {"traces": louder(p.traces, "block.0.proj")},
    "losses": lambda p: recurved(p, "svd", lambda c: (c.ranks, c.losses * 1.0000001)),
    "ranks": lambda p: recurved(p, "svd", lambda c: (later(c.ranks), c.losses)),
    "batches": lambda p: {"batch_fisher": p.batch_fisher * 1.0000001},  # type: ignore[operator]
    "units": lambda p: {"batch_units": p.batch_units * 1.0000001},  # type: ignore[operator]
    "info": lambda p: {"info": p.info.model_copy(update={"examples": 8})},
}


def louder(arrays: Any, name: str) -> dict[str, Any]:
    return {**arrays, name: arrays[name] * 1.0000001}


def later(grid: Any) -> Any:
    return np.append(grid[:-1], grid[-1] + 1)


@pytest.mark.parametrize("change", CHANGES)
def test_digest_depends_on_every_measure(change: str) -> None:
    made = full_profile()
    changed = dataclasses.replace(made, **CHANGES[change](made))
    assert changed.digest() != made.digest()


def test_digest_does_not_depend_on_kept_arrays() -> None:
    made = full_profile()
    assert dataclasses.replace(made, kept_arrays={}).digest() == made.digest()


@pytest.mark.parametrize("existing", [True, False])
def test_failed_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    path = tmp_path / "p.safetensors"
    if existing:
        synthetic_profile(seed=1).save(path)
    before = path.read_bytes() if existing else None

    monkeypatch.setattr("os.fsync", lambda _: fail())
    with pytest.raises(OSError, match="disk full"):
        synthetic_profile(seed=2).save(path)
    assert (path.read_bytes() if path.exists() else None) == before
    assert [entry.name for entry in tmp_path.iterdir()] == (["p.safetensors"] if existing else [])


def fail() -> None:
    raise OSError("disk full")


@pytest.mark.slow
def test_saving_needs_the_memory_of_one_kept_array(tmp_path: Path) -> None:
    """Ten arrays of 20 MB each, measured in a process of its own."""
    code = """
import resource, sys
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/solvers"]
import numpy as np
from rankopt.profile.spilled import SpilledArrays
from rankopt.profile import Profile
from tests.synthetic import synthetic_profile
import dataclasses

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

folder = sys.argv[1]
made = synthetic_profile([(300, 200)] * 10, backends=["fwsvd"])
with SpilledArrays(folder) as kept:
    made = dataclasses.replace(made, kept_arrays=kept)
    made.save(folder + "/warm")
    before = peak()
    for n in range(10):
        kept[f"block.{n}.proj/basis.fwsvd"] = np.full((5000, 1000), n, np.float32)
    made = dataclasses.replace(made, kept_arrays=kept)
    made.save(folder + "/p")
    print(peak() - before)
again = Profile.load(folder + "/p")
again.save(folder + "/q")
print(peak() - before)
assert again.kept("fwsvd", "block.7.proj")["basis"][-1, -1] == 7
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, Path(__file__).parents[2]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fresh, loaded = map(float, done.stdout.split())
    assert (tmp_path / "p").stat().st_size > 200e6
    # MiB: the array that was made and one copy of it; reading has copies of its own.
    assert fresh < 60 and loaded < 60, done.stdout
    assert sorted(x.name for x in tmp_path.iterdir()) == ["p", "q", "warm"]
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()


def test_profile_whose_arrays_are_gone_cannot_be_saved(tmp_path: Path) -> None:
    with SpilledArrays(tmp_path) as kept:
        kept["block.1.proj/basis.fwsvd"] = np.ones((3, 3), np.float32)
        made = dataclasses.replace(synthetic_profile(), kept_arrays=kept)
    with pytest.raises(RankoptError, match="closed"):
        made.save(tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())
