"""The profile file: everything comes back, and nothing damaged is ever believed."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from rankopt.errors import OptionError, ProfileError, RankoptError
from rankopt.layers import DENSE
from rankopt.profile.curves import LossCurve
from rankopt.profile.info import BackendInfo, ProfileInfo, ScaleInfo
from rankopt.profile.jackknife import relative_standard_errors
from rankopt.profile.profile import Profile
from rankopt.profile.spilled import SpilledArrays
from tests.synthetic import backend_info, full_profile, synthetic_profile


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "p.safetensors"
    full_profile().save(path)
    return path


def flip_byte_of(path: Path, tensor: str, byte: int = 0, bit: int = 1) -> None:
    """Invert one bit of the tensor, wherever the file holds it."""
    whole = bytearray(path.read_bytes())
    wanted = load_file(path)[tensor].tobytes()
    place = whole.find(wanted)
    assert place > 0
    whole[place + byte] ^= bit
    path.write_bytes(whole)


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


def recurved(profile: Profile, backend: str, change: Any) -> dict[str, Any]:
    """The field ``curves`` with the curve of the third layer changed."""
    layer = "block.2.proj"
    curve = profile.curves[backend][layer]
    changed = {**profile.curves[backend], layer: LossCurve(*change(curve), curve.on_grid)}
    return {"curves": {**profile.curves, backend: changed}}


@pytest.mark.parametrize("change", CHANGES)
def test_digest_depends_on_every_measure(change: str) -> None:
    made = full_profile()
    changed = dataclasses.replace(made, **CHANGES[change](made))
    assert changed.digest() != made.digest()


def test_digest_does_not_depend_on_kept_arrays() -> None:
    made = full_profile()
    assert dataclasses.replace(made, kept_arrays={}).digest() == made.digest()


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.3, 0.9, 0.9999])
def test_truncated_file_is_refused(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ProfileError, match=r"p\.safetensors .*rankopt profile.* again"):
        Profile.load(saved)


@pytest.mark.parametrize("content", [b"garbage", b"\0" * 64, b"{}" * 500, b"\xff" * 4096])
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=r"p\.safetensors .*rankopt profile"):
        Profile.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_file_of_something_else_is_refused(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros((2, 2), np.float32)}, path, metadata)
    with pytest.raises(ProfileError, match=r"model\.safetensors .*not a rankopt profile"):
        Profile.load(path)


@pytest.mark.parametrize("place", ["missing.safetensors", "."])
def test_missing_file_says_how_to_make_one(tmp_path: Path, place: str) -> None:
    with pytest.raises(ProfileError, match="make one with `rankopt profile`") as caught:
        Profile.load(tmp_path / place)
    assert str(tmp_path / place) in str(caught.value)


@pytest.mark.parametrize(
    "tensor", ["block.1.proj/fisher_rows", "block.2.proj/losses.svd", "batches/fisher"]
)
def test_flipped_bit_in_a_measure_is_found_on_load(saved: Path, tensor: str) -> None:
    flip_byte_of(saved, tensor)
    with pytest.raises(ProfileError, match=r"p\.safetensors is damaged .*profile again"):
        Profile.load(saved)


def test_flipped_sign_in_a_curve_is_found_on_load(saved: Path) -> None:
    """Caught before the sha256 is compared, because the numbers themselves are impossible."""
    flip_byte_of(saved, "block.2.proj/losses.svd", byte=7, bit=128)
    with pytest.raises(ProfileError, match=r"p\.safetensors.*block\.2\.proj.*profile again"):
        Profile.load(saved)


def test_flipped_bit_in_a_kept_array_is_found_when_it_is_read(saved: Path) -> None:
    flip_byte_of(saved, "block.1.proj/basis.fwsvd")
    read = Profile.load(saved)
    assert read.kept("svd", "block.1.proj")["basis"].size
    with pytest.raises(ProfileError, match=r"block\.1\.proj/basis\.fwsvd is damaged") as caught:
        _ = read.kept("fwsvd", "block.1.proj")["basis"]
    assert str(saved) in str(caught.value)
    with pytest.raises(ProfileError, match="damaged"):
        read.save(saved.with_name("copy.safetensors"))
    assert not saved.with_name("copy.safetensors").exists()


def test_file_that_was_replaced_since_it_was_opened_is_not_believed(saved: Path) -> None:
    read = Profile.load(saved)
    synthetic_profile(seed=1, bases=True).save(saved)
    with pytest.raises(ProfileError, match="damaged"):
        _ = read.kept("fwsvd", "block.1.proj")["basis"]


def rewritten(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], None]) -> None:
    """Save the file again with other tensors or metadata."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def test_profile_with_a_tensor_taken_out_is_refused(saved: Path) -> None:
    for name in ("block.1.proj/losses.svd", "partner.1/fisher_rows"):
        full_profile().save(saved)
        rewritten(saved, lambda tensors, _, name=name: tensors.__delitem__(name))  # type: ignore[misc]
        with pytest.raises(ProfileError, match=rf"{name}.*missing"):
            Profile.load(saved)
    full_profile().save(saved)
    rewritten(saved, lambda tensors, _: tensors.__delitem__("batches/units"))
    with pytest.raises(ProfileError, match="belong together"):
        Profile.load(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rankopt", "{"),
        ("rankopt", "{}"),
        ("rankopt", "[" * 100_000),
        ("kept", "basis"),
        ("kept", "7"),
        ("kept", "[" * 100_000),
        ("kept", '{"a": 1, "a": 1}'),
        ("kept", '{"block.1.proj/basis.pca": "0"}'),
        ("sha256", "0" * 64),
    ],
)
def test_damaged_description_is_refused(saved: Path, key: str, value: str) -> None:
    rewritten(saved, lambda _, metadata: metadata.update({key: value}))
    with pytest.raises(ProfileError, match=r"p\.safetensors"):
        Profile.load(saved)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("model_parameters", 5, "of 5 parameters are planned"),
        ("model_parameters", 2**62 + 1, "parameters are planned"),
        ("model_bytes", 5, "of 5 bytes are planned"),
        ("model_bytes", 10**400, "has 401 digits"),
        ("layers", [], "factors for 0 layers"),
        ("units", float("nan"), "NaN is not a number"),
        ("architecture", [[]], "architecture: Input should be a valid string"),
        ("examples", 0, "examples: Input should be greater than or equal to 1"),
        ("targets", 0, "targets: Input should be greater than or equal to 1"),
    ],
)
def test_impossible_description_is_refused_in_one_line(
    saved: Path, key: str, value: Any, complaint: str
) -> None:
    def change(_: object, metadata: dict[str, str]) -> None:
        metadata["rankopt"] = json.dumps({**json.loads(metadata["rankopt"]), key: value})

    rewritten(saved, change)
    with pytest.raises(ProfileError, match=complaint) as caught:
        Profile.load(saved)
    assert "\n" not in str(caught.value)


