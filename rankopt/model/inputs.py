"""Batches as people have them, brought to the form a model takes, and refused where they have none.

A batch is a dictionary of tensors. Lists of numbers and numpy arrays become tensors, dataclasses
and the dictionaries of tokenizers become dictionaries. Token ids and labels are held against the
vocabulary and the classes: what is out of range would otherwise end in an IndexError, or on a GPU
in an assertion that names nothing.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.errors import DataError
from rankopt.model.weights import embedding_of

IGNORED = -100
#: A causal language model whose head takes labels that have been shifted; a causal-lm in reports.
UNSHIFTED = "causal-lm-unshifted"
#: Tasks with a label at every position.
OF_TOKENS = (
    "causal-lm",
    UNSHIFTED,
    "seq2seq-lm",
    "masked-lm",
    "token-classification",
)
#: Names of placeholders' ids in a configuration, as in image_token_id.
_OTHER_KINDS = ("image", "video", "audio")
_WANTED = (
    "a batch is a dictionary of tensors as the model takes them, {'input_ids': ..., "
    "'attention_mask': ...}"
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a batch may hold; None where it is not known.

    Attributes:
        tokens: size of the embedding.
        classes: that a label may name.
        answers: yes-or-no labels, or numbers, of an example.
        special: token ids that stand for pictures or sound, in the embedding or not.
    """

    tokens: int | None = None
    classes: int | None = None
    answers: int | None = None
    special: frozenset[int] = frozenset()


#: Of a model of which nothing is known.
UNKNOWN = Limits()


def limits_of(model: nn.Module, task: str) -> Limits:
    """Of a model with a head."""
    config: Any = getattr(model, "config", None)
    # Of a user's class, any of these may be missing.
    labels = getattr(config, "num_labels", None)
    classes = labels
    if "-lm" in task:
        classes = size_of(embedding_of(model, "output"), "out_features")
    special = {
        value
        for name, value in getattr(config, "__dict__", {}).items()
        if name.startswith(_OTHER_KINDS) and "_token_i" in name and isinstance(value, int)
    }
    return Limits(
        vocabulary_of(model),
        classes if task not in ("regression", "multiple-choice") else None,
        labels if task in ("regression", "multi-label-classification") else None,
        frozenset(special),
    )


def vocabulary_of(model: nn.Module) -> int | None:
    """Rows of the embedding, where a model has one that says so."""
    return size_of(embedding_of(model), "num_embeddings")


def size_of(module: nn.Module | None, name: str) -> int | None:
    """A size that a module has as an attribute, or None."""
    found = getattr(module, name, None)
    return found if isinstance(found, int) else None


def listed(batches: Any) -> Iterable[Any]:
    """Batches, one after the other.

    Raises:
        DataError: one batch instead of several, or no batches at all; says what is wanted.
    """
    if isinstance(batches, Mapping):
        raise DataError(f"batches were given as {_kind(batches)}: that is one, give a list of them")
    if isinstance(batches, str | bytes | os.PathLike):
        raise DataError(
            f"batches were given as {_kind(batches)}: give a list of dictionaries of tensors; the "
            "command line's --data, and rankopt.load_batches, read files"
        )
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise DataError(f"batches were given as {_kind(batches)}: give a list of batches")
    found: Iterable[Any] = batches
    return found


def as_batch(batch: Any, number: int) -> dict[str, Any]:
    """One batch as a dictionary of tensors.

    Args:
        batch: as it was given.
        number: of the batch, from 0.

    Raises:
        DataError: no dictionary, texts instead of tokens, or lists of different lengths.
    """
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type | Mapping):
        batch = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        batch = {name: value for name, value in batch.items() if value is not None}
    if not isinstance(batch, Mapping):
        raise DataError(
            f"batch {number + 1} is {_kind(batch)}: {_WANTED}; with loss_fn it may be anything"
        )
    return {str(name): _tensor(str(name), value, number) for name, value in batch.items()}


def _tensor(name: str, value: Any, number: int) -> Any:
    where = f"batch {number + 1}: {name!r}"
    if isinstance(value, list | tuple) and value and all(isinstance(x, Tensor) for x in value):
        if len({x.shape for x in value}) > 1:
            return value
        value = torch.stack(list(value))
    elif isinstance(value, list | tuple | np.ndarray):
        if any(isinstance(x, str) for x in value):
            raise DataError(f"{where} holds texts: tokenise them first, {_WANTED}")
        try:
            value = torch.as_tensor(np.asarray(value) if len(value) else value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where} is no rectangle of numbers: pad its rows to one length"
            ) from error
        if value.is_floating_point() and isinstance(value, Tensor):
            value = value.to(torch.get_default_dtype())
    if isinstance(value, Tensor) and name.endswith("input_ids") and not value.is_floating_point():
        return value.long()
    return value


