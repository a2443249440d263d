"""Which positions of a batch are padding, and at which layers.

Second moments leave padding out, so a layer's positions are compared with the masks of a batch. The
encoder's and the decoder's may have one shape: which of them a layer sees is found once, by running
a batch again with a decoder one position shorter and looking at whose inputs became shorter too.
Layers over sound see frames where the mask has samples: models that shorten it say how. Layers
whose positions no mask fits are tried with other contents of the padding; where that changes what
they see, padding enters their moments, which is said on stderr.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rankopt.measure.layout import Frames, Layout, Use
from rankopt.measure.taps import input_of
from rankopt.model.inputs import IGNORED, document_starts, real_positions
from rankopt.model.tasks import Batch

#: Runs the model on a batch.
Run = Callable[[Any], object]


def masks_of(model: nn.Module, task: str, batch: Batch) -> list[Tensor | None]:
    """Masks of the encoder's and the decoder's positions, ``(B, T)``, False at padding."""
    source, target = (batch.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    if isinstance(source, Tensor) and source.dim() == 3 and task == "multiple-choice":
        source = source.flatten(0, 1)
    labels = batch.get("labels")
    of_tokens = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
    if target is None and of_tokens and _has_decoder(model, task):
        target = labels != IGNORED
    return [real_positions(mask) if isinstance(mask, Tensor) else None for mask in (source, target)]


def _has_decoder(model: nn.Module, task: str) -> bool:
    config = getattr(model, "config", None)
    return task == "seq2seq-lm" or (
        task == "custom" and getattr(config, "is_encoder_decoder", False) is True
    )


def frames_of(model: nn.Module, mask: Tensor | None) -> Frames | None:
    """How a model over sound shortens a mask of samples to one of frames; None if it does not."""
    if mask is None or mask.dim() != 2:
        return None
    for module in model.modules():
        lengths = getattr(module, "_get_feat_extract_output_lengths", None)
        shorten = getattr(module, "_get_feature_vector_attention_mask", None)
        if lengths is not None and shorten is not None:
            return functools.partial(_shortened, lengths, shorten, mask)
    return None


def _shortened(lengths: Any, shorten: Any, mask: Tensor, count: int) -> Tensor | None:
    """The mask of so many frames, before or behind the adapter that some models have."""
    ways: tuple[dict[str, Any], ...] = ({},)
    if "add_adapter" in inspect.signature(shorten).parameters:
        ways = ({"add_adapter": False}, {"add_adapter": None})
    for way in ways:
        if int(lengths(torch.tensor(mask.shape[1]), **way)) == count:
            found: Tensor = shorten(count, mask.long(), **way) != 0
            return found
    return None


def sides_of(
    model: nn.Module, modules: Mapping[str, nn.Module], task: str, run: Run, batch: Batch
) -> dict[Use, int]:
    """Which mask of ``masks_of`` each use of each layer goes by; nothing if there is one side only.

    Args:
        model: with or without a decoder.
        modules: layer name -> module.
        task: see masks_of.
        run: the model.
        batch: with padding.
    """
    labels = batch.get("labels")
    if not _has_decoder(model, task) and "decoder_attention_mask" not in batch:
        return {}
    given = (labels, batch.get("decoder_input_ids"), batch.get("decoder_attention_mask"))
    targets = {x.shape[1] for x in given if isinstance(x, Tensor) and x.dim() == 2}
    if len(targets) != 1 or targets == {1}:
        return {}
    shorter = {
        name: value[:, :-1].contiguous()
        if (name.startswith("decoder_") or name == "labels")
        and isinstance(value, Tensor)
        and value.dim() >= 2
        and value.shape[1] in targets
        else value
        for name, value in batch.items()
    }
    whole, cut = (_seen(modules, run, each) for each in (batch, shorter))
    return {use: int(cut[use][0] != whole[use][0]) for use in whole if use in cut}


def warn_of_unmasked(
    modules: Mapping[str, nn.Module], layout: Layout, run: Run, batch: Batch
) -> None:
    """Say on stderr which layers see padding that no mask of theirs tells."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool((mask != 0).all()):
        return
    whole = _seen(modules, run, batch)
    # Pooled layers see one position an example, which is none of padding.
    open_ = [
        use
        for use, (shape, _) in whole.items()
        if not layout.covers(shape, use) and shape.numel() > layout.examples
    ]
    if not open_:
        return
    changed = _seen(modules, run, _refilled(batch, mask))
    names = [use[0] for use in open_ if use in changed and changed[use][1] != whole[use][1]]
    if names:
        tqdm.write(
            f"warning: layer {names[0]} ({len(set(names))} in all) sees other positions than "
            "attention_mask has: padding enters its second moments; batches without padding, or of "
            "one example, avoid it",
            file=sys.stderr,
        )


def _refilled(batch: Batch, mask: Tensor) -> Batch:
    """The batch with other contents in its padding."""
    changed: dict[str, Any] = dict(batch)
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.shape[:2] != mask.shape or value is mask:
            continue
        hidden = (mask == 0).reshape(*mask.shape, *(1,) * (value.dim() - 2))
        if name.endswith("input_ids"):
            changed[name] = torch.where(hidden, (value == 0).to(value.dtype), value)
        elif value.is_floating_point() and "mask" not in name and name != "labels":
            changed[name] = torch.where(hidden, value + 1.0, value)
    return changed


@torch.no_grad()
def _seen(
    modules: Mapping[str, nn.Module], run: Run, batch: Batch
) -> dict[Use, tuple[torch.Size, float]]:
    """Positions of each use of each layer in a run, and a sum over what it was given."""
    found: dict[Use, tuple[torch.Size, float]] = {}
    uses: dict[str, int] = {}

    def hook(name: str, embedding: bool) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            uses[name] = uses.get(name, 0) + 1
            shape = x.shape if embedding else x.shape[:-1]
            found[name, uses[name]] = shape, float(x.double().abs().sum())

        return look

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            look = hook(name, isinstance(module, nn.Embedding))
            hooks.enter_context(module.register_forward_pre_hook(look, with_kwargs=True))
        run(batch)
    return found


def any_padding(masks: Collection[Tensor | None]) -> bool:
    """Whether one of the masks marks any."""
    return any(mask is not None and not bool(mask.all()) for mask in masks)


def warn_of_rows(model: nn.Module, batch: Batch) -> None:
    """Say on stderr that a batch has padding and no mask, or several documents in a row."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    pad = getattr(model.config, "pad_token_id", None)
    eos = getattr(model.config, "eos_token_id", None)
    mask = batch.get("attention_mask")
    if mask is None and pad is not None and pad != eos and bool((ids == pad).any()):
        tqdm.write(
            "warning: the batches hold padding but no attention_mask: it is learnt from",
            file=sys.stderr,
        )
    real = real_positions(mask) if isinstance(mask, Tensor) else None
    starts = document_starts(batch, ids.shape[1])
    if starts is not None and real is not None and real.shape == ids.shape:
        # Padding has positions of its own.
        starts = starts.expand_as(real)[:, 1:] & real[:, 1:] & real[:, :-1]
    if starts is not None and bool(starts.any()):
        tqdm.write(
            "warning: rows hold several documents (their positions start again): a row counts as "
            "one example, so Fisher information is that of rows; give one document a row, padded",
            file=sys.stderr,
        )
