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

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from rankopt.data.examples import examples_of, say_affixes, windows_of
from rankopt.data.examples import spread as spread
from rankopt.data.rows import Columns, DataSource, Row
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
    resample: int | None = None,
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
        resample: seed with which the examples are drawn at random, with replacement.

    Raises:
        DataError: missing file or column, unknown label, too little text.
        OptionError: a max_length below 2, or a batch_size or examples below 1.
    """
    require_sizes(max_length, batch_size, examples)
    given = DataSource(source, columns or Columns(), split, rows)
    found = examples_of(given, tokenizer, task, max_length, label2id or {})
    say_affixes(tokenizer, found.before)
    return batched(tokenizer, task, found.take(examples, resample), batch_size)


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
    found = windows_of("", texts, tokenizer, max_length)
    return batched(tokenizer, "causal-lm", found.take(examples), batch_size)


def require_sizes(max_length: int, batch_size: int, examples: int | None) -> None:
    """Refuse sizes with which there is nothing to read.

    Raises:
        OptionError: a max_length below 2, or a batch_size or examples below 1.
    """
    if max_length < 2 or batch_size < 1 or (examples is not None and examples < 1):
        raise OptionError(
            "max_length must be at least 2, batch_size and examples at least 1; got "
            f"{max_length}, {batch_size}, {examples}"
        )


def batched(
    tokenizer: Any, task: str, encoded: Sequence[dict[str, Any]], batch_size: int
) -> list[Batch]:
    """Batches of encoded examples, in their order; rows are padded to the longest of their batch.

    Raises:
        DataError: padding is needed, and the tokenizer has none.
    """
    if task != "causal-lm":
        return _padded(tokenizer, encoded, batch_size, task == "token-classification")
    batches: list[Batch] = []
    for start in range(0, len(encoded), batch_size):
        part = encoded[start : start + batch_size]
        ids = torch.tensor([entry["input_ids"] for entry in part])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if any(entry["ignored"] for entry in part):
            batch["labels"] = ids.clone()
            for row, entry in zip(batch["labels"], part, strict=True):
                row[: entry["ignored"]] = IGNORED
        batches.append(batch)
    return batches


def _padded(
    tokenizer: Any, encoded: Sequence[dict[str, Any]], batch_size: int, of_words: bool
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
