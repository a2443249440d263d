"""Files and folders that are whole or not there, and replace nothing that is somebody else's.

What is written comes into being in a temporary folder beside its place, and gets its name at the
end.

Files of ours say what they are (``format``), and folders have a list of what was written into them.
Only such files and folders are replaced. A link is never written through, nor replaced.
"""

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankopt._version import __version__
from rankopt.errors import RankoptError, WriteError, few
from rankopt.temporary import MARK, temporary_folder

PLAN, PROFILE, CHECKPOINT = "rankopt-plan", "rankopt-profile", "rankopt-checkpoint"
LORA_PLAN = "rankopt-lora-plan"
REFINEMENT, RESULTS = "rankopt-refinement", "rankopt-results"
#: Folders, in their list of files.
MODEL, PICTURES = "rankopt-model", "rankopt-pictures"
#: Of a folder of ours: its files and their sizes.
LIST_OF_FILES = "rankopt_files.json"
#: A longer text or header is not looked at: it is none of ours.
_LONGEST = 100_000_000
#: What folders have in them that were written before there was a list.
_MODEL_FILES = re.compile(
    r"(adapter_|generation_|processor_|preprocessor_|video_preprocessor_)?config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|rankopt_plan\.json"
    r"|(added_tokens|merges|special_tokens_map|tokenizer|tokenizer_config|vocab|chat_template)\.\w+"
    r"|(spiece|sentencepiece|sentencepiece\.bpe|tokenizer|source|target)\.(model|spm)|\w+\.py"
)
#: Said before the long work; of other errors nobody knows what they mean for what comes later.
_REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP),
)

Ours = Callable[[Path], bool]


@contextmanager
def told(target: str | os.PathLike[str], *, looking: bool = False) -> Iterator[None]:
    """Say in one line what the system refuses inside the ``with``; only looking, all it says.

    Raises:
        WriteError: cannot write the target, and the system's reason.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, looking)
        if reason is None:
            raise
        raise WriteError(f"cannot write {target}: {reason}") from error


def _reason(error: Exception, looking: bool) -> str | None:
    """The system's words, if it is the system that refuses to write."""
    if isinstance(error, OSError) and error.errno is not None:
        # A file that is read meanwhile has another name.
        name = str(error.filename)
        ours = looking or error.filename is None or MARK in name or ".partial" in name
        return os.strerror(error.errno) if ours else None
    # Of libraries in Rust (safetensors, tokenizers), each of which has its own type of error.
    if isinstance(error, RankoptError):
        return None
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None if number is None else os.strerror(int(number[1]))


