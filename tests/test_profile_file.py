"""The profile file: everything comes back, and nothing damaged is ever believed."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rankopt.errors import ProfileError
from rankopt.layers import Layer, LeftAlone
from rankopt.profile import Profile, ProfileInfo

SHAPES = ((24, 16), (16, 40), (30, 30), (9, 50))


def synthetic_profile(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    seed: int = 0,
    backends: Sequence[str] = ("fwsvd", "svd"),
    silent: Sequence[int] = (),
    bases: bool = False,
    left_alone: int = 1000,
) -> Profile:
    """Layers with random spectra, made without torch; those in ``silent`` have no energy at all."""
    rng = np.random.default_rng(seed)
    layers = tuple(
        Layer(
            name=f"block.{n}.proj",
            out_features=out,
            in_features=into,
            kind="proj",
            itemsize=4 if n % 2 else 2,
            digest=f"{n:02d}",
        )
        for n, (out, into) in enumerate(shapes)
    )
    rows, energies, kept = {}, {name: {} for name in backends}, {}
    basis_rng = np.random.default_rng(seed)
    for n, layer in enumerate(layers):
        smaller = min(layer.out_features, layer.in_features)
        loud = n not in silent
        rows[layer.name] = rng.gamma(0.5, 10.0**n, layer.in_features) * loud
        for name in backends:
            values = rng.gamma(0.5, 1.0, smaller) * np.exp(-4 * rng.random() * np.arange(smaller))
            energies[name][layer.name] = np.sort(values)[::-1].copy() * 10.0 ** (n % 3) * loud
            if bases:
                columns = (smaller, layer.largest_rank)
                kept[f"{layer.name}/basis.{name}"] = basis_rng.standard_normal(columns, np.float32)
    planned = sum(layer.dense_cost for layer in layers)
    info = ProfileInfo(
        versions={"rankopt": "0", "torch": "2", "transformers": "5"},
        architecture="SyntheticForCausalLM",
        fingerprint="f" * 64,
        task="causal-lm",
        examples=7,
        targets=70,
        data_digest="d" * 64,
        model_parameters=planned + left_alone,
        model_bytes=sum(x.dense_cost * x.itemsize for x in layers) + 4 * left_alone,
        layers=layers,
        left_alone=(
            LeftAlone(name="embed", module="Embedding", parameters=left_alone, reason="tied"),
        ),
    )
    return Profile(info, rows, energies, _bases=kept)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "p.safetensors"
    synthetic_profile(bases=True).save(path)
    return path


def flip_byte_of(path: Path, tensor: str, byte: int = 0, bit: int = 1) -> None:
    """Invert one bit of the tensor, wherever the file holds it."""
    whole = bytearray(path.read_bytes())
    wanted = load_file(path)[tensor].tobytes()
    place = whole.find(wanted)
    assert place > 0
    whole[place + byte] ^= bit
    path.write_bytes(whole)


def test_everything_survives_saving_and_loading(saved: Path) -> None:
    made, read = synthetic_profile(bases=True), Profile.load(saved)
    assert read.info == made.info
    assert read.backends == made.backends == ("fwsvd", "svd")
    assert read.digest() == made.digest()
    for layer in made.info.layers:
        np.testing.assert_array_equal(read.fisher_rows[layer.name], made.fisher_rows[layer.name])
        for name in made.backends:
            got, want = read.spectra(name)[layer.name], made.spectra(name)[layer.name]
            assert got.dtype == np.float64
            np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(
                read.basis(name, layer.name), made.basis(name, layer.name)
            )


def test_saving_a_loaded_profile_again_keeps_its_bases(saved: Path, tmp_path: Path) -> None:
    Profile.load(saved).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").stat().st_size == saved.stat().st_size
    again, made = Profile.load(tmp_path / "again.safetensors"), synthetic_profile(bases=True)
    name = made.info.layers[0].name
    np.testing.assert_array_equal(again.basis("svd", name), made.basis("svd", name))


def test_a_loaded_profile_can_replace_its_own_file(saved: Path) -> None:
    before = synthetic_profile(bases=True).basis("fwsvd", "block.1.proj")
    Profile.load(saved).save(saved)
    np.testing.assert_array_equal(Profile.load(saved).basis("fwsvd", "block.1.proj"), before)


def test_bases_are_read_only_when_asked_for(saved: Path) -> None:
    read = Profile.load(saved)
    saved.rename(saved.with_name("moved.safetensors"))
    with pytest.raises(ProfileError, match="no profile at"):
        read.basis("fwsvd", "block.0.proj")
    saved.with_name("moved.safetensors").rename(saved)
    assert read.basis("fwsvd", "block.0.proj") is not None


def test_a_profile_without_bases_answers_none(tmp_path: Path) -> None:
    made = synthetic_profile()
    assert made.basis("fwsvd", "block.0.proj") is None
    made.save(tmp_path / "p.safetensors")
    assert Profile.load(tmp_path / "p.safetensors").basis("fwsvd", "block.0.proj") is None


@pytest.mark.parametrize("field", ["fisher_rows", "spectrum", "info"])
def test_digest_depends_on_every_measure_but_not_on_bases(field: str) -> None:
    made = synthetic_profile()
    assert synthetic_profile(bases=True).digest() == made.digest()
    rows = {name: array.copy() for name, array in made.fisher_rows.items()}
    spectra = {b: {k: v.copy() for k, v in s.items()} for b, s in made.energies.items()}
    info = made.info
    if field == "fisher_rows":
        rows["block.2.proj"][3] *= 1.0000001
    elif field == "spectrum":
        spectra["svd"]["block.2.proj"][0] *= 1.0000001
    else:
        info = info.model_copy(update={"examples": 8})
    assert Profile(info, rows, spectra).digest() != made.digest()


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


@pytest.mark.parametrize("tensor", ["block.1.proj/fisher_rows", "block.2.proj/energies.svd"])
def test_flipped_bit_in_a_measure_is_found_on_load(saved: Path, tensor: str) -> None:
    flip_byte_of(saved, tensor)
    with pytest.raises(ProfileError, match=r"p\.safetensors is damaged .*profile again"):
        Profile.load(saved)


def test_flipped_sign_in_a_spectrum_is_found_on_load(saved: Path) -> None:
    """Caught before the sha256 is compared, because the numbers themselves are impossible."""
    flip_byte_of(saved, "block.2.proj/energies.svd", byte=7, bit=128)
    with pytest.raises(ProfileError, match=r"p\.safetensors.*block\.2\.proj.*profile again"):
        Profile.load(saved)


def test_flipped_bit_in_a_basis_is_found_when_it_is_read(saved: Path) -> None:
    flip_byte_of(saved, "block.1.proj/basis.fwsvd")
    read = Profile.load(saved)
    assert read.basis("svd", "block.1.proj") is not None
    with pytest.raises(ProfileError, match=r"block\.1\.proj/basis\.fwsvd is damaged") as caught:
        read.basis("fwsvd", "block.1.proj")
    assert str(saved) in str(caught.value)
    with pytest.raises(ProfileError, match="damaged"):
        read.save(saved.with_name("copy.safetensors"))


def rewritten(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], None]) -> None:
    """Save the file again with other tensors or metadata."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def test_profile_with_a_tensor_taken_out_is_refused(saved: Path) -> None:
    rewritten(saved, lambda tensors, _: tensors.__delitem__("block.1.proj/energies.svd"))
    with pytest.raises(ProfileError, match=r"block\.1\.proj/energies\.svd.*missing"):
        Profile.load(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rankopt", "{"),
        ("rankopt", "{}"),
        ("rankopt", "[" * 100_000),
        ("backends", "fwsvd"),
        ("backends", "7"),
        ("backends", '{"fwsvd": 1}'),
        ("sha256", "0" * 64),
    ],
)
def test_damaged_description_is_refused(saved: Path, key: str, value: str) -> None:
    rewritten(saved, lambda _, metadata: metadata.update({key: value}))
    with pytest.raises(ProfileError, match=r"p\.safetensors"):
        Profile.load(saved)


