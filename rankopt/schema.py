"""What the files of profiles and plans have in common: strict models and their numbers."""

import math
from typing import Annotated, Any

from pydantic import ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Loss = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
STRICT = ConfigDict(frozen=True, strict=True, extra="forbid")


def finite(value: Any) -> Any:
    """Plain values for JSON, which has no NaN and no infinity: None in their place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