def format_of(path: Path) -> str | None:
    """What a JSON or safetensors file calls itself at its ``format``; None where it does not."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
            if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST:
                text = b"{" + file.read(int.from_bytes(head[:8], "little") - 1)
            elif head.lstrip()[:1] == b"{" and os.fstat(file.fileno()).st_size <= _LONGEST:
                text = head + file.read()
            else:
                return None
        content = json.loads(text)
        content = content.get("__metadata__", content)
        return str(content["format"]) if "format" in content else None
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return None


def is_format(name: str) -> Ours:
    """Tells whether a file is of this format, or empty."""
    return lambda path: not path.stat().st_size or format_of(path) == name


def require_file(
    path: str | os.PathLike[str],
    ours: Ours | None = None,
    *,
    overwrite: bool = True,
    apart_from: Iterable[object] = (),
) -> Path:
    """The file as a Path, if it may be written; nothing is written or made yet.

    Args:
        path: of the file.
        ours: whether a file that is there may be replaced; by default any may.
        overwrite: whether such a file is to be replaced.
        apart_from: paths that are read, other names and None among them.

    Raises:
        RankoptError: it is something else, there is something else, or it is one of those.
        WriteError: the system would refuse.
    """
    target = Path(path)
    with told(target, looking=True):
        _require_parent(target)
        if target.is_dir():
            raise RankoptError(f"{target} is a folder: name a file")
        if not os.path.lexists(target):
            return target
        if not target.is_file():
            raise RankoptError(f"{target} is not a regular file: name another")
        if not overwrite:
            raise RankoptError(f"{target} exists: name another file, or replace it with --force")
        for other in _existing(apart_from):
            if os.path.samefile(target, other):
                raise RankoptError(f"{target} is read, too: name another file to write")
        if ours is not None and not ours(target):
            raise RankoptError(
                f"{target} exists and is no such file of rankopt, or is damaged, so it is not "
                "replaced: name another file, or move it"
            )
    return target


@contextmanager
def whole_file(path: str | os.PathLike[str], ours: Ours | None = None) -> Iterator[Path]:
    """Yield a temporary path near ``path``; on success sync it and rename it into place.

    Raises:
        RankoptError, WriteError: see require_file.
    """
    target = require_file(path, ours)
    with told(target), temporary_folder(target.absolute().parent) as folder:
        temporary = folder / target.name
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)


def require_free(
    path: str | os.PathLike[str],
    overwrite: bool,
    *,
    kind: str = MODEL,
    apart_from: Iterable[object] = (),
) -> Path:
    """The folder as a Path, if something may be written there; nothing is written or made yet.

    Args:
        path: of the folder.
        overwrite: replace a folder of this kind that rankopt wrote; no other one is replaced.
        kind: what is to be written, a model or pictures.
        apart_from: paths that are read, other names and None among them: not these, nothing that
            they are in, and nothing in them.

    Raises:
        RankoptError: it exists, is not an empty folder, and overwrite is not set; what is there is
            not rankopt's; or it is no place of its own.
        WriteError: the system would refuse.
    """
    target = Path(path)
    with told(target, looking=True):
        _require_parent(target)
        place = target.resolve()
        for other in _existing(apart_from):
            read = other.resolve()
            if read.is_relative_to(place) or place.is_relative_to(read):
                raise RankoptError(
                    f"cannot write {target}: {other} is read, and one of them is or lies in the "
                    "other: name another folder"
                )
        if not target.exists():
            return target
        if Path.cwd().is_relative_to(place):
            raise RankoptError(
                f"cannot write {target}: the current folder is it or lies in it: name another"
            )
        if os.path.ismount(target):
            raise RankoptError(f"cannot write {target}: it is a mount point: name a folder in it")
        occupied = not target.is_dir() or any(target.iterdir())
        if occupied and not overwrite:
            raise RankoptError(
                f"{target} exists and is not empty: name another folder, or replace it with "
                "--force (overwrite=True in Python)"
            )
        if not target.is_dir():
            raise RankoptError(f"{target} is a file, and is not replaced by a folder: name another")
        if occupied:
            _require_ours(target, kind)
    return target


def partial_of(path: str | os.PathLike[str]) -> Path:
    """What a stopped run leaves of an output, beside it, to go on with.

    Raises:
        RankoptError: the output is the root of the file system.
    """
    target = Path(path)
    if target.name in ("", ".."):
        target = Path(os.path.abspath(target))
    if not target.name:
        raise RankoptError(f"cannot write {target}: nothing lies beside it: name something in it")
    return target.with_name(f"{target.name}.partial")


@contextmanager
def whole_folder(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    kind: str = MODEL,
    partial: Path | None = None,
    journal: str = "",
) -> Iterator[Path]:
    """Yield a temporary folder near ``path``; on success it takes the place of ``path``.

    Args:
        path: of the folder.
        overwrite: see require_free.
        kind: likewise.
        partial: the folder to yield instead, which is there, beside ``path``; it stays if what is
            inside the ``with`` fails, to go on with.
        journal: a file in it that says how far it is, and is removed at the very end.

    Raises:
        RankoptError, WriteError: see require_free.
    """
    target = require_free(path, overwrite, kind=kind).absolute()
    with told(target), temporary_folder(target.parent) as folder:
        gone, old = folder / "new" / target.name, folder / "old" / target.name
        gone.parent.mkdir()
        old.parent.mkdir()
        fresh = gone if partial is None else partial
        fresh.mkdir(exist_ok=partial is not None)
        yield fresh
        sizes = _sizes(fresh)
        sizes.pop(journal, None)
        about = {"format": kind, "rankopt": __version__, "files": sizes}
        (fresh / LIST_OF_FILES).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        for name in (*sizes, LIST_OF_FILES):
            _sync(fresh / name)
        fresh.chmod(0o755)
        require_free(path, overwrite, kind=kind)
        if journal:
            (fresh / journal).unlink(missing_ok=True)
        if not target.exists():
            os.replace(fresh, target)
            return
        os.replace(target, old)
        try:
            os.replace(fresh, target)
        except BaseException:
            os.replace(old, target)
            raise
        os.replace(old, gone)  # half removed, it is not to be given back


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.lstat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def _require_ours(folder: Path, kind: str) -> None:
    """Refuse to replace a folder that rankopt did not write, or name what else it has in it."""
    found, listed = _sizes(folder), folder / LIST_OF_FILES
    linked = [name for name in found if (folder / name).is_symlink()]
    if format_of(listed) == kind:
        about = _json(listed).get("files")
        written = about if isinstance(about, dict) else {}
        found.pop(LIST_OF_FILES)
        other = [name for name, size in found.items() if written.get(name) != size]
    else:
        settings = _json(folder / "config.json").get("quantization_config")
        ours = isinstance(settings, dict) and settings.get("quant_method") == "rankopt"
        if kind != MODEL or not ours:
            raise RankoptError(
                f"{folder} was not written by rankopt, so it is not replaced: name another folder"
            )
        other = [name for name in found if not _MODEL_FILES.fullmatch(name)]
    if other or linked:
        raise RankoptError(
            f"{folder} has in it what rankopt did not write, so it is not replaced: "
            f"{few(sorted({*other, *linked}))}: move that elsewhere, or name another folder"
        )


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _existing(paths: Iterable[object]) -> Iterator[Path]:
    """Those that are files or folders here; hub names are not."""
    for path in paths:
        if isinstance(path, str | os.PathLike) and str(path) and os.path.exists(path):
            yield Path(path)


def _require_parent(target: Path) -> None:
    """Refuse a link, and a place in a folder where nothing can be written.

    Raises:
        RankoptError: it is a link, or the folder does not exist.
        OSError: the system's refusal.
    """
    with contextlib.suppress(FileNotFoundError):
        # The system's own words for a name that is too long, or a file in the place of a folder.
        if stat.S_ISLNK(target.lstat().st_mode):
            raise RankoptError(
                f"{target} is a link to {os.readlink(target)}, and links are not followed: name "
                "the place itself"
            )
    parent = target.absolute().parent
    if not parent.is_dir():
        raise RankoptError(f"cannot write {target}: the folder {target.parent} does not exist")
    try:
        # A file that never gets a name; not every system has such.
        with open(os.open(parent, os.O_TMPFILE | os.O_WRONLY, 0o600), "wb") as nameless:
            nameless.write(b" ")
    except (OSError, AttributeError) as error:
        if getattr(error, "errno", None) in _REFUSALS:
            raise
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from error


def _sync(path: Path) -> None:
    with open(path, "rb") as written:
        os.fsync(written.fileno())