@pytest.mark.parametrize("key", ["rankopt", "backends", "sha256"])
def test_description_with_a_part_missing_is_refused(saved: Path, key: str) -> None:
    rewritten(saved, lambda _, metadata: metadata.__delitem__(key))
    with pytest.raises(ProfileError, match=r"p\.safetensors"):
        Profile.load(saved)


def test_profile_of_a_later_format_is_refused(saved: Path) -> None:
    later = (
        synthetic_profile()
        .info.model_dump_json()
        .replace('"format_version":1', '"format_version":2')
    )
    rewritten(saved, lambda _, metadata: metadata.update({"rankopt": later}))
    with pytest.raises(ProfileError, match="format_version"):
        Profile.load(saved)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e-300])
@pytest.mark.parametrize("where", ["fisher_rows", "svd"])
def test_impossible_numbers_are_refused_naming_the_layer(value: float, where: str) -> None:
    made = synthetic_profile()
    arrays = made.fisher_rows if where == "fisher_rows" else made.energies[where]
    changed = {name: array.copy() for name, array in arrays.items()}
    changed["block.2.proj"][-1] = value
    rows = changed if where == "fisher_rows" else made.fisher_rows
    energies = made.energies if where == "fisher_rows" else {**made.energies, where: changed}
    with pytest.raises(ProfileError, match=r"block\.2\.proj.*NaN, infinite or negative"):
        Profile(made.info, rows, energies)


def test_unsorted_spectrum_is_refused_naming_the_layer() -> None:
    made = synthetic_profile()
    changed = {**made.energies["fwsvd"], "block.1.proj": np.arange(16.0)}
    with pytest.raises(ProfileError, match=r"block\.1\.proj.*fwsvd.*not sorted"):
        Profile(made.info, made.fisher_rows, {"fwsvd": changed})


@pytest.mark.parametrize("size", [15, 17])
def test_spectrum_of_the_wrong_length_is_refused(size: int) -> None:
    made = synthetic_profile()
    changed = {**made.energies["fwsvd"], "block.1.proj": np.zeros(size)}
    with pytest.raises(ProfileError, match=r"block\.1\.proj.*spectrum of 16"):
        Profile(made.info, made.fisher_rows, {"fwsvd": changed})


def test_backend_that_was_not_measured_names_those_that_were() -> None:
    with pytest.raises(ProfileError, match=r"'svd', only for fwsvd.*--backend svd"):
        synthetic_profile(backends=["fwsvd"]).spectra("svd")


@pytest.mark.parametrize("existing", [True, False])
def test_failed_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    path = tmp_path / "p.safetensors"
    if existing:
        synthetic_profile(seed=1).save(path)
    before = path.read_bytes() if existing else None

    def half(tensors: object, place: Path, metadata: object) -> None:
        Path(place).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        synthetic_profile(seed=2).save(path)
    assert (path.read_bytes() if path.exists() else None) == before
    assert [entry.name for entry in tmp_path.iterdir()] == (["p.safetensors"] if existing else [])


def test_changed_copy_is_planned_anew() -> None:
    """Tables of options are kept with a profile; a copy must not inherit them."""
    from rankopt import make_plan

    made = synthetic_profile()
    make_plan(made, keep=0.6)
    other = synthetic_profile(seed=5)
    copy = dataclasses.replace(made, energies=other.energies)
    assert make_plan(copy, keep=0.6).certificate == make_plan(other, keep=0.6).certificate