def header_changed(path: Path, name: str, **changes: Any) -> None:
    """Announce an array as something else, and seal nothing."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header[name] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def test_dtype_that_profiles_have_not_is_refused_before_it_is_read(saved: Path) -> None:
    name = "block.0.proj/fisher_rows"
    header_changed(saved, name, dtype="BF16", shape=[4 * 16])
    with pytest.raises(ProfileError, match=rf"{name} is of dtype BF16, which no profile has"):
        Profile.load(saved)


def test_header_longer_than_the_file_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in (10**18, 2**64 - 1, len(content), 0):
        saved.write_bytes(length.to_bytes(8, "little") + content[8:])
        with pytest.raises(ProfileError, match="truncated or not a profile"):
            Profile.load(saved)


def test_arrays_too_large_for_any_profile_are_not_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankopt.profile.tensors.MOST_BYTES", 1000)
    with pytest.raises(ProfileError, match=r"the measures take .* GiB, .*not a profile"):
        Profile.load(saved)


@pytest.mark.parametrize("key", ["rankopt", "kept", "sha256"])
def test_description_with_a_part_missing_is_refused(saved: Path, key: str) -> None:
    rewritten(saved, lambda _, metadata: metadata.__delitem__(key))
    with pytest.raises(ProfileError, match=r"p\.safetensors"):
        Profile.load(saved)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (1, r"p\.safetensors was made by an older rankopt .*profile again"),
        (3, r"p\.safetensors has format_version 3; this rankopt reads 2"),
        ("2", r"p\.safetensors has format_version '2'"),
    ],
)
def test_profile_of_another_format_is_refused(saved: Path, version: Any, message: str) -> None:
    content = json.loads(synthetic_profile().info.model_dump_json())
    other = json.dumps({**content, "format_version": version})
    rewritten(saved, lambda _, metadata: metadata.update({"rankopt": other}))
    with pytest.raises(ProfileError, match=message):
        Profile.load(saved)


def damaged(where: str, value: float) -> dict[str, Any]:
    """A full profile's field with one number replaced, in the third layer or the third batch."""
    made = full_profile()
    if where == "batch_units":
        assert made.batch_units is not None
        return {where: np.append(made.batch_units[:-1], value)}
    if where == "losses":
        return recurved(made, "fwsvd", lambda c: (c.ranks, np.append(c.losses[:-1], value)))
    arrays = getattr(made, where)
    name = "block.0.proj" if where == "traces" else "block.2.proj"
    return {where: {**arrays, name: np.append(arrays[name][:-1], value)}}


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e-300])
@pytest.mark.parametrize("where", ["fisher_rows", "fisher_columns", "traces", "losses"])
def test_impossible_numbers_are_refused_naming_the_layer(value: float, where: str) -> None:
    with pytest.raises(ProfileError, match=r"block\.\d\.proj.*NaN, infinite or negative"):
        dataclasses.replace(full_profile(), **damaged(where, value))
    with pytest.raises(ProfileError, match="batches' units holds NaN"):
        dataclasses.replace(full_profile(), **damaged("batch_units", value))


