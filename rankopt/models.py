"""Load transformers models and tokenizers by folder or hub name, with errors a user can act on."""

import json
from pathlib import Path
from typing import Any

from rankopt.errors import ModelError
from rankopt.tasks import task_of_architecture


def load_model(name: str, dtype: str = "auto") -> Any:
    """The model with its head, as the checkpoint's ``architectures`` says.

    Args:
        name: a folder or a hub name.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ModelError: not found, or without a head whose loss is known.
    """
    import transformers

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"{name} is not a transformers model folder: it has no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = (config.architectures or [type(config).__name__])[0]
        task_of_architecture(architecture)
        loaded = getattr(transformers, architecture).from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot load the model {name!r}: {first}") from error
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
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot load a tokenizer from {name!r}: {first}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
