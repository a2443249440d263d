"""The code that a low-rank model needs, in its folder: it loads where rankopt is not installed.

transformers runs code of a folder if it is asked to (``trust_remote_code=True``): ``auto_map`` in
the config names a class of a module of the folder for each auto class. That module is a copy of
``standalone``, with an empty subclass of the model's class, of its base, and of its config's: tools
that read the config first, and what it says of quantisation, have then run the module. Subclasses
have the names of their bases, which files and configs go by. Where rankopt is imported, its own
quantizer does the work, with or without the folder's code.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Of the file and of the module.
MODULE = "modeling_rankopt"

_CLASS = '''

class {name}(transformers.{name}):
    """Of a model with low-rank layers, which its config names."""
'''


def taken_out(config: Any) -> bool:
    """Take our code out of a config: files that are written from now on need not have it beside.

    Returns:
        Whether there was any.
    """
    named = getattr(config, "auto_map", None) or {}
    ours = [auto for auto, name in named.items() if _is_ours(name)]
    for auto in ours:
        del named[auto]
    if ours and not named:
        del config.auto_map
    return bool(ours)


def _is_ours(name: Any) -> bool:
    return isinstance(name, str) and name.split("--")[-1].startswith(f"{MODULE}.")


def write_code(model: "PreTrainedModel", folder: Path) -> str:
    """Put the module into a folder that has the model, and name it in the config.

    Returns:
        The auto class of the model's task.

    Raises:
        ModelError: the model is of other code than transformers', or no auto class loads it.
    """
    import transformers

    name = type(model).__name__
    dense = getattr(transformers, name, None)
    if dense is None or not isinstance(model, dense):
        raise ModelError(
            f"{name} is no class of transformers, so that its own code would be needed beside that "
            "of the low-rank layers: save it without remote code, and import rankopt to load it"
        )
    # That of a model which was loaded by such code is a subclass.
    known = next(x for x in type(model.config).__mro__ if x.__module__.startswith("transformers."))
    classes = _auto_classes(known, dense)
    if not classes:
        raise ModelError(
            f"no auto class of transformers loads {name}, and only those run code of a folder: "
            "save it without remote code, and import rankopt to load it"
        )
    from rankopt.apply import standalone

    text = inspect.getsource(standalone)
    found = {"AutoConfig": known.__name__, **classes}
    text += "".join(_CLASS.format(name=each) for each in sorted(set(found.values())))
    (folder / f"{MODULE}.py").write_text(text, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {auto: f"{MODULE}.{each}" for auto, each in found.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # Of a task rather than of all (pre-training), and the model rather than its base.
    return max(classes, key=lambda auto: (classes[auto] == name, "PreTraining" not in auto))


def _auto_classes(config: type, dense: type) -> dict[str, str]:
    """Auto class -> class that it is to load: the model's own, and its base for AutoModel."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for auto, each in vars(modeling_auto).items():
        mapping = getattr(each, "_model_mapping", None)
        if not auto.startswith("AutoModel") or mapping is None or config not in mapping:
            continue
        kinds = mapping[config]
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            if kind is dense or (auto == "AutoModel" and issubclass(dense, _family_of(kind))):
                found[auto] = kind.__name__
    return found


def _family_of(kind: type) -> type:
    """The class that all models of an architecture have in common."""
    from transformers import PreTrainedModel

    return [each for each in kind.__mro__ if issubclass(each, PreTrainedModel)][-2]


@contextmanager
def alone() -> Iterator[None]:
    """Inside the ``with`` transformers loads by the folder's code, as if rankopt were not there."""
    from transformers.quantizers import auto

    from rankopt.apply import standalone

    tables = {
        "AUTO_QUANTIZATION_CONFIG_MAPPING": standalone.Config,
        "AUTO_QUANTIZER_MAPPING": standalone.Quantizer,
    }
    ours = {name: getattr(auto, name)[standalone.METHOD] for name in tables}
    try:
        for name, other in tables.items():
            getattr(auto, name)[standalone.METHOD] = other
        yield
    finally:
        for name, own in ours.items():
            getattr(auto, name)[standalone.METHOD] = own
