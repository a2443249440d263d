"""What a model says of its refinements: what its factors have learnt since they were made.

A loss that was measured after a refinement stands beside no loss of a closed form, so the label
goes with the model, in its config and through every folder that it is written to.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError
from torch import nn

from rankopt.schema import STRICT, Count, first_of

Method = Literal["distill", "blocks"]
Unit = Literal["tokens", "examples"]


class Refinement(BaseModel):
    """One refinement, as ``config.json`` has it.

    Attributes:
        method: ``distill`` or ``blocks``.
        targets: loss terms that the kept state was trained on, each counted once.
        unit: what the targets are: ``tokens`` or ``examples``.
        examples: that they are of.
        passes: over the data, as asked for.
        learning_rate: the largest.
        seed: of the order.
        data: digest of the batches, as a profile of them has it.
    """

    model_config = STRICT

    method: Method
    targets: Count
    unit: Unit
    examples: Count
    passes: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    seed: int
    data: str


def read(entries: Iterable[Any]) -> tuple[Refinement, ...]:
    """Entries of a config.

    Raises:
        ValueError: one is none; in one line.
    """
    try:
        return tuple(Refinement.model_validate(each) for each in entries)
    except ValidationError as error:
        raise ValueError(f'an entry of "refined" is none: {first_of(error)}') from error


def refinements_of(model: nn.Module) -> tuple[Refinement, ...]:
    """All of a model, the first one first; none of a dense model, or of closed form."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    return read(getattr(config, "refined", ()))


def refined_on(refinements: Sequence[Refinement]) -> str:
    """``refined on 16,320 tokens (distill)``; targets of the same data count once."""
    targets: dict[str, int] = {}
    for each in refinements:
        targets[each.data] = max(each.targets, targets.get(each.data, 0))
    methods = ", then ".join(each.method for each in refinements)
    return f"refined on {sum(targets.values()):,} {refinements[0].unit} ({methods})"
