"""What ``--json`` prints, as types: ``rankopt schema`` is made of them.

From one minor version to the next fields are added; none is renamed, taken away or given another
meaning. What depends on the task (metrics, losses of other data) stands beside the named fields.
"""

import dataclasses
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, create_model

from rankopt.apply.refined import Refinement
from rankopt.evaluation.evaluation import Evaluation
from rankopt.plan.lora import LoraPlan
from rankopt.plan.plan import Plan
from rankopt.profile.info import ProfileInfo
from rankopt.refinement.refinement import Refined
from rankopt.results.paired import Difference
from rankopt.results.results import MeasuredPlan
from rankopt.schema import NAMES

CLOSED = ConfigDict(extra="forbid", protected_namespaces=NAMES)
#: What has no fixed name is a number, or null where it is not defined.
OPEN = ConfigDict(extra="allow", protected_namespaces=NAMES)


class Open(BaseModel):
    """Other names than those of its fields are figures."""

    model_config = OPEN
    __pydantic_extra__: dict[str, float | None] = Field(init=False)


class Figures(Open):
    """Of a model on data: its loss, ``perplexity``, ``accuracy``, ``loss of NAME`` and so on."""

    loss: float | None


class _Row(Open):
    parameters: int
    kept: float
    model_parameters: int
    model_bytes: int
    loss: float | None = None


class _Evaluated(Open):
    refined: list[Refinement] | None = None


def _fields_of(kind: Any, without: set[str]) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = kind.model_fields.items()
        return {name: (each.annotation, ...) for name, each in fields if name not in without}
    hints = get_type_hints(kind)
    return {
        each.name: (hints[each.name] | None if hints[each.name] is float else hints[each.name], ...)
        for each in dataclasses.fields(kind)
        if each.name not in without
    }


#: A plan of a comparison, but its ranks, and what its model measured.
Row = create_model("Row", __base__=_Row, **_fields_of(MeasuredPlan, {"ranks", "size", "measured"}))
#: A model on data, and on other data: ``loss of NAME``, ``targets of NAME``, metrics likewise.
Evaluated = create_model("Evaluated", __base__=_Evaluated, **_fields_of(Evaluation, {"also"}))


class LineOutput(Open):
    """A strategy at a budget, over all calibrations; see rankopt.results.Line."""

    strategy: str
    keep: float
    calibrations: int
    kept: float
    predicted: float | None
    loss: float | None
    half_width: float | None
    stability: float | None
    against: Difference | None


class Compared(BaseModel):
    """``rankopt compare``: lines and dense where models were measured."""

    model_config = CLOSED

    rows: list[Row]  # type: ignore[valid-type]
    lines: list[LineOutput] | None = None
    dense: Figures | None = None


class Demonstrated(BaseModel):
    """``rankopt demo``."""

    model_config = CLOSED

    settings: dict[str, str | int]
    dense: Figures
    rows: list[Row]  # type: ignore[valid-type]
    refined: Refined
    reloaded: Evaluated  # type: ignore[valid-type]
    prompt: str
    before: str
    after: str


class Extra(BaseModel):
    """What an extra asks for, and what of that is missing or too old."""

    model_config = CLOSED

    packages: list[str]
    lacks: list[str]


class Torch(BaseModel):
    """What torch can compute with; ``reloads`` is whether transformers knows rankopt's models."""

    model_config = CLOSED

    devices: dict[str, str]
    threads: int
    cores: int | None
    reloads: bool | None = None


class Examined(BaseModel):
    """``rankopt doctor``."""

    model_config = CLOSED

    python: str
    executable: str
    platform: str
    packages: dict[str, str | None]
    extras: dict[str, Extra]
    torch: Torch | None
    plug_ins: dict[str, dict[str, str]] = Field(alias="plug-ins")
    problems: list[str]


Name = Literal["profile", "plan", "import", "compare", "refine", "evaluate", "demo", "doctor"]
OUTPUTS: dict[Name, Any] = {
    "profile": ProfileInfo,
    "plan": Plan | LoraPlan,
    "import": Plan,
    "compare": Compared,
    "refine": Refined,
    "evaluate": Evaluated,
    "demo": Demonstrated,
    "doctor": Examined,
}


def schema_of(command: Name) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what a command prints with ``--json``."""
    found = TypeAdapter(OUTPUTS[command]).json_schema(by_alias=True)
    about = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"rankopt {command} --json",
    }
    return about | {key: value for key, value in found.items() if key != "title"}
