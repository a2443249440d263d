"""Nothing damaged is ever believed: truncated, flipped, rewritten, or of another format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rankopt.errors import ProfileError
from rankopt.profile.profile import Profile
from tests.synthetic import full_profile, synthetic_profile


def flip_byte_of(path: Path, tensor: str, byte: int = 0, bit: int = 1) -> None:
    """Invert one bit of the tensor, wherever the file holds it."""
    whole = bytearray(path.read_bytes())
    wanted = load_file(path)[tensor].tobytes()
    place = whole.find(wanted)
    assert place > 0
    whole[place + byte] ^= bit
    path.write_bytes(whole)


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
