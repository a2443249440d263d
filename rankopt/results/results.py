"""Results: what was measured of many plans on one model and one set of held-out data, as JSON.

A file grows: each model that was measured is written before the next one is, so that what was
interrupted goes on, and what was measured once (the same factors of the same calibration at the
same ranks) is not measured again, whichever strategy asks for it.

Losses are those of single examples, so that two models can be compared in pairs. A loss that is NaN
or infinite is null, with a note.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from rankopt.errors import ResultsError
from rankopt.files import RESULTS, is_format, whole_file
from rankopt.layers import Form, Layer
from rankopt.plan.compare import ComparedPlan
from rankopt.plan.plan import Size
from rankopt.profile.profile import Profile
from rankopt.schema import STRICT, Count, Loss, Number, Share, read_versioned

FORMAT_VERSION = 1


class Measured(BaseModel):
    """One model on one set of data; see Evaluation, whose plain values these are.

    Attributes:
        loss: mean over all targets; null where it is not finite.
        metrics: of the task; null where one is not defined.
        examples: seen.
        targets: predicted tokens, or labels.
        example_losses: of each example, summed over its targets; null where one is not finite.
        example_targets: how many each example has.
        example_correct: how many of them a classifier gets right.
        also: by name, the same on other data, without examples.
        notes: what was not finite or not defined, and why.
    """

    model_config = STRICT

    loss: Number | None
    metrics: dict[str, Number | None]
    examples: Count
    targets: Count
    example_losses: tuple[Number, ...] | None = None
    example_targets: tuple[Count, ...] | None = None
    example_correct: tuple[Count, ...] | None = None
    also: dict[str, "Measured"] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def of_others(self) -> dict[str, float | None]:
        """``loss of NAME``, and the metrics likewise, of the other data."""
        return {
            f"{what} of {name}": value
            for name, found in self.also.items()
            for what, value in {"loss": found.loss, **found.metrics}.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Losses and metrics of all data, in one level."""
        return {"loss": self.loss, **self.metrics, **self.of_others}

    @model_validator(mode="after")
    def _consistent(self) -> "Measured":
        for name in ("example_losses", "example_targets", "example_correct"):
            given = getattr(self, name)
            if given is not None and len(given) != self.examples:
                raise ValueError(f"{name} has {len(given)} values for {self.examples} examples")
        return self


class Calibration(BaseModel):
    """A profile that plans were made from.

    Attributes:
        digest: of the profile.
        name: of its file.
        examples: that it saw.
        data: digest of them.
    """

    model_config = STRICT

    digest: str
    name: str
    examples: Count
    data: str


