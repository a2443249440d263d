"""Model and tokenizer brought together before the first batch, or refused in one line."""

import inspect
from typing import Any

from rankopt.errors import DataError
from rankopt.model.inputs import size_of, vocabulary_of
from rankopt.model.loading import longest_input
from rankopt.model.tasks import Batch

#: Tokens of a window or a row, where model and tokenizer allow them.
_USUAL = 256


def fit_length(model: Any, tokenizer: Any, wanted: int | None) -> int:
    """Tokens of a window, or at most of a row: as wanted, or what the model can take of 256.

    Raises:
        DataError: more are wanted than the model takes.
    """
    longest = longest_input(model)
    if wanted is None:
        most = longest or getattr(tokenizer, "model_max_length", None) or _USUAL
        return int(min(_USUAL, most))
    if longest is not None and wanted > longest:
        raise DataError(f"max_length={wanted}: the model takes at most {longest} tokens")
    return wanted


def fit_padding(model: Any, tokenizer: Any, batch_size: int) -> None:
    """Tell a model without a padding token the tokenizer's: classifiers look for the last token.

    Raises:
        DataError: neither has one, and there is something to pad.
    """
    if _padding(model) is not None:
        return
    if tokenizer.pad_token_id is not None:
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = tokenizer.pad_token_id
    elif batch_size > 1:
        raise DataError(
            "neither the tokenizer nor the model has a padding token: take batch_size=1, or set "
            "tokenizer.pad_token and save it beside the model"
        )


def _padding(model: Any) -> int | None:
    """The model's own padding token, if it is one that it has an embedding for."""
    number = getattr(model.config.get_text_config(), "pad_token_id", None)
    rows = vocabulary_of(model)
    known = isinstance(number, int) and number >= 0 and (rows is None or number < rows)
    return number if known else None


def fit_batches(model: Any, tokenizer: Any, batches: list[Batch]) -> list[Batch]:
    """The batches without what the model does not take, padded by the model's own token.

    Raises:
        DataError: a token or a type that the model has no embedding for, or padding in a batch of a
            model without an attention mask.
    """
    _check_numbers(model, tokenizer, batches)
    takes, padding = inspect.signature(model.forward).parameters, _padding(model)
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values())
    fitted: list[Batch] = []
    for batch in batches:
        ready = dict(batch)
        if _is_padded(batch):
            if "input_ids" in takes and "attention_mask" not in takes:
                raise DataError(
                    f"{type(model).__name__} takes no attention_mask, so that it reads padding as "
                    "text: take batch_size=1"
                )
            if padding is not None:
                ids = ready["input_ids"]
                ready["input_ids"] = ids.masked_fill(ready["attention_mask"] == 0, padding)
        known = open_ended or "input_ids" not in takes
        fitted.append({name: ready[name] for name in ready if known or name in takes})
    return fitted


def _is_padded(batch: Batch) -> bool:
    return "attention_mask" in batch and not bool(batch["attention_mask"].all())


def _check_numbers(model: Any, tokenizer: Any, batches: list[Batch]) -> None:
    ids = [batch["input_ids"] for batch in batches]
    if any(each.is_floating_point() for each in ids):
        raise DataError(f"{type(tokenizer).__name__} gives tokens that are no whole numbers")
    rows, largest = (
        vocabulary_of(model),
        max(int(each.max()) for each in ids),
    )
    if rows is not None and largest >= rows:
        raise DataError(
            f"the tokenizer gives token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), "
            f"the model's embedding has {rows} rows: save the model again after "
            f"model.resize_token_embeddings({len(tokenizer)}), or with the tokenizer it was "
            "trained with"
        )
    outputs = getattr(model.config, "num_labels", None)
    for labels in (batch["labels"] for batch in batches if "labels" in batch):
        if labels.is_floating_point() and labels[0].numel() != outputs:
            raise DataError(
                f"a row has {labels[0].numel()} numbers as its label, the model has {outputs} "
                "outputs: give a list of as many"
            )
    kinds = [int(batch["token_type_ids"].max()) for batch in batches if "token_type_ids" in batch]
    for name, module in model.named_modules():
        of_types = module if name.endswith("token_type_embeddings") else None
        known = size_of(of_types, "num_embeddings")
        if known is not None and max(kinds, default=0) >= known:
            raise DataError(
                f"the tokenizer gives token type {max(kinds)}, the model has {known} of them: "
                "save the tokenizer that the model was trained with beside it"
            )
