"""What keeps a checkpoint from being loaded: the file, and what to do about it."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

#: Frameworks' own formats of weights, which transformers would have to unpickle or convert.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")
_POINTER = b"version https://git-lfs"


def what_is_wrong(name: str) -> str | None:
    """The first file of a model that cannot be used, and why; None if all are as they should be.

    Args:
        name: a folder, or a hub name whose files have been downloaded.
    """
    folder = _folder_of(name)
    if folder is None:
        return None
    config = _read_object(folder / "config.json")
    return config if isinstance(config, str) else _wrong_weights(folder) or _own_code(config)


def _folder_of(name: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _read_object(path: Path) -> dict[str, Any] | str:
    """The JSON object in a file, or what is wrong with it."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        kind = "a pointer of git-lfs" if _is_pointer(path) else "damaged: it is no JSON"
        return f"{path} is {kind}; download it again"
    if not isinstance(read, dict):
        return f"{path} holds no JSON object but {type(read).__name__}; download it again"
    return read


def _wrong_weights(folder: Path) -> str | None:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return _wrong_file(whole)
    if not index.exists():
        others = sorted(path.name for kind in _OTHER_WEIGHTS for path in folder.glob(kind))
        if not others:
            return f"{folder} has no weights (model.safetensors); download them"
        return (
            f"{folder} has its weights in {others[0]} only, which is not read because such files "
            "can run code: convert it, with transformers' from_pretrained and save_pretrained in "
            "a place that you trust, to model.safetensors"
        )
    read = _read_object(index)
    if isinstance(read, str):
        return read
    shards = read.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        return f"{index} is damaged: its weight_map names no files; download it again"
    for shard in sorted(set(shards.values())):
        if not (folder / shard).exists():
            return f"{folder / shard}, which {index.name} names, is missing; download it again"
        wrong = _wrong_file(folder / shard)
        if wrong is not None:
            return wrong
    return None


def _wrong_file(path: Path) -> str | None:
    if _is_pointer(path):
        return f"{path} is a pointer of git-lfs and not the weights; run git lfs pull there"
    try:
        with safe_open(path, framework="numpy"):
            return None
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        return f"{path} ({size} bytes) is damaged or cut short ({error}); download it again"


def _is_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _own_code(config: dict[str, Any]) -> str | None:
    """Why it does not load, if its classes are not those of transformers."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = config.get("model_type") in CONFIG_MAPPING_NAMES
    classes = config.get("architectures") or []
    if not config.get("auto_map") or (known and all(hasattr(transformers, x) for x in classes)):
        return None
    return (
        "its classes are code of its own (auto_map in config.json), which is not run: load it in "
        "Python with trust_remote_code=True, if you trust it, and go on with "
        "rankopt.profile_model and rankopt.apply_plan"
    )
