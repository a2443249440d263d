"""Rows with named columns, from files and data sets."""

import csv
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankopt.errors import DataError, MissingExtraError

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns to read.

    Attributes:
        text: the text, or the list of words.
        pair: the second text, if there is one.
        label: class (number or name), number, or list of classes; not read for language models.
    """

    text: str = "text"
    pair: str | None = None
    label: str = "label"


def read_rows(source: str, split: str | None = None) -> Sequence[Row]:
    """Rows of a file or data set, as mappings from column to value; ``.txt`` is one row.

    Raises:
        DataError: missing or unreadable, or a split of a file.
    """
    path = Path(source)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".tsv": _read_table, ".csv": _read_table}
    if path.suffix.lower() not in readers:
        return _read_dataset(source, split)
    if not path.is_file():
        raise DataError(f"no data file at {source}")
    if split is not None:
        raise DataError(f"{source} is a file and has no split {split!r}")
    try:
        rows = readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text: {error}") from error
    if not rows:
        raise DataError(f"{source} has no rows")
    return rows


def _read_txt(path: Path) -> list[Row]:
    return [{"text": path.read_text(encoding="utf-8")}]


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a JSON object is wanted")
        rows.append(row)
    return rows


def _read_table(path: Path) -> list[Row]:
    # A cell may be a whole document; the default limit is 128 KiB.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    tabs = path.suffix.lower() == ".tsv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        if tabs:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.DictReader(file)
        rows: list[Row] = []
        for row in reader:
            if None in row or None in row.values():
                columns = len(reader.fieldnames or [])
                raise DataError(f"{path}, line {reader.line_num}: not {columns} columns")
            rows.append(row)
    return rows


def _read_dataset(source: str, split: str | None) -> Sequence[Row]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f"the data set {source!r}", "datasets", "data") from error
    name, _, config = source.partition(":")
    try:
        loaded: Any = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        # datasets raises a dozen unrelated types for "not found"; all are the user's to mend.
        raise DataError(
            f"{source!r} is neither a .txt, .jsonl, .tsv or .csv file nor a data set that could "
            f"be loaded: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    rows: Sequence[Row] = loaded
    return rows


def require_columns(source: str, rows: Sequence[Row], *names: str | None) -> None:
    """Raise DataError if the first row lacks a column, naming those that it has."""
    for name in names:
        if name is not None and name not in rows[0]:
            columns = ", ".join(map(str, rows[0]))
            raise DataError(f"{source} has no column {name!r}; it has: {columns}")


def column(source: str, rows: Sequence[Row], name: str) -> list[Any]:
    """A column of all rows; DataError names the row that lacks it."""
    require_columns(source, rows, name)
    try:
        return [row[name] for row in rows]
    except KeyError as error:
        number = next(n for n, row in enumerate(rows, 1) if name not in row)
        raise DataError(f"{source}, row {number}: no column {name!r}") from error


def texts_of(source: str, rows: Sequence[Row], name: str) -> list[str]:
    """A column of texts; DataError names the row that holds something else."""
    texts = column(source, rows, name)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise DataError(f"{source}, row {number}: {name!r} is not text: {text!r:.60}")
    return texts
