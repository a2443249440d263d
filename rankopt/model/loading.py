"""Load transformers models and tokenizers by folder or hub name, with errors a user can act on."""

from pathlib import Path
from typing import Any

from rankopt.errors import ModelError
from rankopt.model.tasks import task_of_architecture

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def hide_bars() -> None:
    """Hide transformers' own bars in this process ("Loading weights"); downloads keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    silent = are_progress_bars_disabled()
    logging.disable_progress_bar()  # hides those of downloads, too
    if not silent:
        enable_progress_bars()


def load_model(name: str, dtype: str = "auto", device_map: str | None = None) -> Any:
    """The model with its head, as the checkpoint's ``architectures`` says.

    Args:
        name: a folder or a hub name.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        device_map: for models larger than a GPU, as ``from_pretrained`` takes it; ``auto`` spreads
            them over GPUs, memory and disk. Needs accelerate.

    Raises:
        ModelError: not found, or without a head whose loss is known.
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    import transformers

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"{name} is not a transformers model folder: it has no config.json")
    spread = {} if device_map is None else {"device_map": device_map}
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = (config.architectures or [type(config).__name__])[0]
        task_of_architecture(architecture)
        loaded = getattr(transformers, architecture).from_pretrained(name, dtype=dtype, **spread)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise ModelError(f"cannot load the model {name!r}: {_first_line(error)}") from error
    return loaded


def load_tokenizer(name: str) -> Any:
    """The tokenizer, with padding by the end-of-text token if it has none of its own.

    Raises:
        ModelError: not found.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a tokenizer from {name!r}: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def longest_input(model: Any) -> int | None:
    """Positions that a model has, if it has a fixed number of them."""
    for name in ("max_position_embeddings", "n_positions"):
        positions = getattr(model.config, name, None)
        if isinstance(positions, int) and positions > 0:
            return positions
    return None
