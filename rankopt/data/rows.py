"""Rows with named columns, from files, folders and data sets."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankopt.data.formats import FORMATS, ending, read_file
from rankopt.data.formats import Row as Row
from rankopt.errors import DataError, MissingExtraError, first_line

#: NAME or OWNER/NAME, and a configuration; anything else can only be a path.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:.+)?")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns to read.

    Attributes:
        text: the text, the messages of a chat, or the list of words.
        pair: the second text, if there is one.
        label: class (number or name), number, or list of classes; not read for language models.
    """

    text: str = "text"
    pair: str | None = None
    label: str = "label"


@dataclasses.dataclass(frozen=True, eq=False)
class DataSource:
    """A file, a folder or a data set, and how it is read.

    Attributes:
        source: its path or name.
        columns: names of the columns.
        split: of a data set; ``train`` if not given.
        rows: of the source, if they have been read already.
    """

    source: str
    columns: Columns = Columns()
    split: str | None = None
    rows: Sequence[Row] | None = None

    def read(self) -> Sequence[Row]:
        """Its rows; see read_rows."""
        return read_rows(self.source, self.split) if self.rows is None else self.rows


def read_rows(source: str, split: str | None = None) -> Sequence[Row]:
    """Rows of a file, a folder or a data set, as mappings from column to value.

    A ``.txt`` file is one row. A folder is one that ``save_to_disk`` of the ``datasets`` library
    wrote, or one with data files.

    Raises:
        DataError: missing or unreadable, or a split of a file.
        MissingExtraError: it needs the ``datasets`` library.
    """
    path = Path(source)
    try:
        folder, there = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"cannot read {source!r:.80}: {reason}") from error
    if folder:
        rows = _read_saved(path, split) if _is_saved(path) else _read_dataset(source, None, split)
    elif there:
        if ending(path) is None:
            raise DataError(
                f"{source} is there, but files with such a name are not read: give a {FORMATS} "
                "file (packed: .jsonl.gz), or a folder of them"
            )
        if split is not None:
            raise DataError(f"{source} is a file and has no split {split!r}")
        rows = read_file(path)
    elif ending(path) is not None:
        raise DataError(f"no data file at {source}")
    elif _HUB_NAME.fullmatch(source) is None:
        raise DataError(f"no data file or folder at {source}")
    else:
        name, _, config = source.partition(":")
        rows = _read_dataset(name, config or None, split)
    if not len(rows):
        raise DataError(f"{source} has no rows")
    return rows


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _read_saved(path: Path, split: str | None) -> Sequence[Row]:
    datasets = _datasets(path)
    try:
        saved: Any = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"cannot load the data set saved in {path}: {first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        wanted = split or ("train" if len(saved) != 1 else next(iter(saved)))
        if wanted not in saved:
            raise DataError(f"{path} has no split {wanted!r}; it has: {', '.join(saved)}")
        saved = saved[wanted]
    elif split is not None and split != str(saved.split):
        raise DataError(f"{path} is one saved split and has no split {split!r}")
    rows: Sequence[Row] = saved
    return rows


def _read_dataset(name: str, config: str | None, split: str | None) -> Sequence[Row]:
    datasets = _datasets(name)
    try:
        loaded: Any = datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:
        # datasets raises a dozen unrelated types for "not found"; all are the user's to mend.
        raise DataError(
            f"{name!r} is neither a {FORMATS} file nor a folder or data set that could be loaded: "
            f"{first_line(error)}"
        ) from error
    rows: Sequence[Row] = loaded
    return rows


def _datasets(source: object) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f"the data set '{source}'", "datasets", "data") from error
    return datasets


def require_columns(source: str, rows: Sequence[Row], *names: str | None) -> None:
    """Raise DataError if the first row lacks a column, naming those that it has."""
    for name in names:
        if name is not None and name not in rows[0]:
            columns = ", ".join(_shown(str(each)) for each in rows[0]) or "none"
            raise DataError(f"{source} has no column {name!r}; it has: {columns}")


def _shown(name: str) -> str:
    """As it is, or quoted where blanks and what cannot be printed would not be seen."""
    return name if name.isprintable() and name == name.strip() != "" else repr(name)


def column(source: str, rows: Sequence[Row], name: str) -> list[Any]:
    """A column of all rows; DataError names the row that lacks it."""
    require_columns(source, rows, name)
    # A data set decodes what it hands out, pictures too.
    select = getattr(rows, "select_columns", None)
    found = []
    for number, row in enumerate(rows if select is None else select([name]), 1):
        if name not in row:
            raise DataError(f"{source}, row {number}: no column {name!r}")
        found.append(row[name])
    return found
