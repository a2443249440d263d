"""What a source can give to a task, and the encoding of what is taken of it.

How many windows or rows there are is known before any is encoded: several sources can be asked for
their shares (see mixtures).
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from rankopt.data.labels import Label, classes_of, label_of, list_of
from rankopt.data.rows import Columns, DataSource, Row, column
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
from rankopt.model.tasks import IGNORED

_OF_ROWS = (
    "sequence-classification",
    "multi-label-classification",
    "regression",
    "token-classification",
)
_NO_TOKEN = "skipped, the tokenizer makes no token of it"
_NO_LABEL = "skipped, no label within max_length that is not ignored"


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """What a source can give.

    Attributes:
        available: windows or rows.
        encode: the numbers of some of them, from 0 -> each as ``batched`` takes it; rows with
            nothing to predict are left out.
        before: tokens that the tokenizer puts before every window.
    """

    available: int
    encode: Callable[[Sequence[int]], list[dict[str, Any]]]
    before: tuple[int, ...] = ()

    def take(self, wanted: int | None, resample: int | None = None) -> list[dict[str, Any]]:
        """So many, at equal distances, all if there are not more; or drawn, see drawn."""
        if resample is None:
            return self.encode(spread(self.available, wanted))
        return self.encode(drawn(self.available, wanted, resample))


def examples_of(
    given: DataSource, tokenizer: Any, task: str, max_length: int, label2id: Mapping[str, int]
) -> Examples:
    """Read a source for a task; see load_batches."""
    source, columns, rows = given.source, given.columns, given.read()
    if task == "causal-lm":
        notes = Notes(list)
        values = enumerate(column(source, rows, columns.text))
        texts = texts_of(source, values, columns.text, tokenizer, notes)
        found = windows_of(f"{source}: ", texts, tokenizer, max_length)
        say(source, notes)
        return found
    if task not in _OF_ROWS:
        raise DataError(
            f"reading data for {task} models is not supported: make the batches yourself and call "
            "rankopt.profile_model"
        )

    def encode(taken: Sequence[int]) -> list[dict[str, Any]]:
        notes = Notes(list)
        reading = _Reading(source, rows, taken, tokenizer, max_length, label2id, notes)
        of_words = task == "token-classification"
        encoded = _words(reading, columns) if of_words else _texts(reading, columns, task)
        say(source, notes)
        if not encoded:
            raise DataError(
                f"{source}: none of the {len(taken)} rows taken has anything to predict"
            )
        return encoded

    return Examples(len(rows), encode)


def say_affixes(tokenizer: Any, before: Sequence[int]) -> None:
    """One line on stderr if windows begin with tokens that are not of the text."""
    if before:
        shown = "".join(tokenizer.convert_ids_to_tokens(list(before)))
        tqdm.write(f"note: every window begins with {shown}, as the tokenizer does", sys.stderr)


def windows_of(place: str, texts: Iterable[str], tokenizer: Any, max_length: int) -> Examples:
    """Windows of texts, which are joined by the tokenizer's end-of-text token, if it has one.

    Args:
        place: what stands before a text's number in errors.
        texts: in their order.
        tokenizer: of the model.
        max_length: tokens of a window.

    Raises:
        DataError: less text than one window.
        OptionError: no token of the text fits in a window.
    """
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

    def encode(taken: Sequence[int]) -> list[dict[str, Any]]:
        # Several tokens that the tokenizer always writes would be learnt from.
        ignored = len(before) if len(before) > 1 else 0
        cut = ([*before, *tokens[size * n : size * (n + 1)]] for n in taken)
        return [{"input_ids": ids, "ignored": ignored} for ids in cut]

    return Examples(windows, encode, tuple(before))


def spread(available: int, wanted: int | None) -> list[int]:
    """``wanted`` of ``available`` indices at equal distances; all if there are not more."""
    if wanted is None or wanted >= available:
        return list(range(available))
    return [n * available // wanted for n in range(wanted)]


def drawn(available: int, wanted: int | None, seed: int) -> list[int]:
    """``wanted`` of ``available`` indices, drawn with replacement and sorted: a bootstrap sample.

    No more are drawn than there are.

    Raises:
        OptionError: a seed below 0.
    """
    if seed < 0:
        raise OptionError(f"resample must be a seed from 0, got {seed}")
    count = available if wanted is None else min(wanted, available)
    return sorted(np.random.default_rng(seed).integers(0, available, count).tolist())


@dataclasses.dataclass(frozen=True, eq=False)
class _Reading:
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


def _texts(reading: _Reading, columns: Columns, task: str) -> list[dict[str, Any]]:
    labels = reading.column(columns.label)
    parts = []
    for name in (columns.text, columns.pair):
        if name is not None:
            values = reading.column(name)
            chosen = ((n, values[n]) for n in reading.taken)
            parts.append(texts_of(reading.source, chosen, name, reading.tokenizer, reading.notes))
    encoded: list[dict[str, Any]] = []
    how = {"truncation": True, "max_length": reading.max_length}
    for n, *texts in zip(reading.taken, *parts, strict=True):
        where = reading.place(n)
        label = label_of(where, labels[n], task, reading.label2id)
        entry = dict(tokenized(where, reading.tokenizer, *texts, **how))
        if not len(entry["input_ids"]):
            reading.notes[_NO_TOKEN].append(n + 1)
            continue
        if encoded and _width(label) != _width(encoded[0]["labels"]):
            first = _width(encoded[0]["labels"])
            raise DataError(f"{where}: {_width(label)} labels, the rows before it have {first}")
        encoded.append({**entry, "labels": label})
    return encoded


def _width(label: Label) -> int | str:
    return len(label) if isinstance(label, list) else "one"


def _words(reading: _Reading, columns: Columns) -> list[dict[str, Any]]:
    labels, texts = reading.column(columns.label), reading.column(columns.text)
    encoded = []
    for n in reading.taken:
        where = reading.place(n)
        words = words_of(where, list_of(where, texts[n]), n, reading.notes)
        named = list_of(where, labels[n])
        if len(words) != len(named):
            raise DataError(f"{where}: {len(words)} words but {len(named)} labels")
        classes = classes_of(where, named, reading.label2id)
        pieces: list[int] = []
        if words:
            entry, word_of = words_tokenized(where, reading.tokenizer, words, reading.max_length)
            for previous, word in zip([None, *word_of], word_of, strict=False):
                first = word is not None and word != previous
                pieces.append(classes[word] if first and word is not None else IGNORED)
        if all(label == IGNORED for label in pieces):
            reading.notes[_NO_LABEL].append(n + 1)
        else:
            encoded.append({**entry, "labels": pieces})
    return encoded
