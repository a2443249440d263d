"""Which positions of a batch are padding."""

import sys

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rankopt.errors import DataError
from rankopt.model.tasks import IGNORED, Batch


def masks_of(task: str, batch: Batch) -> list[Tensor]:
    """Masks of the encoder's and the decoder's positions, ``(B, T)``, False at padding."""
    found = [batch[name] for name in ("attention_mask", "decoder_attention_mask") if name in batch]
    masks = [mask != 0 for mask in found if isinstance(mask, Tensor) and mask.dim() == 2]
    if task == "seq2seq-lm" and "decoder_attention_mask" not in batch:
        masks.append(batch["labels"] != IGNORED)
    return masks


def separated(model: nn.Module, task: str, batch: Batch) -> Batch:
    """Encoder and decoder positions of different number: masks are recognised by their shape.

    The decoder gets one more position, ignored, that none before it attends to.

    Raises:
        DataError: it has as many as it can have.
    """
    if task != "seq2seq-lm" or all(bool(mask.all()) for mask in masks_of(task, batch)):
        return batch
    given = [batch[name] for name in ("input_ids", "attention_mask") if name in batch]
    lengths = {tensor.shape[1] for tensor in given if isinstance(tensor, Tensor)}
    if batch["labels"].shape[1] not in lengths | {getattr(model.config, "max_source_positions", 0)}:
        return batch
    positions, most = batch["labels"].shape[1], getattr(model.config, "max_position_embeddings", 0)
    if positions == most:
        raise DataError(
            f"input and labels are padded to {positions} positions, the most that the model takes: "
            "their padding masks have one shape and cannot be distinguished; make the labels one "
            "position shorter"
        )
    ends = {"labels": IGNORED, "decoder_input_ids": 0, "decoder_attention_mask": 0}
    longer = {
        name: torch.cat([batch[name], torch.full_like(batch[name][:, :1], end)], 1)
        for name, end in ends.items()
        if name in batch
    }
    return {**batch, **longer}


def warn_of_padding(model: nn.Module, batch: Batch) -> None:
    """Say on stderr that a batch has padding and no mask."""
    pad, ids = getattr(model.config, "pad_token_id", None), batch.get("input_ids")
    eos = getattr(model.config, "eos_token_id", None)
    if pad is None or pad == eos or ids is None or "attention_mask" in batch:
        return
    if bool((ids == pad).any()):
        tqdm.write(
            "warning: the batches hold padding but no attention_mask: it is learnt from",
            file=sys.stderr,
        )
