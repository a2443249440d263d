"""From what was added up and decomposed to a profile."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn

from rankopt._version import __version__
from rankopt.backends import find_backend, loaded_from, valued
from rankopt.layers import FloatArray, Form, Layer, fingerprint
from rankopt.measure.accumulate import Gathered
from rankopt.measure.decompose import ScaledCurve, Store
from rankopt.measure.loss import Loss
from rankopt.measure.processes import Processes
from rankopt.model.selection import Selection
from rankopt.model.size import model_size
from rankopt.profile.info import BackendInfo, ProfileInfo, ScaleInfo
from rankopt.profile.profile import Profile


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What is measured.

    Attributes:
        model: unwrapped.
        selection: its planned layers.
        loss: whose Fisher information.
        processes: that share the work.
        form: how matrices of lower rank will be kept.
    """

    model: nn.Module
    selection: Selection
    loss: Loss
    processes: Processes
    form: Form

    @property
    def architecture(self) -> str:
        """Class of the model."""
        return type(self.model).__name__

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        return fingerprint(self.architecture, self.selection.layers)


@dataclasses.dataclass
class Parts:
    """What passes over the data gave, put together."""

    rows: dict[str, Any] = dataclasses.field(default_factory=dict)
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    traces: dict[str, Any] = dataclasses.field(default_factory=dict)
    totals: list[Any] = dataclasses.field(default_factory=list)
    curves: dict[str, dict[str, ScaledCurve]] = dataclasses.field(default_factory=dict)
    gathered: Gathered | None = None

    def add(
        self,
        layers: Sequence[Layer],
        gathered: Gathered,
        curves: Mapping[str, Mapping[str, ScaledCurve]],
    ) -> None:
        """Take over one pass; moments are let go."""
        members = {member for layer in layers for member in layer.members}
        for name in (name for name in gathered.sums if name in members):
            banks = [bank[name] for bank in gathered.banks]
            self.rows[name] = _added(sums.rows for sums in banks)
            self.traces[name] = _added(sums.traces for sums in banks)
            columns = [sums.columns for sums in banks if sums.columns is not None]
            if columns:
                self.columns[name] = _added(columns)
        index = {name: k for k, name in enumerate(gathered.names)}
        totals = torch.stack(gathered.seen.totals)
        for layer in layers:
            self.totals.append(sum(totals[:, index[name]] for name in layer.members))
        for backend, found in curves.items():
            self.curves.setdefault(backend, {}).update(found)
        self.gathered = dataclasses.replace(gathered, sums={}, owners={}, odd=None)


def _added(parts: Iterable[torch.Tensor]) -> FloatArray:
    found: FloatArray = functools.reduce(torch.add, (part.cpu() for part in parts)).numpy()
    return found


def assembled(subject: Subject, parts: Parts, store: Store) -> Profile:
    """The profile of all passes together.

    Args:
        subject: what was measured.
        parts: all passes; with the curves of at least one backend.
        store: arrays that spare a decomposition on apply.
    """
    gathered, layers, how = parts.gathered, subject.selection.layers, subject.loss.estimator
    assert gathered is not None and how.kind != "auto"
    size, seen = model_size(subject.model), gathered.seen
    versions = {"rankopt": __version__, "torch": torch.__version__}
    backends = [_described(name, how.unit, layers, found) for name, found in parts.curves.items()]
    info = ProfileInfo(
        versions=versions | {"transformers": version("transformers")},
        architecture=subject.architecture,
        fingerprint=subject.fingerprint,
        task=subject.loss.task,
        estimator=how.kind,
        estimator_reason=subject.loss.why,
        unit=how.unit,
        draws=how.draws,
        seed=how.seed if how.random else None,
        examples=seen.examples,
        targets=seen.targets,
        units=gathered.units,
        processes=subject.processes.count,
        stopped=seen.stopped,
        data_digest=seen.chain,
        model_parameters=size.model,
        model_bytes=size.model_bytes,
        layers=layers,
        left_alone=subject.selection.left_alone,
        backends=tuple(backends),
        form=subject.form,
    )
    return Profile(
        info,
        fisher_rows=parts.rows,
        curves={
            backend: {layer: scaled.curve for layer, scaled in found.items()}
            for backend, found in parts.curves.items()
        },
        valued={
            backend: {
                layer: dataclasses.replace(scaled.curve, losses=scaled.valued)
                for layer, scaled in found.items()
                if scaled.valued is not None
            }
            for backend, found in parts.curves.items()
            if _all_valued(found)
        },
        rounding={
            backend: {layer: scaled.rounding for layer, scaled in found.items() if scaled.rounding}
            for backend, found in parts.curves.items()
        },
        fisher_columns=parts.columns,
        traces=parts.traces,
        batch_fisher=torch.stack(parts.totals, 1).numpy(),
        batch_units=np.array(seen.units),
        kept_arrays=store,
    )


def _described(
    name: str, unit: str, layers: Sequence[Layer], curves: Mapping[str, ScaledCurve]
) -> BackendInfo:
    backend = find_backend(name)
    scales = [
        ScaleInfo(
            name=scale,
            unit=value.unit.format(unit=unit),
            factors=tuple(curves[layer.name].factors[scale] for layer in layers),
        )
        for scale, value in backend.scales.items()
    ]
    if _all_valued(curves):
        # The best estimate of what a rank is worth, and so the default.
        unit, ones = valued.SCALE.unit.format(unit=unit), (1.0,) * len(layers)
        scales.insert(0, ScaleInfo(name=valued.NAME, unit=unit, factors=ones, valued=True))
    return BackendInfo(
        name=name, source=backend.source, loaded_from=loaded_from(name), scales=tuple(scales)
    )


def _all_valued(curves: Mapping[str, ScaledCurve]) -> bool:
    return all(curve.valued is not None for curve in curves.values())
