"""Text in, batches out: every token once, every label at its place, every mistake named."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankopt.data.batches import load_batches, spread, text_batches
from rankopt.data.examples import drawn
from rankopt.data.rows import Columns, read_rows, require_columns
from rankopt.errors import DataError, OptionError
from rankopt.model.tasks import IGNORED
from tests import tiny

ROWS = [{"text": f"{a} {b}", "label": str(n % 2)} for n, (a, b) in enumerate(
    zip(tiny.WORDS, tiny.WORDS[::-1], strict=True)
)]  # fmt: skip


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """The rows in the format of the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def pieces() -> Any:
    """A tokenizer that cuts words in two and puts special tokens around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<cls>", "<sep>"]
    names = [*special, "ca", "##t", "do", "##g", "the"]
    inner = Tokenizer(
        models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("<sep>", 3), ("<cls>", 2))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".csv", ".CSV"])
def test_rows_of_every_format_are_the_same(tmp_path: Path, suffix: str) -> None:
    assert list(read_rows(write(tmp_path / f"data{suffix}", ROWS))) == ROWS


def test_text_file_is_one_row_and_jsonl_keeps_its_types(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert list(read_rows(str(tmp_path / "a.txt"))) == [{"text": "one\n\ntwo\n"}]
    rows = [{"text": ["a", "b"], "label": [0, 1], "score": 0.5, "line": "a\u2028b"}]
    assert list(read_rows(write(tmp_path / "a.jsonl", rows))) == rows


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_local_folder_is_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / f"train.{kind}", ROWS)
    write(tmp_path / "set" / f"test.{kind}", ROWS[:3])
    source = str(tmp_path / "set")
    assert [row["text"] for row in read_rows(source)] == [row["text"] for row in ROWS]
    assert len(read_rows(source, "test")) == 3
    arguments: dict[str, Any] = {"split": "test", "batch_size": 2}
    batches = load_batches(source, tiny.tokenizer(), "sequence-classification", **arguments)
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1], [0]]
    with pytest.raises(DataError, match="could be loaded"):
        read_rows(source, "nosuch")


def test_source_that_is_neither_file_nor_data_set_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"'no/such' is neither a \.txt.*FileNotFound"):
        read_rows("no/such")


@pytest.mark.parametrize("length", [2, 5, 7])
def test_windows_cover_the_text_in_order_without_overlap(length: int) -> None:
    tokenizer = tiny.tokenizer()
    texts = [" ".join(tiny.WORDS[:11]), " ".join(tiny.WORDS[3:]), "dog"]
    tokens: list[int] = []
    for text in texts:
        tokens += ([tokenizer.eos_token_id] if tokens else []) + tokenizer(text)["input_ids"]
    batches = text_batches(texts, tokenizer, length, 2)
    assert all(batch["input_ids"].shape[1] == length for batch in batches)
    assert [len(batch["input_ids"]) for batch in batches[:-1]] == [2] * (len(batches) - 1)
    joined = torch.cat([batch["input_ids"] for batch in batches]).flatten().tolist()
    assert joined == tokens[: len(tokens) // length * length]
    assert all(bool((batch["attention_mask"] == 1).all()) for batch in batches)


@pytest.mark.parametrize(("available", "wanted"), [(10, 3), (10, 10), (7, 9), (100, 7), (5, 1)])
def test_examples_are_spread_evenly(available: int, wanted: int) -> None:
    taken = spread(available, wanted)
    assert len(taken) == min(available, wanted)
    assert taken[0] == 0 and taken[-1] < available
    gaps = {b - a for a, b in zip(taken, [*taken[1:], available], strict=True)}
    assert max(gaps) - min(gaps) <= 1
    assert spread(available, None) == list(range(available))


def test_fewer_examples_come_from_the_whole_source(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", ROWS)
    tokenizer = tiny.tokenizer()
    (batch,) = load_batches(source, tokenizer, "sequence-classification", examples=4)
    expected = [ROWS[n]["text"] for n in spread(len(ROWS), 4)]
    assert [tokenizer.decode(ids) for ids in batch["input_ids"]] == expected
    text = " ".join(tiny.WORDS)
    whole, few = (text_batches([text], tokenizer, 2, 99, n)[0]["input_ids"] for n in (None, 3))
    assert few.tolist() == [whole[n].tolist() for n in spread(len(whole), 3)]


def test_classification_pads_and_masks_to_the_longest_of_the_batch(tmp_path: Path) -> None:
    rows = [{"text": "the cat", "label": 1}, {"text": "the old dog sees", "label": 0}]
    source = write(tmp_path / "a.jsonl", [*rows, {"text": "a " * 30, "label": 1}])
    first, second = load_batches(
        source, tiny.tokenizer(), "sequence-classification", batch_size=2, max_length=9
    )
    assert first["input_ids"].shape == (2, 4)
    assert first["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert first["labels"].tolist() == [1, 0] and first["labels"].dtype == torch.int64
    assert second["input_ids"].shape == (1, 9)


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".csv"])
def test_labels_may_be_numbers_or_names(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "cat", "label": value} for value in ("good", "bad", 1, "0", 1.0)]
    source = write(tmp_path / f"a{suffix}", rows)
    arguments: dict[str, Any] = {"label2id": {"bad": 0, "good": 1}, "batch_size": 9}
    (batch,) = load_batches(source, tiny.tokenizer(), "sequence-classification", **arguments)
    assert batch["labels"].tolist() == [1, 0, 1, 0, 1]


def test_regression_reads_floats(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", [{"text": "a", "label": x} for x in ("2.5", "-1", "1e-3")])
    (batch,) = load_batches(source, tiny.tokenizer(), "regression")
    torch.testing.assert_close(batch["labels"], torch.tensor([2.5, -1.0, 1e-3]))


def test_pair_column_is_read_as_the_second_text(tmp_path: Path, pieces: Any) -> None:
    source = write(tmp_path / "a.csv", [{"one": "cat", "two": "the dog", "y": 0}])
    columns = Columns("one", "two", "y")
    (batch,) = load_batches(source, pieces, "sequence-classification", columns=columns)
    assert batch["input_ids"].tolist() == [pieces("cat", "the dog")["input_ids"]]
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3, 8, 6, 7, 3]]


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv"])
@pytest.mark.parametrize("names", [True, False])
def test_first_piece_of_a_word_carries_its_label(
    tmp_path: Path, pieces: Any, suffix: str, names: bool
) -> None:
    no = IGNORED
    encode: Callable[[Any], Any] = json.dumps if suffix == ".tsv" else lambda x: x
    classes = ["O", "B", "I"] if names else [0, 1, 2]
    rows = [
        {"text": encode(["the", "cat"]), "label": encode([classes[0], classes[1]])},
        {"text": encode(["dog", "the", "cat"]), "label": encode([classes[2], no, 1])},
    ]
    path = tmp_path / f"a{suffix}"
    if suffix == ".tsv":  # no quoting there, so not csv's
        path.write_text(
            "".join("\t".join(row) + "\n" for row in [("text", "label"), *map(dict.values, rows)]),
            encoding="utf-8",
        )
    else:
        write(path, rows)
    label2id = {"O": 0, "B": 1, "I": 2}
    (batch,) = load_batches(str(path), pieces, "token-classification", label2id=label2id)
    assert batch["labels"].tolist() == [
        [no, 0, 1, no, no, no, no],  # <cls> the ca ##t <sep> and padding
        [no, 2, no, no, 1, no, no],  # <cls> do ##g the ca ##t <sep>
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]


def test_tsv_has_no_quoting_and_csv_has(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"quoted\t0\na "b" c\t1\n', encoding="utf-8")
    assert [row["text"] for row in read_rows(str(tmp_path / "a.tsv"))] == ['"quoted', 'a "b" c']
    (tmp_path / "a.csv").write_text('text,label\n"one, ""two""\nthree",0\n', encoding="utf-8")
    assert [row["text"] for row in read_rows(str(tmp_path / "a.csv"))] == ['one, "two"\nthree']


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufefftext,label\ncat,0\n".encode())
    assert read_rows(str(tmp_path / "a.csv"))[0]["text"] == "cat"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\tlabel\ncat\t0\ndog\n", "line 3: not 2 columns"),
        ("a.csv", "text,label\ncat,0,1\n", "line 2: not 2 columns"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2: a JSON object is wanted"),
        ("a.txt", b"\xff\xfe\xff", "is not UTF-8 text"),
        ("a.csv", b"text,label\n\xff,0\n", "is not UTF-8 text"),
    ],
)
def test_malformed_files_are_named_with_the_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        read_rows(str(path))
    assert str(caught.value).startswith(str(path))


def test_missing_file_and_split_of_a_file_are_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file at .*none\.csv"):
        read_rows(str(tmp_path / "none.csv"))
    source = write(tmp_path / "a.csv", ROWS)
    with pytest.raises(DataError, match=r"a\.csv is a file and has no split 'test'"):
        read_rows(source, "test")


@pytest.mark.parametrize("columns", [("words", None, "label"), ("text", "second", "label"),
                                     ("text", None, "class")])  # fmt: skip
def test_missing_column_names_those_present(
    tmp_path: Path, columns: tuple[str, str | None, str]
) -> None:
    source = write(tmp_path / "a.csv", ROWS)
    with pytest.raises(DataError, match=r"a\.csv has no column '\w+'; it has: text, label"):
        load_batches(source, tiny.tokenizer(), "sequence-classification", columns=Columns(*columns))
    with pytest.raises(DataError, match="it has: text, label"):
        require_columns(source, read_rows(source), *columns, "last")


def test_column_missing_in_a_later_row_names_the_row(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "a"}, {"txt": "b"}])
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: no column 'text'"):
        load_batches(source, tiny.tokenizer(), "causal-lm")


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("sequence-classification", {"text": "a", "label": "ugly"}, "'ugly'.*one of bad, good"),
        ("sequence-classification", {"text": "a", "label": 0.5}, "0.5 is not a class number"),
        ("sequence-classification", {"text": "a", "label": -1}, "-1 is not a class number"),
        ("sequence-classification", {"text": "a", "label": 2}, "2 is not a class number of the"),
        ("sequence-classification", {"text": "a", "label": None}, "None is not a class number"),
        ("sequence-classification", {"text": "a", "label": float("inf")}, "not a class number"),
        ("sequence-classification", {"text": None, "label": 0}, "'text' is not text: None"),
        ("causal-lm", {"text": None}, "'text' is not text: None"),
        ("regression", {"text": "a", "label": "good"}, "'good' is not a number$"),
        ("regression", {"text": "a", "label": float("nan")}, "nan is not a number$"),
        ("token-classification", {"text": "the cat", "label": [0]}, "a list is wanted"),
        ("token-classification", {"text": ["cat"], "label": 1}, "a list is wanted"),
        ("token-classification", {"text": ["cat"], "label": [0, 1]}, "1 words but 2 labels"),
        ("token-classification", {"text": ["cat"], "label": ["X"]}, "'X'.*one of bad, good"),
    ],
)
def test_unusable_values_name_the_row(
    tmp_path: Path, task: str, row: dict[str, Any], message: str
) -> None:
    fine: dict[str, Any] = {"text": "cat", "label": 0}
    if task == "token-classification":
        fine = {"text": ["cat"], "label": [0]}
    source = write(tmp_path / "a.jsonl", [fine, row])
    with pytest.raises(DataError, match=message) as caught:
        load_batches(source, tiny.tokenizer(), task, label2id={"bad": 0, "good": 1})
    assert str(caught.value).startswith(f"{source}, row 2: ")


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sees", encoding="utf-8")
    with pytest.raises(DataError, match="3 tokens, less than one window of 4"):
        load_batches(str(tmp_path / "a.txt"), tiny.tokenizer(), "causal-lm", max_length=4)


@pytest.mark.parametrize("task", ["seq2seq-lm", "masked-lm"])
def test_tasks_without_a_reader_say_what_to_do_instead(tmp_path: Path, task: str) -> None:
    source = write(tmp_path / "a.csv", ROWS)
    with pytest.raises(DataError, match=f"{task} models.*make the batches yourself"):
        load_batches(source, tiny.tokenizer(), task)


@pytest.mark.parametrize("change", [{"max_length": 1}, {"batch_size": 0}, {"examples": 0}])
def test_sizes_that_make_no_batch_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    source = write(tmp_path / "a.csv", ROWS)
    with pytest.raises(OptionError, match="at least"):
        load_batches(source, tiny.tokenizer(), "regression", **change)  # type: ignore[arg-type]


def test_resampling_draws_with_replacement_from_the_whole_source(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text(" ".join(tiny.WORDS * 40))
    how: Any = {"tokenizer": tiny.tokenizer(), "task": "causal-lm", "max_length": 8}
    plain = load_batches(str(text), **how, batch_size=1)
    rows = [tuple(batch["input_ids"][0].tolist()) for batch in plain]
    samples = [
        load_batches(str(text), **how, batch_size=1, examples=20, resample=seed)
        for seed in (3, 3, 4)
    ]
    first, again, other = (
        [tuple(batch["input_ids"][0].tolist()) for batch in sample] for sample in samples
    )
    assert first == again != other
    assert len(first) == len(other) == 20 and {*first, *other} <= {*rows}
    whole = load_batches(str(text), **how, batch_size=1, resample=0)
    assert len(whole) == len(plain)
    with pytest.raises(OptionError, match="resample must be a seed from 0, got -1"):
        load_batches(str(text), **how, resample=-1)


def test_a_bootstrap_sample_leaves_out_about_a_third() -> None:
    found = drawn(3000, None, 5)
    assert len(found) == 3000 and found == sorted(found)
    assert len({*found}) / 3000 == pytest.approx(1 - np.exp(-1), abs=0.02)
    assert len(drawn(10, 50, 0)) == 10 and {*drawn(10, 50, 0)} <= {*range(10)}