def with_curve(losses: Any, ranks: Any = None, layer: str = "block.1.proj") -> Profile:
    """A profile with one curve replaced; the layer is 16 x 40."""
    made = synthetic_profile()
    values = np.asarray(losses)
    curve = LossCurve.complete(values) if ranks is None else LossCurve(np.asarray(ranks), values)
    changed = {**made.curves["fwsvd"], layer: curve}
    return dataclasses.replace(made, curves={**made.curves, "fwsvd": changed})


@pytest.mark.parametrize(
    ("losses", "ranks", "message"),
    [
        (np.arange(17.0), None, "rises with the rank"),
        (np.zeros(16), None, "17 float64 losses"),
        (np.zeros(18), None, "17 float64 losses"),
        (np.zeros(17, np.float32), None, "17 float64 losses.*float32"),
        (np.zeros((17, 1)), None, "17 float64 losses"),
        (np.zeros(3), [0, 2], "2 float64 losses"),
        (np.zeros(2), [1, 2], "ranks from 0 to at most 16"),
        (np.zeros(2), [0, 17], "ranks from 0 to at most 16"),
        (np.zeros(2), [0.0, 2.0], "ranks from 0"),
        (np.zeros(0), np.zeros(0, np.int64), "ranks from 0"),
        (np.zeros(3), [0, 4, 4], "do not increase"),
    ],
)
def test_impossible_curves_are_refused_naming_the_layer(
    losses: Any, ranks: Any, message: str
) -> None:
    with pytest.raises(ProfileError, match=rf"block\.1\.proj: the fwsvd.*{message}"):
        with_curve(losses, ranks)


