"""What is somebody else's is never replaced, and what the system refuses is said in one line."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rankopt import Plan, Profile
from rankopt.errors import RankoptError, WriteError, printable
from rankopt.files import (
    PLAN,
    PROFILE,
    format_of,
    is_format,
    require_file,
    require_free,
    whole_file,
    whole_folder,
)
from rankopt.profile.spilled import SpilledArrays
from rankopt.profile.tensors import write_safetensors

GOLDEN = Path(__file__).parent / "golden"


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file, and where links lead."""
    return {
        path.relative_to(folder).as_posix(): (
            os.readlink(path) if path.is_symlink() else path.read_bytes()
        )
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def model_folder(path: Path, overwrite: bool = False) -> None:
    with whole_folder(path, overwrite) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "sub").mkdir()
        (folder / "sub" / "model.safetensors").write_text("weights")


def test_files_of_ours_say_what_they_are(tmp_path: Path) -> None:
    assert format_of(GOLDEN / "plan_v1.json") == "rankopt-plan"
    assert format_of(GOLDEN / "profile_v2.safetensors") == "rankopt-profile"
    for name, content in {
        "empty": b"",
        "short": b"{",
        "nested": b'{"plans": [{"format": "rankopt-plan"}]}',
        "list": b'["format"]',
        "deep": b'{"a":' * 100_000,
        "header": b"\xff\x00\x00\x00\x00\x00\x00\x00{",
        "long header": b"\xff" * 8 + b"{",
        "text": b'a "format": "rankopt-plan"',
    }.items():
        (tmp_path / name).write_bytes(content)
        assert format_of(tmp_path / name) is None, name
    assert format_of(tmp_path) is None and format_of(tmp_path / "none") is None
    save_file({"a": np.zeros(3)}, tmp_path / "other", {"format": "pt"})
    assert format_of(tmp_path / "other") == "pt"


@pytest.mark.parametrize("kind", ["plan", "profile"])
@pytest.mark.parametrize("there", ["weights", "text", "the other", "link", "folder", "fifo"])
def test_plan_and_profile_replace_their_own_kind_only(
    tmp_path: Path, kind: str, there: str
) -> None:
    plan = Plan.load(GOLDEN / "plan_v1.json")
    profile = Profile.load(GOLDEN / "profile_v2.safetensors")
    made, other = (plan, profile) if kind == "plan" else (profile, plan)
    place = tmp_path / "out"
    if there == "weights":
        save_file({"a": np.zeros(3)}, place, {"format": "pt"})
    elif there == "text":
        place.write_text("a week of notes")
    elif there == "the other":
        other.save(place)
    elif there == "link":
        made.save(tmp_path / "real")
        place.symlink_to("real")
    elif there == "folder":
        place.mkdir()
    else:
        os.mkfifo(place)
    before = contents(tmp_path) if there != "fifo" else {}
    with pytest.raises(RankoptError, match=r"out .*name"):
        made.save(place)
    assert contents(tmp_path) == before if there != "fifo" else place.is_fifo()
    for free in (tmp_path / "new", tmp_path / "empty"):
        (tmp_path / "empty").touch()
        made.save(free)
        made.save(free)
        assert format_of(free) == f"rankopt-{kind}"


