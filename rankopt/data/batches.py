"""Text in, batches out: files with named columns, or data sets by name.

A source is a ``.txt``, ``.jsonl``, ``.tsv`` or ``.csv`` file, or the name of a data set for the
``datasets`` library: ``NAME`` or ``NAME:CONFIG`` (a local folder is a name too). TSV has no
quoting, CSV has.

* Language models: all texts, joined by the end-of-text token, cut into windows of ``max_length``
  tokens; what is left at the end is dropped. No padding.
* Classification and regression: one example a row, texts padded to the longest of the batch.
* Token classification: the text column holds a list of words, the label column a list of classes
  (JSON lists in TSV and CSV); the first piece of a word carries its label.

With ``examples`` fewer than there are, they are taken at equal distances over the whole source.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from rankopt.data.rows import Columns, Row, column, read_rows, texts_of
from rankopt.errors import DataError, OptionError
from rankopt.model.tasks import IGNORED, Batch


def load_batches(
    source: str,
    tokenizer: Any,
    task: str,
    *,
    columns: Columns | None = None,
    split: str | None = None,
    max_length: int = 256,
    batch_size: int = 4,
    examples: int | None = None,
    label2id: Mapping[str, int] | None = None,
    rows: Sequence[Row] | None = None,
) -> list[Batch]:
    """Read a source into batches for a task.

    Args:
        source: file or data set.
        tokenizer: of the model.
        task: see ProfileInfo.
        columns: names of the columns.
        split: of a data set; ``train`` if not given.
        max_length: tokens of a window, or at most of an example.
        batch_size: examples of a batch.
        examples: how many to take, at equal distances; all if not given.
        label2id: for labels given as names.
        rows: of the source, if they have been read already.

    Raises:
        DataError: missing file or column, unknown label, too little text.
        OptionError: a max_length below 2, or a batch_size or examples below 1.
    """
    if max_length < 2 or batch_size < 1 or (examples is not None and examples < 1):
        raise OptionError(
            "max_length must be at least 2, batch_size and examples at least 1; got "
            f"{max_length}, {batch_size}, {examples}"
        )
    columns = columns or Columns()
    rows = read_rows(source, split) if rows is None else rows
    if task == "causal-lm":
        texts = texts_of(source, rows, columns.text)
        return text_batches(texts, tokenizer, max_length, batch_size, examples)
    if task not in ("sequence-classification", "regression", "token-classification"):
        raise DataError(
            f"reading data for {task} models is not supported: make the batches yourself and call "
            "rankopt.profile_model"
        )
    labels = column(source, rows, columns.label)
    taken = spread(len(rows), examples)
    if task == "token-classification":
        texts = column(source, rows, columns.text)
        encoded = [
            _encode_words(source, n, tokenizer, texts[n], labels[n], max_length, label2id or {})
            for n in taken
        ]
        return _padded(tokenizer, encoded, batch_size)
    texts = texts_of(source, rows, columns.text)
    pairs = None if columns.pair is None else texts_of(source, rows, columns.pair)
    encoded = []
    for n in taken:
        text = (texts[n],) if pairs is None else (texts[n], pairs[n])
        entry = dict(tokenizer(*text, truncation=True, max_length=max_length))
        entry["labels"] = _label(source, n, labels[n], task, label2id or {})
        encoded.append(entry)
    return _padded(tokenizer, encoded, batch_size)


def text_batches(
    texts: Iterable[str],
    tokenizer: Any,
    max_length: int = 256,
    batch_size: int = 4,
    examples: int | None = None,
) -> list[Batch]:
    """Cut texts into windows for a causal language model.

    Args:
        texts: joined by the tokenizer's end-of-text token, if it has one.
        tokenizer: of the model.
        max_length: tokens of a window.
        batch_size: windows of a batch.
        examples: how many windows to take, at equal distances; all if not given.

    Returns:
        Batches of ``input_ids`` and ``attention_mask``, shape ``(batch_size, max_length)``.

    Raises:
        DataError: less text than one window.
    """
    tokens: list[int] = []
    for text in texts:
        if tokens and tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = len(tokens) // max_length
    if not windows:
        raise DataError(f"the text has {len(tokens)} tokens, less than one window of {max_length}")
    starts = [max_length * n for n in spread(windows, examples)]
    ids = torch.tensor([tokens[start : start + max_length] for start in starts])
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in torch.split(ids, batch_size)
    ]


def spread(available: int, wanted: int | None) -> list[int]:
    """``wanted`` of ``available`` indices at equal distances; all if there are not more."""
    if wanted is None or wanted >= available:
        return list(range(available))
    return [n * available // wanted for n in range(wanted)]


def _label(
    source: str, row: int, value: Any, task: str, label2id: Mapping[str, int]
) -> int | float:
    try:
        if task != "regression" and str(value) in label2id:
            return label2id[str(value)]
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        if task == "regression":
            return number
        if number != int(number) or int(number) < 0:
            raise ValueError
        if label2id and int(number) not in label2id.values():
            raise ValueError
        return int(number)
    except (TypeError, ValueError) as error:
        wanted = "a number" if task == "regression" else "a class number of the model"
        known = f" or one of {', '.join(label2id)}" if label2id and task != "regression" else ""
        raise DataError(
            f"{source}, row {row + 1}: the label {value!r} is not {wanted}{known}"
        ) from error


def _encode_words(
    source: str,
    row: int,
    tokenizer: Any,
    words: Any,
    labels: Any,
    max_length: int,
    label2id: Mapping[str, int],
) -> dict[str, Any]:
    words, labels = (_list(source, row, value) for value in (words, labels))
    if len(words) != len(labels):
        raise DataError(f"{source}, row {row + 1}: {len(words)} words but {len(labels)} labels")
    classes = [
        IGNORED
        if label == IGNORED
        else _label(source, row, label, "token-classification", label2id)
        for label in labels
    ]
    encoding = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    pieces: list[int | float] = []
    previous = None
    for word in encoding.word_ids():
        pieces.append(IGNORED if word is None or word == previous else classes[word])
        previous = word
    return {**dict(encoding), "labels": pieces}


def _list(source: str, row: int, value: Any) -> list[Any]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, list | tuple):
        raise DataError(f"{source}, row {row + 1}: a list is wanted, got {value!r:.60}")
    return list(found)


def _padded(tokenizer: Any, encoded: list[dict[str, Any]], batch_size: int) -> list[Batch]:
    batches: list[Batch] = []
    for start in range(0, len(encoded), batch_size):
        part = encoded[start : start + batch_size]
        labels = [entry["labels"] for entry in part]
        inputs = [{k: v for k, v in entry.items() if k != "labels"} for entry in part]
        batch = dict(tokenizer.pad(inputs, padding=True, return_tensors="pt"))
        if isinstance(labels[0], list):
            width = batch["input_ids"].shape[1]
            labels = [row + [IGNORED] * (width - len(row)) for row in labels]
        batch["labels"] = torch.tensor(labels)
        batches.append(batch)
    return batches
