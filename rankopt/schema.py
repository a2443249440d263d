"""What the files of profiles and plans have in common: strict models and their numbers."""

from typing import Annotated

from pydantic import ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Loss = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
STRICT = ConfigDict(frozen=True, strict=True, extra="forbid")
