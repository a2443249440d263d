"""Load transformers models and tokenizers by folder or hub name, with errors a user can act on."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankopt.errors import ModelError, OptionError, RankoptError, few
from rankopt.model.checkpoint import what_is_wrong
from rankopt.model.offloaded import files_of_weights
from rankopt.model.weights import embedding_of

#: The transformers that first dispatches a model of which all weights are on disk.
DISK_SINCE = (5, 13)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _first_line(error: Exception) -> str:
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    if first.endswith(":") and more:
        return f"{first} {more[0].strip()}"
    # These say what was met and not what is wrong.
    terse = isinstance(error, LookupError | ArithmeticError | AssertionError)
    return f"{type(error).__name__} {first}" if terse else first


def hide_bars() -> None:
    """Hide transformers' own bars in this process ("Loading weights"); downloads keep theirs."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    silent = are_progress_bars_disabled()
    logging.disable_progress_bar()  # hides those of downloads, too
    if not silent:
        enable_progress_bars()


def builds_empty() -> bool:
    """Whether models can be loaded without their values: with an accelerate that is not too old."""
    from transformers.utils import is_accelerate_available

    return bool(is_accelerate_available())


def leaves_on_disk() -> bool:
    """Whether all weights of a model can stay in their files; old transformers lose them."""
    import transformers

    here = tuple(map(int, transformers.__version__.split(".")[:2]))
    return builds_empty() and here >= DISK_SINCE


def load_model(
    name: str,
    dtype: str = "auto",
    device_map: str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> Any:
    """The model with its head, as the checkpoint's ``architectures`` says.

    Args:
        name: a folder or a hub name.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        device_map: for models larger than a GPU, as ``from_pretrained`` takes it; ``auto`` spreads
            them over GPUs, memory and disk, ``disk`` leaves all weights in their files and reads
            each when it is needed. Needs accelerate.
        offload_folder: for weights on disk that transformers converts while it loads them; without
            one such a model is not loaded so.

    Raises:
        ModelError: not found, damaged, without a head whose loss is known, or without all of its
            weights, which transformers would draw at random.
        OptionError: an unknown dtype, or a transformers that cannot leave all on disk.
    """
    if dtype not in DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    require_model(name)
    import transformers

    from rankopt.model.tasks import task_of_architecture

    if device_map == "disk" and not leaves_on_disk():
        raise OptionError(
            "device_map disk, which leaves all weights in their files, takes accelerate 1.5 and "
            f"transformers {'.'.join(map(str, DISK_SINCE))} or later; here is transformers "
            f"{transformers.__version__}: pip install --upgrade accelerate transformers"
        )
    spread: dict[str, Any] = {}
    if device_map is not None:
        # A string is a device, or a way to spread: the disk is neither.
        spread["device_map"] = {"": "disk"} if device_map == "disk" else device_map
        spread["offload_folder"] = offload_folder
    try:
        # Without an answer in advance transformers would ask on the terminal.
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        if not config.architectures:
            raise ModelError(_without_architectures(name, config.model_type))
        architecture = _first_class(name, config.architectures)
        task_of_architecture(architecture)
        if not hasattr(transformers, architecture):
            raise ValueError(
                f"transformers {transformers.__version__} has no class {architecture}: upgrade it, "
                'or correct "architectures" in config.json'
            )
        with _without_report():
            loaded, report = getattr(transformers, architecture).from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **spread,
            )
    except (RankoptError, MemoryError):
        raise
    except Exception as error:
        # A stranger's files: anything may come out of reading them, and it is about the files.
        local = "" if Path(name).is_dir() else " (no folder of this name is here)"
        why = what_is_wrong(name) or _first_line(error)
        if "gated repo" in why:
            why += " Ask for access on its page, then log in with `hf auth login`."
        raise ModelError(f"cannot load the model {name!r}{local}: {why}") from error
    if device_map == "disk":
        # There transformers has looked at no shape.
        report["mismatched_keys"] = _of_other_shapes(loaded)
    _require_complete(name, loaded, report)
    return loaded