def test_curve_knows_its_own_ranks_only() -> None:
    curve = LossCurve(np.array([0, 2, 5]), np.array([3.0, 1.0, 0.5]))
    assert curve.full == 3.0
    assert curve.at(np.array([5, DENSE, 0, 2])).tolist() == [0.5, 0.0, 3.0, 1.0]
    for missing in (1, 6):
        with pytest.raises(ProfileError, match=f"no rank {missing}"):
            curve.at(np.array([2, missing]))


@pytest.mark.parametrize(
    "statistics",
    [
        {"fisher_rows": {"partner.1": np.ones(41)}},
        {"fisher_rows": {"block.1.proj": np.ones(16)}},
        {"fisher_rows": {"block.1.proj": np.ones(40, np.float32)}},
        {"fisher_columns": {"block.1.proj": np.ones(40)}},
        {"fisher_columns": {"partner.1": np.ones(16)}},
        {"traces": {"block.1.proj": np.ones(2)}},
    ],
)
def test_misshapen_statistics_are_refused_naming_the_layer(statistics: dict[str, Any]) -> None:
    ((field, changed),) = statistics.items()
    (name,) = changed
    made = full_profile()
    with pytest.raises(ProfileError, match=rf"layer {name}: its .* must be float64"):
        dataclasses.replace(made, **{field: {**getattr(made, field), **changed}})


def test_a_partner_has_rows_of_either_side_and_columns_of_the_other() -> None:
    made = full_profile()
    turned = dataclasses.replace(
        made,
        fisher_rows={**made.fisher_rows, "partner.1": np.ones(40)},
        fisher_columns={**made.fisher_columns, "partner.1": np.ones(16)},
    )
    own = made.fisher_rows["block.1.proj"].sum()
    assert turned.fisher_trace("block.1.proj") == pytest.approx(own + 40.0)
    assert made.fisher_trace("block.1.proj") == pytest.approx(
        own + made.fisher_rows["partner.1"].sum()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": 0.0}, "units"),
        ({"units": math.nan}, "units"),
        ({"estimator": "guessed"}, "estimator"),
        ({"backends": ()}, "backends"),
        ({"format_version": 1}, "format_version"),
    ],
)
def test_impossible_descriptions_are_refused(change: dict[str, Any], message: str) -> None:
    content = dict(synthetic_profile().info) | change
    with pytest.raises(ValidationError, match=message):
        ProfileInfo(**content)


def test_factors_and_names_must_match_the_layers() -> None:
    info = synthetic_profile().info
    content = dict(info)
    short = backend_info("fwsvd", info.layers[1:])
    for change, message in (
        ({"backends": (short,)}, "scale nats of backend fwsvd has 3 factors for 4 layers"),
        ({"backends": info.backends[:1] * 2}, "backend fwsvd is there twice"),
        ({"layers": (info.layers[0], *info.layers[:3])}, r"layer block\.0\.proj is there twice"),
    ):
        with pytest.raises(ValidationError, match=message):
            ProfileInfo(**{**content, **change})
    for name in ("a/b", "a.b", "", "a b"):
        with pytest.raises(ValidationError, match="name"):
            BackendInfo(name=name, source="", scales=info.backends[0].scales)
    with pytest.raises(ValidationError, match="factors"):
        ScaleInfo(name="nats", unit="nats", factors=(1.0, math.inf))


def test_backend_that_was_not_measured_names_those_that_were() -> None:
    made = synthetic_profile(backends=["fwsvd"])
    for ask in (made.backend, lambda name: made.loss_curve(name, "block.0.proj")):
        with pytest.raises(ProfileError, match=r"'svd', only for fwsvd.*--backend svd"):
            ask("svd")
    assert made.backend().name == "fwsvd"
    assert made.backend().find_scale().name == "nats"
    with pytest.raises(OptionError, match="no scale 'metric'; known: nats, sum"):
        made.backend().find_scale("metric")


