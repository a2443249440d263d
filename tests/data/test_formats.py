"""Files as people have them: endings, packing, marks of Windows, damage; the line is named."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from rankopt.data.rows import read_rows
from rankopt.errors import DataError

ROWS = [{"text": "x y", "label": 1}, {"text": "z", "label": 0}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        json.dumps({"version": "1", "data": ROWS}),
        json.dumps({"train": ROWS}),
        LINES,
        LINES.replace("\n", "\r"),
    ],
)
def test_json_is_a_list_of_objects_or_lines(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_bytes(MARK + content.encode())
    assert list(read_rows(str(tmp_path / "a.json"))) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "x\r\ny\rz\n", "x\ny\nz\n"),
        ("a.jsonl", '{"text": "x"}\r\n\r\n', "x"),
        ("a.ndjson", '{"text": "x"}', "x"),
        ("a.csv", 'text,label\r\n"x\r\ny",1\r\n', "x\r\ny"),
        ("a.tsv", "text\tlabel\rx\t1\r", "x"),
    ],
)
@pytest.mark.parametrize(
    ("packing", "pack"),
    [("", bytes), (".gz", gzip.compress), (".BZ2", bz2.compress), (".xz", lzma.compress)],
)
def test_mark_line_ends_and_packing_are_no_text(
    tmp_path: Path, name: str, content: str, text: str, packing: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(pack(MARK + content.encode()))
    (row,) = read_rows(str(path))
    assert row["text"] == text


def test_joined_lines_have_a_mark_where_each_file_began(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes((MARK + b'{"text": "x"}\n') * 2)
    assert list(read_rows(str(tmp_path / "a.jsonl"))) == [{"text": "x"}] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1]", "row 1: a JSON object is wanted, got 1"),
        ("a.json", b"3", "a list of JSON objects is wanted, it holds 3"),
        ("a.json", b"", "has no rows"),
        ("a.json", b'[\n{"text"', "not JSON: .*, line 2, column"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON that can be read"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "line 1: not JSON that can be read"),
        ("a.jsonl.gz", b'{"text": "x"}', "cannot read .*a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "cannot read .*end-of-stream"),
        ("a.csv.xz", b"text", "cannot read .*a.csv.xz: "),
        ("a.csv", "text\nx\nü\n".encode("latin-1"), "line 3 has the byte 0xfc; save it as UTF-8"),
        ("a.csv", "text\nx\n".encode("utf-16"), "0xff .it seems to be UTF-16"),
        ("a.txt", "the text".encode("utf-16-be"), "8 zero bytes .it seems to be UTF-16"),
        ("a.csv", b'label,text\n1,"open\n0,x\n', "line 2: a quote is opened and never closed"),
        ("a.csv", b"text,text\nx,y\n", "more than one column is named 'text'"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read as parquet: "),
        ("a.arrow", b"ARROW1", "a.arrow cannot be read as arrow: "),
        ("a.xlsx", b"PK", "is there, but files with such a name are not read: give a .txt, .json"),
        ("a.gz", b"PK", "is there, but"),
    ],
)
def test_damage_is_named_with_the_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    if name.endswith((".parquet", ".arrow")):
        pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["./none", "a/b/c", "~/none", "none.parquet", "x" * 300])
def test_path_where_nothing_is_is_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(DataError, match=r"no data file|cannot read|none of|neither"):
        read_rows(source)


def test_columnar_files_and_saved_folders_have_the_same_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    from pyarrow import feather, parquet

    parquet.write_table(made.data.table, tmp_path / "a.PARQUET")
    feather.write_feather(made.data.table, tmp_path / "a.feather")
    made.save_to_disk(tmp_path / "one")
    (stream,) = (tmp_path / "one").glob("*.arrow")
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"validation": made}).save_to_disk(tmp_path / "three")
    for name in ("a.PARQUET", "a.feather", "one", str(stream), "two", "two/train", "three"):
        assert list(read_rows(str(tmp_path / name))) == ROWS, name
    assert list(read_rows(str(tmp_path / "two"), "test")) == ROWS[1:]
    with pytest.raises(DataError, match="two has no split 'dev'; it has: train, test"):
        read_rows(str(tmp_path / "two"), "dev")
    with pytest.raises(DataError, match="one saved split and has no split 'dev'"):
        read_rows(str(tmp_path / "one"), "dev")
    stream.unlink()
    with pytest.raises(DataError, match="cannot load the data set saved in"):
        read_rows(str(tmp_path / "one"))