def _of_other_shapes(model: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Weights that are of other shapes in their files: name, shape there, shape in the model."""
    from safetensors import safe_open

    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    of_file: dict[str, list[tuple[str, str]]] = {}
    for name, place in files_of_weights(model).items():
        if "safetensors_file" in place and name in wanted:
            of_file.setdefault(place["safetensors_file"], []).append((name, place["weight_name"]))
    found = []
    for path, names in of_file.items():
        with safe_open(path, framework="numpy") as file:
            for name, stored in names:
                shape = tuple(file.get_slice(stored).get_shape())
                if shape != wanted[name]:
                    found.append((name, shape, wanted[name]))
    return found


def _first_class(name: str, architectures: Any) -> str:
    if isinstance(architectures, list) and all(isinstance(each, str) for each in architectures):
        return str(architectures[0])
    raise ModelError(
        f'{name}: "architectures" in config.json is {architectures!r}: it must be a list with the '
        'name of a class, ["..."]'
    )


#: Read in training alone, and left out of many public checkpoints.
_NOT_READ = ("masked_spec_embed",)


def _require_complete(name: str, model: Any, report: dict[str, Any]) -> None:
    """Refuse a model with weights that transformers has drawn at random."""
    parameters = {each for each, _ in model.named_parameters(remove_duplicate=False)}
    absent = sorted(
        each
        for each in parameters & set(report["missing_keys"])
        if each.rpartition(".")[2] not in _NOT_READ
    )
    other = [
        f"{each} is {' x '.join(map(str, stored))}, not {' x '.join(map(str, wanted))}"
        for each, stored, wanted in sorted(report["mismatched_keys"])
    ]
    kind = type(model).__name__
    if absent:
        raise ModelError(
            f"the model {name!r} lacks weights of {kind}, which would be drawn at random: "
            f"{few(absent, 4)}; fine-tune and save it first, or name the class that was saved "
            'under "architectures" in config.json'
        )
    if other:
        raise ModelError(
            f"the model {name!r} has weights of other sizes than its config.json says: "
            f"{few(other, 4)}; correct the config, or download the model again"
        )


@contextmanager
def _without_report() -> Iterator[None]:
    """Hide transformers' table of missing weights: they are an error of one line here.

    And that weights are on disk, which was asked for.
    """
    names = ("transformers.modeling_utils", "accelerate.big_modeling")
    loggers = [logging.getLogger(name) for name in names]

    def other(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        table = "LOAD REPORT" in text and ("MISSING" in text or "MISMATCH" in text)
        return not table and "parameters are on the meta device" not in text

    for logger in loggers:
        logger.addFilter(other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(other)


def require_model(name: str) -> None:
    """Refuse what is no model at first sight: long work, and the data, come after it.

    Args:
        name: a folder or a hub name.

    Raises:
        ModelError: a file, a folder without a model, or a path where nothing is.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (path / "adapter_config.json").is_file()
            raise ModelError(
                f"{name} holds an adapter of PEFT and not the model that it is for: load them "
                "together, merge_and_unload, save_pretrained, and give that folder"
                if adapter
                else f"{path} is not a transformers model folder: it has no config.json"
            )
    elif path.exists():
        raise ModelError(
            f"cannot load the model {name!r}: that is a file; give a model folder or a hub name"
        )
    elif _is_path(name):
        raise ModelError(f"cannot load the model {name!r}: this folder does not exist")


def _is_path(name: str) -> bool:
    """Whether it cannot be a hub name, which is NAME or OWNER/NAME."""
    beyond = name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") > 1
    return beyond or Path(name).is_absolute() or (os.sep != "/" and os.sep in name)


def _without_architectures(name: str, model_type: str) -> str:
    """What to put into the config: the model's classes with a head that transformers knows."""
    from transformers.models.auto import modeling_auto

    heads = [
        getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").get(model_type)
        for task in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION")
    ]
    named = " or ".join(f'"architectures": ["{head}"]' for head in heads if head)
    wanted = named or 'the name of its class with a head, "architectures": ["..."]'
    return (
        f'{name}: config.json has no "architectures" entry, so the head is unknown: '
        f"add {wanted} to it"
    )


def load_tokenizer(name: str) -> Any:
    """The tokenizer, with padding by the end-of-text token if it has none of its own.

    Raises:
        ModelError: not found, or without a vocabulary.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:
        # The library, and those below it, raise many unrelated types for files that are not there.
        raise ModelError(
            f"cannot load a tokenizer from {name!r}: {_first_line(error)}; save the model's "
            "tokenizer beside it (tokenizer.save_pretrained)"
        ) from error
    # Some classes make one of special tokens alone where there are no files.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ModelError(
            f"{name} has no tokenizer: save the model's tokenizer into it "
            "(tokenizer.save_pretrained)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


#: Names that configurations have for it, the usual ones first.
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "seq_length",
)


def longest_input(model: Any) -> int | None:
    """Tokens that a model takes at most; None if there is no limit.

    It is the number in the configuration, and never more than the table of positions beside the
    table of tokens has rows for: RoBERTa's and BART's begin with rows that no token has.
    """
    config = model.config.get_text_config()
    given = [getattr(config, name, None) for name in _POSITIONS]
    numbers = [number for number in given if isinstance(number, int) and number > 0][:1]
    if getattr(config, "relative_attention", False):
        # Beyond the number distances are clipped; a table of positions, if there is one, counts.
        numbers = []
    limits = [*numbers, *_rows_of_positions(model)]
    return min(limits) if limits else None


def _rows_of_positions(model: Any) -> list[int]:
    tokens = embedding_of(model)
    if tokens is None:
        return []
    weight = tokens._parameters.get("weight")
    found = []
    for parent in model.modules():
        children = dict(parent.named_children())
        if not any(
            child is tokens or (weight is not None and child._parameters.get("weight") is weight)
            for child in children.values()
        ):
            continue
        for name, child in children.items():
            table = child._parameters.get("weight")
            if ("position" in name or name == "wpe") and table is not None and table.dim() == 2:
                padding = getattr(child, "padding_idx", None)
                unused = 0 if padding is None else padding + 1
                found.append(len(table) - getattr(child, "offset", unused))
    return [rows for rows in found if rows > 0]
