"""The model card of a compressed folder: how it loads, what was planned, what was measured.

Names of layers, folders and tasks are the user's, so none is written bare: in front matter they
pass through the YAML library, in the text they are code. There is no date in it: the same model
has the same card.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCardData, metadata_load
from transformers import PreTrainedModel

from rankopt._version import __version__
from rankopt.apply.refined import refined_on, refinements_of
from rankopt.apply.remote import MODULE
from rankopt.errors import printable
from rankopt.layers import BITS
from rankopt.model.lowrank import LowRank
from rankopt.model.size import model_size
from rankopt.plan.plan import Plan

CARD = "README.md"
#: What a compressed model has of the card of its source: it is of the same data and terms.
_CARRIED = ("license", "license_name", "language", "datasets", "base_model")
_PROVEN = {
    "optimal": "proven optimal",
    "feasible": "not proven optimal",
    "time_limit": "not proven optimal, stopped at the time limit",
}


def model_card(
    model: PreTrainedModel,
    plan: Plan | None = None,
    measured: Mapping[str, float] | None = None,
    command: Sequence[str] = (),
    auto_class: str | None = None,
) -> str:
    """The text of a compressed model's ``README.md``.

    Args:
        model: low rank or rounded, and marked as such. The folder that it was loaded from is looked
            up for a card, of which licence, language and data sets are carried over.
        plan: that was applied to it.
        measured: what -> value, in the unit that its name says.
        command: that made it, with its arguments as typed.
        auto_class: that loads it by the code in its folder, if it has any.
    """
    carried = _front_matter_of(Path(model.name_or_path)) if model.name_or_path else {}
    carried |= {"base_model": base} if (base := _hub_name(model)) else {}
    refinements = refinements_of(model)
    rounds = list(getattr(model.config.quantization_config, "bits", {}).values())
    low = sum(isinstance(module, LowRank) for module in model.modules())
    tags = ["rankopt", *(["low-rank"] if low or not rounds else []), "compression"]
    tags += ["refined"] if refinements else []
    tags += [f"{bits}-bit" for bits in BITS if bits in rounds]
    data = ModelCardData(library_name="transformers", tags=tags, **carried)
    label = "They are of **closed form**: rankopt has not let them learn since."
    if refinements:
        label = f"They have learned from the dense model: **{refined_on(refinements)}**."
    factors = (
        f"{low} of its layers are low-rank factors, made by rankopt. {label} Losses of refined and "
        "of closed-form models do not belong in one column."
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_code(type(model).__name__)} of {'lower rank' if low or not rounds else 'fewer bits'}",
        *([factors] if low or not rounds else []),
        *([_rounded(rounds)] if rounds else []),
        "## Load",
        _block(_loading(type(model)), "python"),
        *(_without_rankopt(auto_class) if auto_class else ()),
        "`model.dequantize()` multiplies the factors, for what knows dense models only.",
        "## What was planned",
        "\n".join(_planned(model, plan)),
        "## What was measured",
        "\n".join(f"- {_code(what)}: {value:.6g}" for what, value in (measured or {}).items())
        or "Nothing yet: `rankopt evaluate FOLDER --data heldout.txt` does.",
        *(("## Command", _block(shlex.join(command), "bash")) if command else ()),
        "## Versions",
        f"rankopt {__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}",
    ]
    if "license" in carried:
        parts += ["## Licence", f"As the card of its source says: {_code(str(carried['license']))}"]
    return "\n\n".join(parts) + "\n"


def _rounded(bits: Sequence[int]) -> str:
    counts = [(bits.count(each), each) for each in BITS if each in bits]
    told = " and ".join(f"{count} of its layers to {each} bits" for count, each in counts)
    return (
        f"Rounded are the weights of {told}, to the nearest, by torchao. So it needs torchao to be "
        "loaded: `pip install 'rankopt[quantize]'`. Rounded weights do not learn."
    )


def _loading(kind: type[PreTrainedModel]) -> str:
    module = "transformers" if hasattr(transformers, kind.__name__) else kind.__module__
    return (
        "import rankopt  # without it transformers stops with an error about sizes\n"
        f"from {module} import {kind.__name__}\n\n"
        f'model = {kind.__name__}.from_pretrained("FOLDER")'
    )


def _without_rankopt(auto_class: str) -> Iterator[str]:
    yield (
        f"Without rankopt transformers loads it by the code in this folder, `{MODULE}.py`, which "
        "needs torch and transformers only. Read it before you trust it, and name the revision "
        "that you have read (`revision=`) if the folder is on the hub:"
    )
    yield _block(
        f"from transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("FOLDER", trust_remote_code=True)',
        "python",
    )


def _planned(model: PreTrainedModel, plan: Plan | None) -> Iterator[str]:
    if plan is None:
        config: Any = model.config.quantization_config
        yield f"- Parameters: {model_size(model).model:,}"
        yield f"- Backend {_code(config.backend)}, form {_code(config.form)}"
        return
    size, proof = plan.size, plan.certificate
    held = []
    if plan.min_retained is not None:
        held.append(f"retain {plan.min_retained:.2%} of every layer's Fisher information")
    if plan.pinned:
        held.append(f"keep the {len(plan.pinned)} pinned layers as they are")
    floor = f" that {' and '.join(held)}" if held else ""
    allowed = f", budget {plan.budget.parameters:,}" if plan.budget.of_parameters else ""
    yield (
        f"- Parameters: {size.model:,} of {size.model_dense:,} "
        f"({size.model / size.model_dense:.2%}); in the planned layers {size.planned:,} of "
        f"{size.planned_dense:,} ({size.planned / size.planned_dense:.2%}){allowed}"
    )
    for limit in plan.limits:
        yield f"- In the planned layers: {limit.text}"
    yield (
        f"- Backend {_code(plan.backend)}, form {_code(plan.form)}, solver {_code(plan.solver)}, "
        f"objective {_code(plan.objective)}"
    )
    yield (
        f"- Certificate: {_PROVEN[proof.status]} ({_code(proof.status)}). The ranks lose "
        f"{proof.loss:.6g}, no ranks within the budget{floor} lose less than {proof.bound:.6g} "
        f"(gap {proof.gap:.2g}), in {_code(proof.unit)}"
    )
    if plan.predicted is not None:
        yield (
            f"- Predicted: the loss rises by {plan.predicted:.4g} nats per target (second-order "
            "estimate, of the closed form)"
        )


def _hub_name(model: PreTrainedModel) -> str | None:
    """The hub's name of what the model was loaded from."""
    name = str(model.name_or_path)
    # A relative path looks like such a name, but only what comes from the hub has a commit; so do
    # folders of the hub's cache.
    ours = getattr(model.config, "_commit_hash", None) is None or Path(name).exists()
    return None if ours or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else name


def _front_matter_of(folder: Path) -> dict[str, Any]:
    """What is carried over of a folder's card; nothing of a card that cannot be read."""
    try:
        found = metadata_load(folder / CARD) if (folder / CARD).is_file() else None
    except Exception:
        # Somebody else's file, and YAML fails in many ways.
        return {}
    values = ((key, (found or {}).get(key)) for key in _CARRIED)
    return {key: value for key, value in values if value and _plain(value)}


def _plain(value: object) -> bool:
    each = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text.isprintable() for text in each)


def _code(text: str) -> str:
    """A code span, whatever the text is: fenced by more backticks than it has in a row."""
    text = printable(text) or " "
    fence = "`" * (_longest_run(text) + 1)
    space = " " if "`" in text or text != text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def _block(text: str, language: str) -> str:
    fence = "`" * max(_longest_run(text) + 1, 3)
    return f"{fence}{language}\n{printable(text, chr(10))}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