@pytest.mark.parametrize(
    "foreign", ["file", "folder", "link", "changed", "no list", "list of others", "dense"]
)
def test_a_folder_with_something_else_in_it_is_not_replaced(tmp_path: Path, foreign: str) -> None:
    place = tmp_path / "model"
    model_folder(place)
    if foreign == "file":
        (place / "thesis.txt").write_text("the only copy")
    elif foreign == "folder":
        (place / "runs").mkdir()
        (place / "runs" / "log").write_text("1")
    elif foreign == "link":
        (place / "sub" / "model.safetensors").unlink()
        (place / "sub" / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    elif foreign == "changed":
        (place / "sub" / "model.safetensors").write_text("finer weights")
    elif foreign == "no list":
        (place / "rankopt_files.json").unlink()
    elif foreign == "list of others":
        (place / "rankopt_files.json").write_text('{"format": "rankopt-model", "files": 3}')
    else:
        (place / "rankopt_files.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(RankoptError, match=r"model .*not replaced.*name another folder"):
        model_folder(place, overwrite=True)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["model"]


def test_folders_of_earlier_versions_are_replaced(tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    names = ("model-00001-of-00002.safetensors", "tokenizer.json", "spiece.model", "vocab.txt")
    for name in (*names, "rankopt_plan.json", "generation_config.json", "chat_template.jinja"):
        (place / name).write_text("old")
    (place / "config.json").write_text('{"quantization_config": {"quant_method": "rankopt"}}')
    (place / "notes.md").write_text("mine")
    with pytest.raises(RankoptError, match=r"did not write.*: notes\.md:"):
        model_folder(place, overwrite=True)
    (place / "notes.md").unlink()
    model_folder(place, overwrite=True)
    assert sorted(contents(place)) == ["config.json", "rankopt_files.json", "sub/model.safetensors"]
    (place / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (place / "rankopt_files.json").unlink()
    with pytest.raises(RankoptError, match="was not written by rankopt"):
        model_folder(place, overwrite=True)


def test_a_link_is_neither_followed_nor_replaced(tmp_path: Path) -> None:
    model_folder(tmp_path / "real")
    for name, target in (("link", "real"), ("dangling", "nowhere"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
        before = contents(tmp_path)
        with pytest.raises(RankoptError, match=rf"{name} is a link to {target}"):
            model_folder(tmp_path / name, overwrite=True)
        with pytest.raises(RankoptError, match=rf"{name} is a link to {target}"):
            require_file(tmp_path / name)
        assert contents(tmp_path) == before


def test_a_folder_is_apart_from_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(Path("dense"))
    Path("alias").symlink_to("dense")
    for place in ("dense", "dense/small", ".", "alias/small", "dense/../dense"):
        with pytest.raises(RankoptError, match=r"name another|name the place"):
            require_free(place, True, apart_from=["gpt2", None, Path("dense")])
    with pytest.raises(RankoptError, match=r"dense/config\.json is read"):
        require_free("dense", True, apart_from=["dense/config.json"])
    assert require_free("other", False, apart_from=["dense", ""]) == Path("other")
    monkeypatch.chdir("dense")
    with pytest.raises(RankoptError, match="current folder"):
        require_free(tmp_path / "dense", True)
    Path("data.txt").write_text("text")
    with pytest.raises(RankoptError, match=r"data\.txt is read, too"):
        require_file("data.txt", apart_from=["./data.txt"])


def test_asking_leaves_no_trace(tmp_path: Path) -> None:
    os.utime(tmp_path, (1, 1))
    assert require_file(tmp_path / "p", is_format(PROFILE)) == tmp_path / "p"
    assert require_free(tmp_path / "m", True) == tmp_path / "m"
    assert os.stat(tmp_path).st_mtime == 1 and not os.listdir(tmp_path)


HOLD = """
import os, sys
from rankopt.files import whole_folder
with whole_folder(sys.argv[1], overwrite=True) as folder:
    (folder / "half").write_text("half")
    print(flush=True)
    sys.stdin.read()
"""


@contextmanager
def writer(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", HOLD, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        yield process
        process.kill()


def leftovers(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith(".rankopt."))


def test_leftovers_of_the_dead_are_swept_and_the_living_are_left_alone(tmp_path: Path) -> None:
    def write() -> None:
        with whole_file(tmp_path / "p") as temporary:
            temporary.write_text("{}")

    model_folder(tmp_path / "model")
    before = contents(tmp_path / "model")
    with writer(tmp_path / "model") as living, writer(tmp_path / "model") as dying:
        assert len(leftovers(tmp_path)) == 2
        write()
        assert len(leftovers(tmp_path)) == 2
        dying.kill()
        dying.wait()
        write()
        (left,) = leftovers(tmp_path)
        living.communicate(b"")
        assert living.returncode == 0 and left not in os.listdir(tmp_path)
    assert contents(tmp_path / "model") != before
    # Of another host, or no folder: who knows.
    (tmp_path / ".rankopt.another.x").mkdir()
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "x").touch()
    own = leftovers(tmp_path)
    write()
    assert leftovers(tmp_path) == own


def test_a_folder_killed_while_it_was_replaced_comes_back(tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    before = contents(tmp_path / "model")
    with writer(tmp_path / "other") as dying:
        (name,) = leftovers(tmp_path)
        (tmp_path / name / "old").mkdir(exist_ok=True)
        os.replace(tmp_path / "model", tmp_path / name / "old" / "model")
        dying.kill()
        dying.wait()
    with whole_file(tmp_path / "p") as temporary:
        temporary.write_text("{}")
    assert contents(tmp_path / "model") == before
    assert leftovers(tmp_path) == []


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Files may have so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _text(path: Path) -> None:
    with whole_file(path, is_format(PLAN)) as temporary:
        temporary.write_text("x" * 9000)


def _library(path: Path) -> None:
    with whole_file(path) as temporary:
        save_file({"a": np.zeros(9000)}, temporary)


def _arrays(path: Path) -> None:
    write_safetensors(path, {"a": np.zeros(9000)})


def _folder(path: Path) -> None:
    with whole_folder(path) as folder:
        save_file({"a": np.zeros(9000)}, folder / "model.safetensors")


def _spilled(path: Path) -> None:
    with SpilledArrays(path.parent) as arrays:
        arrays["a"] = np.zeros(9000)


@pytest.mark.parametrize("write", [_text, _library, _arrays, _folder, _spilled])
@pytest.mark.parametrize("size", [0, 4000])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, write: Callable[[Path], None], size: int
) -> None:
    with pytest.raises(WriteError, match=r"cannot write .*: File too large$"), at_most(size):
        write(tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("x" * 300, "File name too long"),
        ("file/out", "Not a directory"),
        ("/proc/out", "No such file or directory|Permission denied"),
    ],
)
def test_what_the_system_says_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for write in (_text, _folder):
        with pytest.raises(WriteError, match=rf"^cannot write {path}: ({reason})$"):
            write(Path(path))


def test_errors_are_one_line_whatever_names_are_in_them() -> None:
    name = "a\nerror: b\x1b[31m\u202e\ud800\x9b"
    assert str(RankoptError(f"layer {name}")) == (
        r"layer a\u000aerror: b\u001b[31m\u202e\ud800\u009b"
    )
    assert printable("Ω é 日本\n", "\n") == "Ω é 日本\n"
    text = json.dumps({"a": name + "\x7f"})
    assert json.loads(printable(text)) == {"a": name + "\x7f"}