def check_tokens(batch: Mapping[str, Any], limits: Limits, number: int) -> None:
    """Refuse what no model takes: no examples, one dimension too few, tokens out of range.

    Raises:
        DataError: names the batch, the example, the value and the limit.
    """
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor):
        if ids.dim() < 2:
            raise DataError(
                f"batch {number + 1}: input_ids of shape {tuple(ids.shape)}; (B, T) is wanted, one "
                "row for each example"
            )
        if not len(ids):
            raise DataError(f"batch {number + 1} has no examples")
        if not ids.is_floating_point():
            _in_range(ids, limits.tokens, limits.special, number, "token", "the embedding has rows")
    decoder = batch.get("decoder_input_ids")
    if isinstance(decoder, Tensor) and not decoder.is_floating_point():
        _in_range(decoder, limits.classes, frozenset(), number, "token", "the head has tokens")


def fitting_labels(
    task: str, labels: Any, batch: Mapping[str, Any], limits: Limits, number: int
) -> Tensor:
    """Labels of the shape and kind that a task has.

    Raises:
        DataError: another shape, or a class that the model has not; names batch and example.
    """
    where = f"batch {number + 1}: labels"
    if not isinstance(labels, Tensor) or not labels.dim():
        raise DataError(f"{where} are {_kind(labels)}: a tensor with one row an example is wanted")
    shape: tuple[int, ...] = tuple(labels.shape)
    ids: Any = batch.get("input_ids")
    if not len(labels):
        raise DataError(f"batch {number + 1} has no examples")
    if labels.dim() < 3 and isinstance(ids, Tensor) and len(ids) != len(labels):
        raise DataError(f"{where} of {len(labels)} examples for input_ids of {len(ids)}")
    if task == "regression":
        if labels[0].numel() != (limits.answers or labels[0].numel()):
            raise DataError(f"{where} of shape {shape} for {limits.answers} numbers an example")
        return labels if labels.is_floating_point() else labels.to(torch.get_default_dtype())
    if task == "multi-label-classification":
        return _answers(labels, limits, where)
    if task in OF_TOKENS:
        alike = isinstance(ids, Tensor) and task != "seq2seq-lm" and "target_mapping" not in batch
        if labels.dim() < 2 or (alike and labels.dim() == 2 and shape[1] != ids.shape[1]):
            wanted = tuple(ids.shape) if alike else "(B, T)"
            raise DataError(f"{where} of shape {shape}; a label for each token is wanted, {wanted}")
    elif labels.dim() > 1 and labels[0].numel() == 1:
        labels = labels.reshape(-1)
    elif labels.dim() > 1:
        raise DataError(
            f"{where} of shape {shape}: one class an example is wanted, (B,); for several "
            'yes-or-no answers set model.config.problem_type = "multi_label_classification"'
        )
    if labels.is_floating_point() and not bool((labels == labels.long()).all()):
        raise DataError(f"{where} are no whole numbers: class numbers are wanted")
    classes: Tensor = labels.to(torch.long)
    limit = int(ids.shape[1]) if task == "multiple-choice" and ids is not None else limits.classes
    _in_range(classes, limit, frozenset({IGNORED}), number, "label", "the model has classes")
    return classes


def _answers(labels: Tensor, limits: Limits, where: str) -> Tensor:
    wanted = limits.answers or labels[0].numel()
    if labels.dim() != 2 or labels.shape[1] != wanted:
        raise DataError(
            f"{where} of shape {tuple(labels.shape)}: {wanted} yes-or-no answers an example are "
            f"wanted, (B, {wanted}), not class numbers"
        )
    labels = labels if labels.is_floating_point() else labels.to(torch.get_default_dtype())
    outside = ~((labels >= 0) & (labels <= 1))
    if bool(outside.any()):
        example, answer = outside.nonzero()[0].tolist()
        raise DataError(
            f"{where}: {labels[example, answer].item():g} in example {example + 1}; an answer is "
            "0 or 1"
        )
    return labels


