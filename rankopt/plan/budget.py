"""Budgets: from "keep 60 %" to an integer, with the denominator said aloud.

What is planned are the weights of the planned layers; embeddings, heads, norms and biases stay.
``keep`` is a share of the planned layers' weights, ``keep_total`` of the whole model's parameters
(so what stays must be paid for first), ``max_params`` a number of parameters for the planned
layers. Beside these, or in their place, there may be limits of other costs of the planned layers
(see limits).
"""

import math
from fractions import Fraction
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rankopt.errors import BudgetError, RankoptError
from rankopt.profile.info import ProfileInfo
from rankopt.schema import STRICT, Count, Loss

BudgetKind = Literal["keep", "keep_total", "max_params"]
LimitKind = Literal["max_bytes", "max_flops", "max_latency"]
NO_BUDGET = "a budget is needed: keep, keep_total, max_params, max_bytes, max_flops or max_latency"


class Budget(BaseModel):
    """The budget.

    Attributes:
        kind: ``keep``, ``keep_total``, ``max_params``; ``share``, a threshold without a budget; or
            of the plan's first limit, if there is no budget of parameters.
        asked: the number given.
        parameters: what it allows the planned layers; all of them, if it is of something else.
    """

    # The title is part of the published schema.
    model_config = ConfigDict(**STRICT, title="AskedBudget")

    kind: BudgetKind | LimitKind | Literal["share"]
    asked: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    parameters: Count

    def __str__(self) -> str:
        return f"{self.kind}={self.asked:.15g}"

    @property
    def of_parameters(self) -> bool:
        """Whether it is one."""
        return self.kind not in get_args(LimitKind)


class Limit(BaseModel):
    """A budget of something else than parameters; all counts are of the planned layers.

    Attributes:
        kind: ``max_bytes``, ``max_flops``, or ``max_latency``.
        asked: the number given: bytes, FLOPs for a token, microseconds.
        allowed: the same as a whole number; of nanoseconds, if it is a latency.
        spent: what the plan takes of it.
        dense: what the dense layers take.
        price: what one more of it would save, in the certificate's unit; null where the objective
            has no such price.
        table: sha256 of the rows of the table of latencies.
    """

    model_config = STRICT

    kind: LimitKind
    asked: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    allowed: Count
    spent: Count
    dense: Count
    price: Loss | None = None
    table: str | None = None

    @model_validator(mode="after")
    def _kept(self) -> "Limit":
        if self.spent > self.allowed:
            raise ValueError(f"{self.kind}: {self.spent} is spent, {self.allowed} is allowed")
        return self

    def __str__(self) -> str:
        return f"{self.kind}={self.asked:.15g}"

    @property
    def text(self) -> str:
        """Spent, allowed and dense."""
        unit = {"max_bytes": "bytes", "max_flops": "FLOPs per token"}.get(self.kind, "microseconds")
        spent, allowed, dense = (
            f"{count / 1000:,.3f}" if self.kind == "max_latency" else f"{count:,}"
            for count in (self.spent, self.allowed, self.dense)
        )
        return f"{spent} {unit}, budget {allowed} (dense {dense})"


def find_budget(
    info: ProfileInfo,
    keep: float | None = None,
    keep_total: float | None = None,
    max_params: int | None = None,
) -> Budget | None:
    """The budget that was asked for, or None.

    Raises:
        BudgetError: two were given, or a share outside (0, 1], or a number below 1.
    """
    given = [
        (kind, value)
        for kind, value in (("keep", keep), ("keep_total", keep_total), ("max_params", max_params))
        if value is not None
    ]
    if not given:
        return None
    if len(given) > 1:
        raise BudgetError(f"give one budget, not {' and '.join(kind for kind, _ in given)}")
    if max_params is not None:
        parameters = whole_number("max_params", max_params)
        return Budget(kind="max_params", asked=parameters, parameters=parameters)
    if keep is not None:
        allowed = _share("keep", keep, info.planned_parameters)
        return Budget(kind="keep", asked=keep, parameters=allowed)
    assert keep_total is not None
    fixed = info.model_parameters - info.planned_parameters
    # Nothing, if what stays is over the budget: no ranks fit, and make_plan says which do.
    allowed = max(_share("keep_total", keep_total, info.model_parameters) - fixed, 0)
    return Budget(kind="keep_total", asked=keep_total, parameters=allowed)


def whole_number(name: str, value: object, error: type[RankoptError] = BudgetError) -> int:
    """The value as an int.

    Raises:
        RankoptError: of the type ``error``; it is not a whole number above 0.
    """
    number = value if isinstance(value, int | float | np.integer) else math.nan
    if isinstance(value, bool) or not (math.isfinite(number) and number >= 1 and number % 1 == 0):
        raise error(f"{name} must be a whole number above 0, got {value!r}")
    return int(number)


def at_least(info: ProfileInfo, kind: str, parameters: int) -> str:
    """The smallest budget, of the kind, that allows the planned layers so many parameters."""
    if kind == "max_params":
        return str(parameters)
    fixed = info.model_parameters - info.planned_parameters if kind == "keep_total" else 0
    share = Fraction(parameters + fixed, info.planned_parameters + fixed)
    return f"{math.ceil(share * 10**6) / 10**6:.6f}"


def _share(kind: str, share: float, whole: int) -> int:
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not (number and math.isfinite(share) and 0 < share <= 1):
        raise BudgetError(f"{kind} is a share above 0 and at most 1, got {share!r}")
    # In fractions of decimal text, so that 0.7 of 10 is 7 and not 6.
    return math.floor(Fraction(str(share)) * whole)