def by_hand(sums: np.ndarray, units: np.ndarray) -> list[float]:
    """Leave out one batch at a time, in a loop and in plain words."""
    n, found = len(units), []
    for layer in range(sums.shape[1]):
        s = sums[:, layer]
        whole = math.fsum(s) / math.fsum(units)
        without = [math.fsum(np.delete(s, b)) / math.fsum(np.delete(units, b)) for b in range(n)]
        mean = math.fsum(without) / n
        variance = (n - 1) / n * math.fsum((x - mean) ** 2 for x in without)
        found.append(math.sqrt(variance) / whole if whole else 0.0)
    return found


@settings(max_examples=100, deadline=None)
@given(
    batches=st.integers(2, 9),
    layers=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1e-200, 1e-6, 1.0, 1e200]),
    silent=st.booleans(),
)
def test_standard_errors_are_those_of_leaving_out_one_batch(
    batches: int, layers: int, seed: int, size: float, silent: bool
) -> None:
    rng = np.random.default_rng(seed)
    sums, units = rng.gamma(0.5, 1.0, (batches, layers)), rng.integers(1, 9, batches) * 1.0
    if silent:
        sums[:, 0] = 0.0
    wanted = by_hand(sums, units)
    np.testing.assert_allclose(relative_standard_errors(sums * size, units), wanted, rtol=1e-7)
    empty = np.vstack([sums, np.zeros(layers)]), np.append(units, 0.0)
    np.testing.assert_allclose(relative_standard_errors(*empty), wanted, rtol=1e-7)


def test_standard_errors_are_the_spread_of_repeated_measurements() -> None:
    """Of equal batches it is the textbook's s/sqrt(n); and repeating the measurement agrees."""
    rng = np.random.default_rng(0)
    sums, ones = rng.gamma(2.0, 1.0, (400, 1)), np.ones(400)
    (found,) = relative_standard_errors(sums, ones)
    assert found == pytest.approx(sums.std(ddof=1) / math.sqrt(400) / sums.mean(), rel=1e-9)
    units = rng.integers(1, 5, (2000, 30)) * 1.0
    values = rng.gamma(2.0, units)
    ratios = values.sum(1) / units.sum(1)
    each = [relative_standard_errors(v[:, None], u)[0] for v, u in zip(values, units, strict=True)]
    assert np.mean(each) == pytest.approx(ratios.std() / ratios.mean(), rel=0.1)


@pytest.mark.parametrize("tiny", [5e-324, 1e-300, 1e-18])
def test_batches_that_vanish_beside_one_leave_it_unsure_and_not_nan(tiny: float) -> None:
    units = np.array([tiny, tiny, tiny, 1.0])
    found = relative_standard_errors(np.ones((4, 2)), units)
    assert (found > 1e6).all()
    # Leaving any batch out of these leaves the same ratio of sums to units.
    assert relative_standard_errors(units[:, None], units) == pytest.approx(0.0, abs=1e-6)


def test_fewer_than_two_batches_are_infinitely_unsure_and_none_is_nan() -> None:
    made = full_profile()
    assert all(0 < error < 1 for error in made.standard_errors().values())
    assert list(made.standard_errors()) == [layer.name for layer in made.info.layers]
    assert made.batch_fisher is not None and made.batch_units is not None
    for count in (0, 1):
        few = dataclasses.replace(
            made, batch_fisher=made.batch_fisher[:count], batch_units=made.batch_units[:count]
        )
        assert set(few.standard_errors().values()) == {math.inf}
    assert set(synthetic_profile().standard_errors().values()) == {math.inf}
    with pytest.raises(ProfileError, match="belong together"):
        dataclasses.replace(made, batch_units=None)
    with pytest.raises(ProfileError, match="batches' Fisher must be"):
        dataclasses.replace(made, batch_fisher=made.batch_fisher[:-1])


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


def test_changed_copy_is_planned_anew() -> None:
    """Tables of options are kept with a profile; a copy must not inherit them."""
    from rankopt import make_plan

    made = synthetic_profile()
    make_plan(made, keep=0.6)
    other = synthetic_profile(seed=5)
    copy = dataclasses.replace(made, curves=other.curves)
    assert make_plan(copy, keep=0.6).certificate == make_plan(other, keep=0.6).certificate