def _in_range(
    values: Tensor, limit: int | None, other: frozenset[int], number: int, what: str, of: str
) -> None:
    if limit is None or not values.numel():
        return
    outside = (values < 0) | (values >= limit)
    for special in other if bool(outside.any()) else ():
        outside &= values != special
    if bool(outside.any()):
        place = outside.nonzero()[0].tolist()
        raise DataError(
            f"batch {number + 1}: {what} {int(values[tuple(place)])} in example {place[0] + 1}; "
            f"{of} 0 to {limit - 1}"
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    return "None" if value is None else f"a value of type {type(value).__name__}"


def without_placeholders(ids: Tensor, batch: Mapping[str, Any], limits: Limits) -> Tensor:
    """Tokens as labels; those that stand for pictures or sound in the batch are ignored."""
    names = (*_OTHER_KINDS, "pixel", "input_features", "input_values")
    if not any(name.startswith(names) for name in batch):
        return ids
    special = torch.tensor(sorted(limits.special), dtype=ids.dtype, device=ids.device)
    return ids.masked_fill(torch.isin(ids, special), IGNORED)


def real_positions(mask: Tensor) -> Tensor | None:
    """Positions that are no padding, ``(B, T)``; None if the mask does not tell.

    Args:
        mask: ``(B, T)``, zero at padding, of any dtype; or ``(B, heads, queries, keys)``, true or
            one where a query attends to a key, or added to the scores: then zero there.
    """
    if mask.dim() == 2:
        return mask != 0
    attended = _attended(mask)
    if attended is None:
        return None
    # A position that attends, or is attended to by, no other is padding.
    itself = torch.eye(attended.shape[1], dtype=torch.bool, device=mask.device)
    others = attended & ~itself
    return others.any(1) | others.any(2)


def links(mask: Tensor) -> Tensor | None:
    """Whether each position but the first has the one before as its context, ``(B, T - 1)``."""
    if mask.dim() == 2:
        # Masks of packed rows number the documents.
        return (mask[:, 1:] == mask[:, :-1]) & (mask[:, :-1] != 0)
    attended = _attended(mask)
    return None if attended is None else attended.diagonal(-1, 1, 2)


def _attended(mask: Tensor) -> Tensor | None:
    """Which keys each query attends to, ``(B, queries, keys)``."""
    if mask.dim() != 4 or mask.shape[2] != mask.shape[3]:
        return None
    # What is added is a large negative number where a key is hidden, and may be a bias elsewhere.
    return (mask > -9000.0 if mask.is_floating_point() else mask != 0).any(1)


def document_starts(batch: Mapping[str, Any], positions: int) -> Tensor | None:
    """Where documents after the first begin in packed rows, ``(B or 1, T)``; None if none do."""
    places, ends = batch.get("position_ids"), batch.get("cu_seq_lens_q")
    if isinstance(places, Tensor) and places.dim() == 2 and places.shape[1] == positions:
        again = (places[:, 1:] <= places[:, :-1]) & (places[:, 1:] == places.amin(1, keepdim=True))
        starts = torch.cat([torch.zeros_like(again[:, :1]), again], 1)
        return starts if bool(starts.any()) else None
    if isinstance(ends, Tensor) and ends.dim() == 1 and len(ends) > 2 and ends[-1] == positions:
        starts = torch.zeros(1, positions, dtype=torch.bool, device=ends.device)
        starts[0, ends[1:-1].long()] = True
        return starts
    return None


def require_unmoved(model: str, labels: Tensor, ids: Tensor | None) -> None:
    """Refuse labels that are the next tokens already, where the head moves them itself.

    Raises:
        DataError: they are; names the model.
    """
    if ids is None or labels.shape != ids.shape or bool(copied(labels, ids)):
        return
    last = torch.full_like(ids[:, :1], IGNORED)
    if bool(copied(labels.to(ids.device), torch.cat([ids[:, 1:], last], 1))):
        raise DataError(
            f"the labels are the next tokens of the input: {model} moves labels by "
            "one place itself, and would predict the token after the next; give labels equal to "
            "input_ids, or leave them out"
        )


def copied(labels: Tensor, ids: Tensor) -> Tensor:
    """Whether labels are the input itself, where they are not ignored."""
    if labels.shape != ids.shape:
        return torch.tensor(False)
    return ((labels == ids.to(labels.device)) | (labels == IGNORED)).all()
