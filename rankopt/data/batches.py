"""Text in, batches out: files with named columns, folders, or data sets by name.

A source is a ``.txt``, ``.json``, ``.jsonl``, ``.tsv``, ``.csv``, ``.parquet`` or ``.arrow`` file
(the first five also packed: ``.jsonl.gz``), a folder with such files or written by
``save_to_disk``, or the name of a data set for the ``datasets`` library: ``NAME`` or
``NAME:CONFIG``. TSV has no quoting, CSV has.

* Language models: all texts, joined by the end-of-text token, cut into windows of ``max_length``
  tokens; what is left at the end is dropped. No padding. A window begins with the tokens that the
  tokenizer itself puts before every text (``<bos>``), if it puts any.
* Classification and regression: one example a row, texts padded to the longest of the batch.
  Several labels a row are a list: of 0 and 1, or of names.
* Token classification: the text column holds a list of words, the label column a list of classes
  (JSON lists in TSV and CSV); the first piece of a word carries its label.

A text may be a chat, a list of messages with ``role`` and ``content``: it is written by the
tokenizer's chat template, or as lines ``role: content`` if there is none. A row without a token or
without a label to predict is skipped; how many were is said on stderr.

With ``examples`` fewer than there are, they are taken at equal distances over the whole source.
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from rankopt.data.labels import Label, classes_of, label_of, list_of
from rankopt.data.rows import Columns, Row, column, read_rows
from rankopt.data.texts import (
    Notes,
    affixes,
    say,
    texts_of,
    tokenized,
    valid,
    words_of,
    words_tokenized,
)
from rankopt.errors import DataError, OptionError
from rankopt.model.tasks import IGNORED, Batch

_OF_ROWS = (
    "sequence-classification",
    "multi-label-classification",
    "regression",
    "token-classification",
)
_NO_TOKEN = "skipped, the tokenizer makes no token of it"
_NO_LABEL = "skipped, no label within max_length that is not ignored"


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
    notes = Notes(list)
    if task == "causal-lm":
        values = enumerate(column(source, rows, columns.text))
        texts = texts_of(source, values, columns.text, tokenizer, notes)
        batches = _windows(f"{source}: ", texts, tokenizer, max_length, batch_size, examples)
        say(source, notes)
        return batches
    if task not in _OF_ROWS:
        raise DataError(
            f"reading data for {task} models is not supported: make the batches yourself and call "
            "rankopt.profile_model"
        )
    taken = spread(len(rows), examples)
    given = _Given(source, rows, taken, tokenizer, max_length, label2id or {}, notes)
    of_words = task == "token-classification"
    encoded = _words(given, columns) if of_words else _texts(given, columns, task)
    say(source, notes)
    if not encoded:
        raise DataError(f"{source}: none of the {len(taken)} rows taken has anything to predict")
    return _padded(tokenizer, encoded, batch_size, of_words)


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
    return _windows("", texts, tokenizer, max_length, batch_size, examples)


def _windows(
    place: str,
    texts: Iterable[str],
    tokenizer: Any,
    max_length: int,
    batch_size: int,
    examples: int | None,
) -> list[Batch]:
    texts = list(texts)
    sample = next((text for text in texts if text.strip()), "")[:99]
    before, behind = affixes(tokenizer, valid(sample))
    end = tokenizer.eos_token_id
    between = behind if end is None else [end]
    size = max_length - len(before)
    if size < 1:
        raise OptionError(
            f"max_length={max_length} leaves no token of the text: the tokenizer puts "
            f"{len(before)} before every text"
        )
    if place and before:
        shown = "".join(tokenizer.convert_ids_to_tokens(before))
        tqdm.write(f"note: every window begins with {shown}, as the tokenizer does", sys.stderr)
    tokens: list[int] = []
    for number, text in enumerate(texts, 1):
        where = f"{place}text {number}"
        found = tokenized(where, tokenizer, valid(text), add_special_tokens=False, verbose=False)
        tokens += [*(between if tokens else []), *found["input_ids"]]
    windows = len(tokens) // size
    if not windows:
        raise DataError(
            f"{place}the text has {len(tokens)} tokens, less than one window of {size}: give more "
            "text, or a smaller max_length"
        )
    starts = [size * n for n in spread(windows, examples)]
    ids = torch.tensor([[*before, *tokens[start : start + size]] for start in starts])
    batches: list[Batch] = []
    for part in torch.split(ids, batch_size):
        batch = {"input_ids": part, "attention_mask": torch.ones_like(part)}
        if len(before) > 1:
            # Else what the tokenizer always writes would be learnt from.
            batch["labels"] = part.clone()
            batch["labels"][:, : len(before)] = IGNORED
        batches.append(batch)
    return batches


def spread(available: int, wanted: int | None) -> list[int]:
    """``wanted`` of ``available`` indices at equal distances; all if there are not more."""
    if wanted is None or wanted >= available:
        return list(range(available))
    return [n * available // wanted for n in range(wanted)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Given:
    """Rows to encode, and with what.

    Attributes:
        source: for errors.
        rows: all of them.
        taken: numbers of those to encode, from 0.
        tokenizer: of the model.
        max_length: tokens at most.
        label2id: for labels given as names; empty if the classes are not known.
        notes: of what was skipped or replaced.
    """

    source: str
    rows: Sequence[Row]
    taken: Sequence[int]
    tokenizer: Any
    max_length: int
    label2id: Mapping[str, int]
    notes: Notes

    def column(self, name: str) -> list[Any]:
        """Of all rows."""
        return column(self.source, self.rows, name)

    def place(self, row: int) -> str:
        """Of a row, for errors."""
        return f"{self.source}, row {row + 1}"


def _texts(given: _Given, columns: Columns, task: str) -> list[dict[str, Any]]:
    labels = given.column(columns.label)
    parts = []
    for name in (columns.text, columns.pair):
        if name is not None:
            values = given.column(name)
            chosen = ((n, values[n]) for n in given.taken)
            parts.append(texts_of(given.source, chosen, name, given.tokenizer, given.notes))
    encoded: list[dict[str, Any]] = []
    how = {"truncation": True, "max_length": given.max_length}
    for n, *texts in zip(given.taken, *parts, strict=True):
        where = given.place(n)
        label = label_of(where, labels[n], task, given.label2id)
        entry = dict(tokenized(where, given.tokenizer, *texts, **how))
        if not len(entry["input_ids"]):
            given.notes[_NO_TOKEN].append(n + 1)
            continue
        if encoded and _width(label) != _width(encoded[0]["labels"]):
            first = _width(encoded[0]["labels"])
            raise DataError(f"{where}: {_width(label)} labels, the rows before it have {first}")
        encoded.append({**entry, "labels": label})
    return encoded


def _width(label: Label) -> int | str:
    return len(label) if isinstance(label, list) else "one"


def _words(given: _Given, columns: Columns) -> list[dict[str, Any]]:
    labels, texts = given.column(columns.label), given.column(columns.text)
    encoded = []
    for n in given.taken:
        where = given.place(n)
        words = words_of(where, list_of(where, texts[n]), n, given.notes)
        named = list_of(where, labels[n])
        if len(words) != len(named):
            raise DataError(f"{where}: {len(words)} words but {len(named)} labels")
        classes = classes_of(where, named, given.label2id)
        pieces: list[int] = []
        if words:
            entry, word_of = words_tokenized(where, given.tokenizer, words, given.max_length)
            for previous, word in zip([None, *word_of], word_of, strict=False):
                first = word is not None and word != previous
                pieces.append(classes[word] if first and word is not None else IGNORED)
        if all(label == IGNORED for label in pieces):
            given.notes[_NO_LABEL].append(n + 1)
        else:
            encoded.append({**entry, "labels": pieces})
    return encoded


def _padded(
    tokenizer: Any, encoded: list[dict[str, Any]], batch_size: int, of_words: bool
) -> list[Batch]:
    batches: list[Batch] = []
    masked = "attention_mask" in getattr(tokenizer, "model_input_names", ["attention_mask"])
    for start in range(0, len(encoded), batch_size):
        part = encoded[start : start + batch_size]
        labels = [entry["labels"] for entry in part]
        inputs = [{k: v for k, v in entry.items() if k != "labels"} for entry in part]
        uneven = len({len(entry["input_ids"]) for entry in part}) > 1
        if uneven and tokenizer.pad_token_id is None:
            raise DataError(
                "the tokenizer has no padding token, and the texts of a batch are not of one "
                "length: set tokenizer.pad_token and save it, or take batch_size=1"
            )
        batch = dict(
            tokenizer.pad(
                inputs,
                padding=uneven,
                return_attention_mask=uneven or masked,
                return_tensors="pt",
            )
        )
        if of_words:
            width = batch["input_ids"].shape[1]
            missing = [[IGNORED] * (width - len(row)) for row in labels]
            left = getattr(tokenizer, "padding_side", "right") == "left"
            labels = [
                [*gap, *row] if left else [*row, *gap]
                for gap, row in zip(missing, labels, strict=True)
            ]
        batch["labels"] = torch.tensor(labels)
        batches.append(batch)
    return batches
