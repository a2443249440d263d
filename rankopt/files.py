"""Files and folders that are either whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankopt.errors import RankoptError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync it and rename it into place.

    Raises:
        RankoptError: the folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise RankoptError(f"cannot write {target}: the folder {target.parent} does not exist")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def require_free(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """The folder as a Path, if something may be written there.

    Raises:
        RankoptError: it exists, is not an empty folder, and overwrite is not set; or its parent
            does not exist.
    """
    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise RankoptError(f"cannot write {target}: the folder {target.parent} does not exist")
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not overwrite:
        raise RankoptError(
            f"{target} exists and is not empty: name another folder, or replace it with --force "
            "(overwrite=True in Python)"
        )
    return target


@contextmanager
def whole_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes the place of ``path``.

    Raises:
        RankoptError: see require_free.
    """
    target = require_free(path, overwrite).absolute()
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.is_dir():
            replaced = temporary.with_name(temporary.name + ".old")
            os.replace(target, replaced)
            os.replace(temporary, target)
            shutil.rmtree(replaced)
        else:
            target.unlink(missing_ok=True)
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
