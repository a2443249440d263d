"""The plan: the rank of every layer, with its certificate, as versioned JSON.

The schema is published as ``plan.schema.json`` beside this file. Reading is strict: unknown or
repeated keys, wrong types, NaN, ranks that save nothing and sums that do not add up are errors.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from rankopt.errors import PlanError, printable
from rankopt.files import PLAN, is_format, whole_file
from rankopt.layers import AS_IS, BITS, DENSE, GROUP, Bits, Form, Layer
from rankopt.plan.budget import Budget, Limit, LimitKind
from rankopt.schema import STRICT, Count, Grown, Loss, Number, Share, read_versioned

FORMAT_VERSION = 1
_TITLES = {"max_bytes": "bytes", "max_flops": "FLOPs", "max_latency": "latency"}
#: A thousand units of each limit.
_PRICED = {"max_bytes": "1,000 bytes", "max_flops": "1,000 FLOPs", "max_latency": "1 microsecond"}
#: No honest plan is larger; a larger file is not read.
LARGEST_FILE = 64 * 2**20


def text_of(path: str | os.PathLike[str], missing: str) -> str:
    """The text of a plan's file.

    Args:
        path: of the file.
        missing: what is said where there is none, with ``{}`` for the path.

    Raises:
        PlanError: missing, too large, or no text.
    """
    source = Path(path)
    if not source.is_file():
        raise PlanError(missing.format(source))
    if source.stat().st_size > LARGEST_FILE:
        raise PlanError(f"{source} is larger than {LARGEST_FILE >> 20} MiB: not a plan")
    try:
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{source} is not text: {error}") from error


class PlannedLayer(Grown):
    """What happens to one layer.

    Attributes:
        layer: the matrix, and the modules that share it.
        rank: its rank in all of them, or null to leave it dense.
        parameters: what that costs: one dense matrix, or low-rank ones for every module.
        retained: share of the layer's own Fisher information that is retained.
        margin: how sure the rank is: what the layer's next-best rank would lose more, at the
            certificate's price of a parameter and in its unit. Near 0, or below it, another rank
            does as well. Null where there is no other rank or no price.
        nanoseconds: what it takes by the table of latencies, if there is one.
        bits: what its weights are rounded to, or null to leave them in their dtype.
    """

    model_config = STRICT
    later: ClassVar[tuple[str, ...]] = ("nanoseconds", "bits")

    layer: Layer
    rank: Annotated[int, Field(ge=1)] | None
    parameters: Count
    retained: Share
    margin: Number | None = None
    nanoseconds: Count | None = None
    bits: Bits | None = None

    def bytes_in(self, form: Form) -> int:
        """Of its weights, and of the scales of those that are rounded."""
        rank = np.array(DENSE if self.rank is None else self.rank)
        return int(self.layer.bytes_of(rank, form, AS_IS if self.bits is None else self.bits))

    def spent(self, kind: LimitKind, form: Form) -> int:
        """What it takes of a limit."""
        if kind == "max_bytes":
            return self.bytes_in(form)
        if kind == "max_flops":
            return int(self.layer.flops(np.array(DENSE if self.rank is None else self.rank), form))
        return self.nanoseconds or 0

    def require_counted(self, form: Form, place: str) -> None:
        """Check rank, parameters and bits against the layer; ``place`` is named in errors.

        Raises:
            ValueError: the rank saves nothing in the form, has other parameters, or cannot be
                rounded so.
        """
        layer, rank = self.layer, self.rank
        if rank is not None and rank > layer.largest_rank(form):
            raise ValueError(
                f"{place}: layer {layer.name}: rank {rank} saves nothing; the largest that does in "
                f"the form {form} is {layer.largest_rank(form)} (null keeps it dense)"
            )
        if self.parameters != layer.cost(rank, form):
            raise ValueError(
                f"{place}: layer {layer.name}: rank {rank} has {layer.cost(rank, form)} "
                f"parameters in the form {form}, not {self.parameters}"
            )
        if self.bits is not None and not layer.can_round(rank, self.bits):
            raise ValueError(
                f"{place}: layer {layer.name}: rank {rank} cannot be rounded to {self.bits} bits: "
                f"those of 4 bits are multiples of {GROUP}, as the layer's inputs are, and layers "
                "that share their matrix are not rounded"
            )


class Certificate(BaseModel):
    """How good the plan provably is.

    Attributes:
        loss: of the plan, in ``unit``.
        bound: no plan within the budget (that keeps ``min_retained``, and what is pinned) has a
            smaller loss.
        gap: (loss - bound) / loss; 0 is proven optimal.
        status: ``optimal``, ``feasible`` or ``time_limit``.
        unit: of loss and bound.
        multiplier: what one more parameter in the budget would save, in that unit; null where
            the objective has no such price, or the budget is of something else.
    """

    model_config = STRICT

    loss: Loss
    bound: Loss
    gap: Share
    status: Literal["optimal", "feasible", "time_limit"]
    unit: str
    multiplier: Loss | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Certificate":
        if self.bound > self.loss:
            raise ValueError(f"the bound {self.bound} is above the loss {self.loss}")
        return self


class Size(BaseModel):
    """Parameters and bytes before and after, with both denominators.

    Attributes:
        planned_dense: parameters of the planned layers, all dense.
        planned: the same under the plan.
        model_dense: parameters of the whole model, tied ones once.
        model: the same under the plan.
        model_bytes_dense: bytes of the whole model.
        model_bytes: the same under the plan.
    """

    model_config = STRICT

    planned_dense: Count
    planned: Count
    model_dense: Count
    model: Count
    model_bytes_dense: Count
    model_bytes: Count

    def require_sums(self, layers: Sequence[PlannedLayer], form: Form) -> None:
        """Check all but ``planned`` against the layers, which are kept in a form.

        Raises:
            ValueError: a sum that does not add up.
        """
        dense = sum(entry.layer.dense_cost for entry in layers)
        saved = sum(x.layer.dense_cost * x.layer.itemsize - x.bytes_in(form) for x in layers)
        for what, given, wanted in (
            ("planned_dense", self.planned_dense, dense),
            ("model", self.model, self.model_dense - dense + self.planned),
            ("model_bytes", self.model_bytes, self.model_bytes_dense - saved),
        ):
            if given != wanted:
                raise ValueError(f"size.{what} is {given}; by its layers it is {wanted}")


class Plan(Grown):
    """The rank of every planned layer, and the proof.

    Attributes:
        format: always ``rankopt-plan``.
        format_version: of the file.
        rankopt: version that made it.
        backend: how the layers will be factorised.
        scale: how the layers were compared; the backend's name for it.
        solver: who chose.
        objective: what was maximised.
        rank_multiple: ranks are multiples of it.
        form: how matrices of lower rank are kept: ``pairs`` of factors, or ``pivoted``.
        min_retained: share that every layer retains at least, if that was asked for; of those that
            are not pinned.
        pinned: names of the layers whose rank was given, not chosen.
        budget: what was asked.
        limits: budgets of something else than parameters, and what is spent of them.
        certificate: how good the choice provably is.
        retained_total: share of the Fisher information of all layers together.
        retained_worst: the smallest retained share of a layer.
        worst_layer: that layer.
        predicted: what the loss of a target (a predicted token, or a label) rises by, in nats, to
            second order; null where the backend has no such estimate.
        size: parameters and bytes.
        architecture: class of the model.
        fingerprint: of the model.
        profile_digest: of the profile.
        layers: the ranks.
    """

    model_config = STRICT
    later: ClassVar[tuple[str, ...]] = ("form", "predicted", "pinned", "limits")

    format: Literal["rankopt-plan"] = "rankopt-plan"
    format_version: Literal[1] = 1
    rankopt: str
    backend: str
    scale: str
    solver: str
    objective: Literal["total", "layerwise", "maxmin"]
    rank_multiple: Annotated[int, Field(ge=1)]
    form: Form = "pairs"
    min_retained: Share | None = None
    pinned: tuple[str, ...] = ()
    budget: Budget
    limits: tuple[Limit, ...] = ()
    certificate: Certificate
    retained_total: Share
    retained_worst: Share
    worst_layer: str
    predicted: Loss | None = None
    size: Size
    architecture: str
    fingerprint: str
    profile_digest: str
    layers: Annotated[tuple[PlannedLayer, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        names = [member for entry in self.layers for member in entry.layer.members]
        if len(set(names)) != len(names):
            raise ValueError("a layer is planned twice")
        if self.worst_layer not in names:
            raise ValueError(f"the worst layer {self.worst_layer!r} is not planned")
        free = {entry.layer.name for entry in self.layers}.difference(self.pinned)
        if len(free) + len(self.pinned) != len(self.layers):
            raise ValueError("pinned names something else than layers, or one of them twice")
        for number, entry in enumerate(self.layers):
            entry.require_counted(self.form, f"layers.{number}")
        spent = sum(entry.parameters for entry in self.layers)
        if spent != self.size.planned:
            raise ValueError(f"the layers have {spent} parameters, not {self.size.planned}")
        self.size.require_sums(self.layers, self.form)
        if spent > self.budget.parameters:
            raise ValueError(f"the layers have {spent} parameters, over the budget")
        self._require_limits()
        for entry in self.layers:
            if entry.rank is not None and entry.rank % self.rank_multiple:
                raise ValueError(f"layer {entry.layer.name}: rank is not a multiple as claimed")
            floor = None if entry.layer.name not in free else self.min_retained
            if floor is not None and entry.retained < floor - 1e-9:
                raise ValueError(f"layer {entry.layer.name}: retains less than min_retained")
        return self

    def _require_limits(self) -> None:
        kinds = [limit.kind for limit in self.limits]
        if len(set(kinds)) != len(kinds):
            raise ValueError("a limit is stated twice")
        if not self.budget.of_parameters and self.budget.kind not in kinds:
            raise ValueError(f"the budget is one of {self.budget.kind}, which no limit states")
        if {entry.nanoseconds is not None for entry in self.layers} != {"max_latency" in kinds}:
            raise ValueError("every layer has nanoseconds under max_latency, and none without")
        for limit in self.limits:
            spent = sum(entry.spent(limit.kind, self.form) for entry in self.layers)
            if spent != limit.spent:
                raise ValueError(f"by its layers {limit.kind} is {spent}, not {limit.spent}")

    @property
    def asked(self) -> str:
        """All budgets, as they were given."""
        of_limits = [str(limit) for limit in self.limits]
        return ", ".join(dict.fromkeys([str(self.budget), *of_limits]))

    @property
    def ranks(self) -> dict[str, int | None]:
        """Layer name -> rank, None for dense."""
        return {entry.layer.name: entry.rank for entry in self.layers}

    @property
    def bits(self) -> dict[str, Bits]:
        """Layer name -> what its weights are rounded to, of those that are."""
        return {entry.layer.name: entry.bits for entry in self.layers if entry.bits is not None}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; a reader never sees half of it.

        Raises:
            RankoptError: something is there that is no plan, or the system refuses.
        """
        with whole_file(path, is_format(PLAN)) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read and check a plan.

        Raises:
            PlanError: missing, not JSON, of another version, or inconsistent.
        """
        text = text_of(path, "no plan at {}: make one with `rankopt plan`")
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> "Plan":
        """Parse a plan's JSON; ``source`` is named in errors."""
        return read_versioned(cls, text, source, "a plan", PLAN, FORMAT_VERSION, PlanError)

    def __str__(self) -> str:
        size, proof = self.size, self.certificate
        dense = sum(entry.rank is None for entry in self.layers)
        price = []
        if proof.multiplier is not None:
            sure = [e for e in self.layers if e.margin is not None]
            least = min(sure, key=lambda e: e.margin or 0.0, default=None)
            doubt = f"; least sure: {least.layer.name} ({least.margin:.2g})" if least else ""
            price = [
                f"  price           1,000 more parameters would save {1000 * proof.multiplier:.3g}"
                f"{doubt}"
            ]
        for limit in self.limits:
            if limit.price is not None:
                per = _PRICED[limit.kind]
                price.append(f"  price           {per} more would save {1000 * limit.price:.3g}")
        allowed = f"; budget {self.budget.parameters:,}" if self.budget.of_parameters else ""
        predicted = []
        if self.predicted is not None:
            predicted = [
                f"  predicted       +{self.predicted:.4g} nats per target (second-order estimate)"
            ]
        lines = [
            f"{self.solver} plan, objective {self.objective}, backend {self.backend}, "
            f"form {self.form}",
            f"  planned layers  {size.planned:,} of {size.planned_dense:,} parameters "
            f"({size.planned / size.planned_dense:.4%}{allowed})",
            *(f"  {_TITLES[limit.kind]:<16}{limit.text}" for limit in self.limits),
            f"  whole model     {size.model:,} of {size.model_dense:,} parameters "
            f"({size.model / size.model_dense:.2%}), "
            f"{size.model_bytes / 2**20:,.1f} of {size.model_bytes_dense / 2**20:,.1f} MiB",
            f"  retained Fisher {self.retained_total:.4%} in total, "
            f"{self.retained_worst:.2%} in the worst layer ({self.worst_layer})",
            f"  loss            {proof.loss:.6g} {proof.unit}, at least {proof.bound:.6g} "
            f"(gap {proof.gap:.2g}, {proof.status})",
            *predicted,
            *price,
            f"  layers          {len(self.layers)}: {dense} dense, "
            f"{len(self.layers) - dense} low rank"
            + (f"; {len(self.pinned)} of them pinned" if self.pinned else "")
            + "".join(
                f"; {count} in {bits} bits"
                for bits in BITS
                if (count := sum(entry.bits == bits for entry in self.layers))
            ),
        ]
        return "\n".join(map(printable, lines))
