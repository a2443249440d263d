"""Files and folders are whole or not there; arrays are in memory one at a time."""

import gc
import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rankopt.errors import RankoptError, WriteError
from rankopt.files import partial_of, require_free, whole_file, whole_folder
from rankopt.profile.spilled import SpilledArrays
from rankopt.profile.tensors import DTYPES, LazyArray, write_safetensors


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def written(path: Path, name: str) -> None:
    """A folder of ours with one file."""
    with whole_folder(path) as temporary:
        (temporary / name).write_text(name)


@pytest.mark.parametrize("existing", [True, False])
def test_file_appears_whole_under_its_name_only_at_the_end(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "plan.json"
    if existing:
        path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.exists() == existing
        assert not existing or path.read_text() == "old"
        assert temporary.parent.parent == tmp_path
    assert path.read_text() == "new"
    assert names(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_interrupted_file_leaves_the_old_one(
    tmp_path: Path, existing: bool, failure: type[BaseException]
) -> None:
    path = tmp_path / "plan.json"
    if existing:
        path.write_text("old")

    def interrupted() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        interrupted()
    assert names(tmp_path) == (["plan.json"] if existing else [])
    assert not existing or path.read_text() == "old"


def test_file_that_was_never_written_is_an_error_and_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(WriteError, match="No such file"), whole_file(path):
        pass
    assert path.read_text() == "old"


def test_file_and_folder_need_an_existing_parent(tmp_path: Path) -> None:
    with (
        pytest.raises(RankoptError, match=r"none/plan\.json: the folder .*none does not exist"),
        whole_file(tmp_path / "none" / "plan.json"),
    ):
        pass
    with (
        pytest.raises(RankoptError, match=r"none/model: the folder .*none does not exist"),
        whole_folder(tmp_path / "none" / "model"),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("state", ["absent", "empty", "full"])
def test_folder_appears_whole_and_replaces_everything(tmp_path: Path, state: str) -> None:
    path = tmp_path / "model"
    if state != "absent":
        path.mkdir()
    if state == "full":
        path.rmdir()
        written(path, "old")
    with whole_folder(path, overwrite=state == "full") as temporary:
        (temporary / "new").write_text("new")
        assert path.exists() == (state != "absent")
        assert not (path / "new").exists()
    assert names(path) == ["new", "rankopt_files.json"]
    assert names(tmp_path) == ["model"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("state", ["absent", "empty", "full"])
def test_interrupted_folder_leaves_the_old_one(tmp_path: Path, state: str) -> None:
    path = tmp_path / "model"
    if state != "absent":
        path.mkdir()
    if state == "full":
        path.rmdir()
        written(path, "old")

    def interrupted() -> None:
        with whole_folder(path, overwrite=True) as temporary:
            (temporary / "new").write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        interrupted()
    assert names(tmp_path) == ([] if state == "absent" else ["model"])
    assert state != "full" or names(path) == ["old", "rankopt_files.json"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_taken_place_is_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    if kind == "file":
        path.write_text("old")
    else:
        path.mkdir()
        (path / "old").write_text("old")
    entered = False
    with pytest.raises(RankoptError, match="model exists and is not empty"), whole_folder(path):
        entered = True
    assert not entered
    assert names(tmp_path) == ["model"]


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("old")
    with (
        pytest.raises(RankoptError, match="model is a file"),
        whole_folder(path, overwrite=True),
    ):
        pass
    assert path.read_text() == "old"


def test_free_places_are_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert require_free("model", False) == Path("model")
    with whole_file("plan.json") as temporary:
        temporary.write_text("{}")
    assert names(tmp_path) == ["plan.json"]


def array_of(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any bits at all, NaN among them."""
    random = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    if dtype == np.bool_:
        return (np.frombuffer(random, np.uint8) % 2 == 1).reshape(shape)
    return np.frombuffer(random, dtype).reshape(shape)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    described=st.dictionaries(
        TEXT.filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from([*DTYPES.values(), np.dtype(">f8"), np.dtype(">i4")]),
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
            st.sampled_from(["plain", "lazy", "turned"]),
        ),
        max_size=6,
    ),
    metadata=st.dictionaries(TEXT, st.text(st.characters(exclude_categories=["Cs"]))),
)
def test_the_library_reads_what_is_written_one_array_at_a_time(
    tmp_path_factory: pytest.TempPathFactory, described: Any, metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    arrays = {
        name: array_of(dtype, shape, seed) for seed, (name, (dtype, shape, _)) in
        enumerate(described.items())
    }  # fmt: skip
    entries: dict[str, Any] = {}
    for name, (dtype, shape, way) in described.items():
        array = arrays[name]
        if way == "turned":
            arrays[name] = entries[name] = array.T
        elif way == "lazy":
            entries[name] = LazyArray(dtype, shape, lambda array=array: array)  # type: ignore[misc]
        else:
            entries[name] = array
    write_safetensors(path, entries, metadata)
    with safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == sorted(arrays)
        assert (file.metadata() or {}) == metadata
        for name, wanted in arrays.items():
            found = file.get_tensor(name)
            assert found.dtype == wanted.dtype.newbyteorder("=")
            assert found.shape == wanted.shape
            native = np.ascontiguousarray(wanted, dtype=found.dtype).reshape(wanted.shape)
            assert found.tobytes() == native.tobytes()
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0
    header = json.loads(path.read_bytes()[8 : 8 + length])
    for name in arrays:
        # Every array can be mapped where it lies.
        assert header[name]["data_offsets"][0] % arrays[name].dtype.itemsize == 0


def test_every_dtype_is_called_what_the_library_calls_it(tmp_path: Path) -> None:
    arrays = {code: np.zeros(3, dtype) for code, dtype in DTYPES.items()}
    save_file(arrays, tmp_path / "theirs")
    write_safetensors(tmp_path / "ours", arrays)
    for path in (tmp_path / "theirs", tmp_path / "ours"):
        with safe_open(path, framework="numpy") as file:
            assert {code: file.get_slice(code).get_dtype() for code in arrays} == {
                code: code for code in arrays
            }


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": np.zeros(3, np.complex128)}, "a: safetensors files have no arrays of complex128"),
        ({"a": np.array(["x"], dtype=object)}, "a: safetensors files have no arrays of object"),
        ({"__metadata__": np.zeros(3)}, "__metadata__: this name belongs to the header"),
        (
            {"b": LazyArray(np.dtype(float), (3,), lambda: np.zeros(4))},
            r"b: announced as float64 \(3,\), got float64 \(4,\)",
        ),
        (
            {"b": LazyArray(np.dtype(float), (3,), lambda: np.zeros(3, np.float32))},
            r"b: announced as float64 \(3,\), got float32",
        ),
        ({"n" * 100_000_001: np.zeros(1)}, "1 arrays: the header takes 100,000,"),
    ],
    ids=["complex", "object", "reserved", "longer", "narrower", "header"],
)
def test_what_cannot_be_written_leaves_no_file(
    tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "x", entries)
    assert names(tmp_path) == []


def test_array_that_cannot_be_read_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def gone() -> np.ndarray:
        raise OSError("gone")

    lazy = LazyArray(np.dtype(np.float32), (2,), gone)
    with pytest.raises(OSError, match="gone"):
        write_safetensors(path, {"a": np.zeros(9), "b": lazy})
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_only_one_array_is_in_memory_at_a_time(tmp_path: Path) -> None:
    class Counted(np.ndarray):
        alive = 0
        most = 0

        def __del__(self) -> None:
            if self.base is None:
                Counted.alive -= 1

    class Loaded(Mapping[str, np.ndarray]):
        """Makes an array at each access and keeps none."""

        def __getitem__(self, name: str) -> np.ndarray:
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)
            return Counted((4, 4), np.float32)

        def __iter__(self) -> Iterator[str]:
            return iter("abcde")

        def __len__(self) -> int:
            return 5

    write_safetensors(tmp_path / "x", Loaded())
    assert len(load_file(tmp_path / "x")) == 5
    assert (Counted.alive, Counted.most) == (0, 1)


def test_spilled_arrays_are_a_mapping_on_the_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kept: dict[str, Any] = {
        "a/b.c": rng.standard_normal((30, 20)),
        "none": np.zeros((0, 5), np.float32),
        "one": np.array(3, np.int64),
        "turned": np.asfortranarray(rng.standard_normal((4, 7)).astype(np.float32)),
    }
    with SpilledArrays(tmp_path) as arrays:
        arrays.update(kept)
        assert set(arrays) == set(kept) and len(arrays) == 4 and "one" in arrays
        assert isinstance(arrays["a/b.c"], np.memmap)
        for name, wanted in kept.items():
            assert arrays[name].dtype == wanted.dtype and arrays[name].shape == wanted.shape
            np.testing.assert_array_equal(arrays[name], wanted)
        first = arrays["one"]
        arrays["one"] = np.arange(3)
        assert arrays["one"].tolist() == [0, 1, 2] and first == 3
        del arrays["none"]
        with pytest.raises(KeyError, match="none"):
            _ = arrays["none"]
        (folder,) = tmp_path.iterdir()
        assert len(list(folder.iterdir())) == len(arrays) == 3
        with pytest.raises(ValueError, match="read-only"):
            arrays["one"][0] = 5
        with pytest.raises(ValueError, match="pickle"):
            arrays["object"] = np.array([None])
        assert "object" not in arrays
        write_safetensors(tmp_path / "x", arrays)
        large = arrays["a/b.c"]
    np.testing.assert_array_equal(load_file(tmp_path / "x")["turned"], kept["turned"])
    np.testing.assert_array_equal(large, kept["a/b.c"])
    assert names(tmp_path) == ["x"]


def test_spilled_arrays_leave_nothing_behind(tmp_path: Path) -> None:
    def fails() -> None:
        with SpilledArrays(tmp_path) as arrays:
            arrays["a"] = np.zeros(3)
            assert len(names(tmp_path)) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert names(tmp_path) == []
    forgotten = SpilledArrays(tmp_path)
    forgotten["a"] = np.zeros(3)
    del forgotten
    gc.collect()
    assert names(tmp_path) == []
    closed = SpilledArrays(tmp_path)
    closed["a"] = np.zeros(3)
    closed.close()
    closed.close()
    for use in (lambda: closed["a"], lambda: closed.update(b=np.zeros(1))):
        with pytest.raises(RankoptError, match="closed: its arrays are gone"):
            use()
    with pytest.raises(RankoptError, match="the folder does not exist"):
        SpilledArrays(tmp_path / "none")


def test_arrays_are_spilled_from_several_threads(tmp_path: Path) -> None:
    together = threading.Barrier(8)
    with SpilledArrays(tmp_path) as arrays:

        def put(thread: int) -> None:
            together.wait()
            for n in range(25):
                arrays[f"{thread}/{n}"] = np.full(100, 1000 * thread + n)
                arrays["shared"] = np.full(100, thread)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(8)))
        assert len(arrays) == 201
        for thread in range(8):
            for n in range(25):
                assert set(arrays[f"{thread}/{n}"].tolist()) == {1000 * thread + n}
        assert len(set(arrays["shared"].tolist())) == 1
        assert len(list(arrays.folder.iterdir())) == 201


def test_what_a_stopped_run_leaves_lies_beside_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = tmp_path.with_name(f"{tmp_path.name}.partial")
    assert [partial_of(name) for name in (".", "", "sub/..")] == [beside] * 3
    assert partial_of("sub/p.st") == Path("sub/p.st.partial")
    with pytest.raises(RankoptError, match="cannot write /: nothing lies beside it"):
        partial_of("/")