class MeasuredPlan(BaseModel):
    """A plan, and what its model measured.

    Attributes:
        strategy: who chose, as it was asked for.
        keep: share of the planned layers' parameters that was asked for.
        calibration: digest of the profile.
        backend: whose factors were made.
        form: of them.
        scale: how layers were compared.
        solver: who chose.
        objective: what was maximised.
        min_retained: share that every layer retains at least, if that was asked for.
        rank_multiple: ranks are multiples of it.
        pins: ``NAME=RANK`` of each layer whose rank was given, not chosen.
        ranks: of each layer of the results, null for dense.
        budget: the most parameters that the planned layers may have.
        size: what they and the model have.
        retained_total: see Plan.
        retained_worst: see Plan.
        worst_layer: see Plan.
        predicted: see Plan.
        gap: see Certificate.
        status: see Certificate.
        seconds: what choosing took.
        measured: of the model; null until it is.
    """

    model_config = STRICT

    strategy: str
    keep: Share
    calibration: str
    backend: str
    form: Form
    scale: str
    solver: str
    objective: Literal["total", "layerwise", "maxmin"]
    min_retained: Share | None
    rank_multiple: Annotated[int, Field(ge=1)]
    pins: tuple[str, ...] = ()
    ranks: tuple[Annotated[int, Field(ge=1)] | None, ...]
    budget: Count
    size: Size
    retained_total: Share
    retained_worst: Share
    worst_layer: str
    predicted: Loss | None
    gap: Share
    status: Literal["optimal", "feasible", "time_limit"]
    seconds: Loss
    measured: Measured | None = None

    @property
    def parameters(self) -> int:
        """Of the planned layers."""
        return self.size.planned

    @property
    def model(self) -> tuple[object, ...]:
        """What tells one compressed model of the results from another."""
        return self.calibration, self.backend, self.form, self.ranks

    @property
    def line(self) -> tuple[object, ...]:
        """What is asked of every calibration alike."""
        return (
            self.keep,
            self.strategy,
            self.backend,
            self.form,
            self.scale,
            self.min_retained,
            self.rank_multiple,
            self.pins,
        )

    @property
    def asked(self) -> tuple[object, ...]:
        """What tells one plan of the results from another."""
        return self.calibration, *self.line

    @classmethod
    def of(cls, row: ComparedPlan, measured: Measured | None = None) -> "MeasuredPlan":
        """What results hold of a compared plan."""
        plan = row.plan
        return cls(
            strategy=str(row.strategy),
            keep=row.keep,
            calibration=plan.profile_digest,
            backend=plan.backend,
            form=plan.form,
            scale=plan.scale,
            solver=plan.solver,
            objective=plan.objective,
            min_retained=plan.min_retained,
            rank_multiple=plan.rank_multiple,
            pins=tuple(f"{name}={plan.ranks[name] or 'dense'}" for name in plan.pinned),
            ranks=tuple(entry.rank for entry in plan.layers),
            budget=plan.budget.parameters,
            size=plan.size,
            retained_total=plan.retained_total,
            retained_worst=plan.retained_worst,
            worst_layer=plan.worst_layer,
            predicted=plan.predicted,
            gap=plan.certificate.gap,
            status=plan.certificate.status,
            seconds=row.seconds,
            measured=measured,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, in one level: the plan but its ranks, and what was measured."""
        content = self.model_dump(mode="json", exclude={"ranks", "size", "measured"})
        size, found = self.size, self.measured
        content |= {
            "parameters": size.planned,
            "kept": size.planned / size.planned_dense,
            "model_parameters": size.model,
            "model_bytes": size.model_bytes,
        }
        return content if found is None else content | found.to_dict()


class Results(BaseModel):
    """All that was measured of one model on one set of held-out data.

    Attributes:
        format: always ``rankopt-results``.
        format_version: of the file.
        rankopt: version that made it.
        architecture: class of the model.
        fingerprint: of the model.
        task: see ProfileInfo.
        data: digest of the held-out data.
        also: name -> digest of other data.
        layers: the planned layers, in the order of each plan's ranks.
        calibrations: the profiles, in the order in which they were given.
        dense: the model without a plan.
        plans: in the order in which they were measured.
    """

    model_config = STRICT

    format: Literal["rankopt-results"] = "rankopt-results"
    format_version: Literal[1] = 1
    rankopt: str
    architecture: str
    fingerprint: str
    task: str
    data: str
    also: dict[str, str] = Field(default_factory=dict)
    layers: tuple[Layer, ...]
    calibrations: tuple[Calibration, ...]
    dense: Measured
    plans: tuple[MeasuredPlan, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "Results":
        for row in self.plans:
            place = f"{row.strategy} at {row.keep:g}"
            if row.calibration not in self.digests:
                raise ValueError(f"{place} is of a calibration that is not among them")
            if len(row.ranks) != len(self.layers):
                raise ValueError(f"{place}: {len(row.ranks)} ranks of {len(self.layers)} layers")
            spent = sum(
                layer.cost(rank, row.form)
                for layer, rank in zip(self.layers, row.ranks, strict=True)
            )
            if spent != row.parameters:
                raise ValueError(f"{place}: the ranks have {spent} parameters")
        asked = [row.asked for row in self.plans]
        if len(set(asked)) != len(asked):
            raise ValueError("one strategy is there twice at one budget")
        return self

    @property
    def digests(self) -> frozenset[str]:
        """Of the calibrations."""
        return frozenset(each.digest for each in self.calibrations)

    @property
    def planned_dense(self) -> int:
        """Parameters of the planned layers, all dense."""
        return sum(layer.dense_cost for layer in self.layers)

    def measured(self) -> Mapping[tuple[object, ...], Measured]:
        """What was measured of each compressed model; see MeasuredPlan.model."""
        return {row.model: row.measured for row in self.plans if row.measured is not None}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; a reader never sees half of it.

        Raises:
            RankoptError: something is there that is no results file, or the system refuses.
        """
        with whole_file(path, is_format(RESULTS)) as temporary:
            text = json.dumps(self.model_dump(mode="json"), separators=(",", ":"))
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Results":
        """Read and check a file.

        Raises:
            ResultsError: missing, not JSON, of another version, or inconsistent.
        """
        source = Path(path)
        if not source.is_file():
            raise ResultsError(f"no results at {source}: measure some with `rankopt compare -o`")
        try:
            text = source.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ResultsError(f"{source} is not text: {error}") from error
        return read_versioned(
            cls, text, str(source), "results", RESULTS, FORMAT_VERSION, ResultsError
        )


def calibration_of(profile: Profile, name: str) -> Calibration:
    """What results hold of a profile."""
    info = profile.info
    return Calibration(
        digest=profile.digest(), name=name, examples=info.examples, data=info.data_digest
    )
