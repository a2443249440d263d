"""What the files of profiles and plans have in common: strict models, their numbers, their JSON."""

import json
import math
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from rankopt.errors import RankoptError

M = TypeVar("M", bound=BaseModel)
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Loss = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
#: Fields begin with "model_", which is nothing of pydantic here; before 2.10 it warns of them.
NAMES: tuple[str, ...] = ()
STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=NAMES)


class Grown(BaseModel):
    """A model that has got fields since its first files: where they say nothing, they are left out.

    So what says nothing new is written, to the byte, as it was before them.
    """

    #: Names of these fields; each has a default.
    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                content.pop(name, None)
        return content


#: No count of parameters or bytes has more digits.
_MOST_DIGITS = 19


def parse(text: str) -> Any:
    """The value of a file's JSON.

    Raises:
        ValueError: no JSON, or JSON that is nested too deeply, repeats a key, or has a number that
            is NaN, infinite or too long; in one line.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_no_repeats,
            parse_constant=_no_constants,
            parse_int=_short,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_versioned(
    model: type[M],
    text: str,
    source: str,
    kind: str,
    name: str,
    version: int,
    refused: type[RankoptError],
) -> M:
    """A file's content, which says its ``format`` and ``format_version``.

    Args:
        model: of the content.
        text: JSON.
        source: named in errors.
        kind: what it is to be: "a plan".
        name: of the format.
        version: that is read.
        refused: type of the errors.

    Raises:
        RankoptError: of type ``refused``: no JSON, another format or version, or inconsistent.
    """
    try:
        content = parse(text)
    except ValueError as error:
        raise refused(f"{source}: not {kind}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != name:
        other = content.get("format") if isinstance(content, dict) else None
        what = f", but {other:.40}" if isinstance(other, str) else ""
        raise refused(f'{source}: not {kind}: it has no "format": "{name}"{what}')
    given = content.get("format_version")
    if type(given) is not int or given != version:  # True == 1
        raise refused(
            f"{source}: {kind.split()[-1]} format {given!r}; this rankopt reads {version}"
        )
    try:
        # From text, so that JSON's lists are accepted for tuples but no type is coerced.
        return model.model_validate_json(text)
    except ValidationError as error:
        raise refused(f"{source}: {first_of(error)}") from error


def first_of(error: ValidationError) -> str:
    """The first mistake that pydantic found, its place, and how many there are; in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}{more}" if where else f"{first['msg']}{more}"


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is repeated")
    return found


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _short(digits: str) -> int:
    if len(digits.lstrip("-")) > _MOST_DIGITS:
        raise ValueError(f"the number {digits:.{_MOST_DIGITS}}... has {len(digits)} digits")
    return int(digits)


def finite(value: Any) -> Any:
    """Plain values for JSON, which has no NaN and no infinity: None in their place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
