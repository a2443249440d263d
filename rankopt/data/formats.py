"""Rows of local files, by the ending of the name.

Text is UTF-8; a byte order mark in front of it is no text, and lines end as on any system. All but
the columnar formats may be packed: ``train.jsonl.gz``, ``.bz2``, ``.xz``.
"""

import csv
import importlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rankopt.errors import DataError, MissingExtraError, first_line

Row = Mapping[str, Any]

FORMATS = ".txt, .json, .jsonl, .tsv, .csv, .parquet or .arrow"
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
#: No line of a table holds it: it is seen as a row of its own unless a quote is still open.
_END = "\0end of the file\0"


def ending(path: Path) -> str | None:
    """The ending that says how a file is read, without that of its packing; None for others."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None
    known = suffixes and (suffixes[-1] in _READERS or suffixes[-1] in _COLUMNAR)
    return suffixes[-1] if known else None


def read_file(path: Path) -> Sequence[Row]:
    """Rows of a file whose ending is known.

    Raises:
        DataError: unreadable, or not what its ending says; the line is named.
        MissingExtraError: Parquet or Arrow, and no library for them.
    """
    kind = ending(path)
    assert kind is not None, "the caller knows the ending"
    if kind in _COLUMNAR:
        return _columnar(path, kind)
    packing = _PACKED.get(path.suffix.lower())
    opened = open if packing is None else importlib.import_module(packing).open
    try:
        with opened(path, "rb") as file:
            return _READERS[kind](str(path), _lines(str(path), file))
    except DataError:
        raise
    except Exception as error:
        # Each packing has errors of its own, beside those of the system.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"cannot read {path}: {reason}") from error


def _lines(source: str, file: BinaryIO) -> Iterator[str]:
    """Lines with their ends, decoded one by one: an error names the line."""
    for number, raw in enumerate(file, 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff") and number == 1
            raise DataError(
                f"{source} is not UTF-8 text: line {number} has the byte "
                f"0x{raw[error.start]:02x}{' (it seems to be UTF-16)' if wide else ''}; save it "
                "as UTF-8"
            ) from error
        if number == 1:
            line = line.removeprefix("\ufeff")
            if line.count("\0") * 3 > len(line):
                raise DataError(
                    f"{source} is not UTF-8 text: line 1 has {line.count(chr(0))} zero bytes (it "
                    "seems to be UTF-16); save it as UTF-8"
                )
        if "\r" in line:
            yield from _LINE.findall(line)
        else:
            yield line


def _txt(_: str, lines: Iterable[str]) -> list[Row]:
    return [{"text": "".join(lines).replace("\r\n", "\n").replace("\r", "\n")}]


def _jsonl(source: str, lines: Iterable[str]) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        # Files that were joined have a mark where each of them began.
        line = line.strip().removeprefix("\ufeff")
        if line:
            place = f"{source}, line {number}"
            rows.append(_object(place, _parsed(place, line)))
    return rows


def _json(source: str, lines: Iterable[str]) -> list[Row]:
    """A list of objects, alone or under the key "data" or an only key; or lines, as in JSONL."""
    lines = list(lines)
    text = "".join(lines)
    if not text.strip():
        return []
    try:
        found = _parsed(source, text)
    except DataError as error:
        if getattr(error.__cause__, "msg", "") == "Extra data":
            return _jsonl(source, lines)
        raise
    if isinstance(found, dict):
        inner = found.get("data", next(iter(found.values())) if len(found) == 1 else None)
        found = inner if isinstance(inner, list) else [found]
    if not isinstance(found, list):
        raise DataError(f"{source}: a list of JSON objects is wanted, it holds {found!r:.60}")
    return [_object(f"{source}, row {number}", row) for number, row in enumerate(found, 1)]


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{place}: not JSON: {error.msg}, {at}column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON that can be read: {error}") from error


def _object(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a JSON object is wanted, got {value!r:.60}")
    return value


def _tsv(source: str, lines: Iterable[str]) -> list[Row]:
    return _table(source, lines, delimiter="\t", quoting=csv.QUOTE_NONE)


def _csv(source: str, lines: Iterable[str]) -> list[Row]:
    return _table(source, lines)


def _table(source: str, lines: Iterable[str], **dialect: Any) -> list[Row]:
    # A cell may be a whole document; the default limit is 128 KiB.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(itertools.chain(lines, [_END]), **dialect)
    names: list[str] = []
    rows: list[Row] = []
    begun = 1
    try:
        for cells in reader:
            if cells and cells[-1].endswith(_END) and cells != [_END]:
                raise DataError(f"{source}, line {begun}: a quote is opened and never closed")
            begun = reader.line_num + 1
            if not cells or cells == [_END]:
                continue
            if not names:
                names = cells
                twice = sorted({name for name in names if name and names.count(name) > 1})
                if twice:
                    raise DataError(f"{source}: more than one column is named {twice[0]!r}")
            elif len(cells) != len(names):
                raise DataError(
                    f"{source}, line {reader.line_num}: not {len(names)} columns but {len(cells)}"
                )
            else:
                rows.append(dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{source}, line {reader.line_num}: {error}") from error
    return rows


def _columnar(path: Path, kind: str) -> Sequence[Row]:
    try:
        import datasets
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(f"reading {path}", "datasets", "data") from error
    try:
        if kind == ".parquet":
            # A partition is read from the names of folders above it, unless told not to.
            table = parquet.read_table(path, partitioning=None)
        else:
            with pyarrow.memory_map(str(path)) as file:
                try:
                    table = pyarrow.ipc.open_stream(file).read_all()
                except pyarrow.ArrowInvalid:
                    table = pyarrow.ipc.open_file(file).read_all()
        rows: Sequence[Row] = datasets.Dataset(table)
    except Exception as error:
        # Both libraries raise many unrelated types for a file that is damaged.
        raise DataError(f"{path} cannot be read as {kind[1:]}: {first_line(error)}") from error
    return rows


_READERS: dict[str, Callable[[str, Iterable[str]], list[Row]]] = {
    ".txt": _txt,
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".tsv": _tsv,
    ".csv": _csv,
}
_COLUMNAR = (".parquet", ".arrow", ".feather")
