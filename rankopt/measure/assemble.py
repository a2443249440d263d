"""From what was gathered and decomposed to a profile."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn

from rankopt._version import __version__
from rankopt.backends import find_backend
from rankopt.layers import Layer, fingerprint
from rankopt.measure.accumulate import Gathered
from rankopt.measure.decompose import Curve, Kept
from rankopt.measure.loss import Objective
from rankopt.measure.processes import Processes
from rankopt.model.selection import Found
from rankopt.model.size import model_size
from rankopt.profile.info import BackendInfo, ProfileInfo, ScaleInfo
from rankopt.profile.profile import Profile


@dataclasses.dataclass
class Parts:
    """What passes over the data gave, put together."""

    rows: dict[str, Any] = dataclasses.field(default_factory=dict)
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    traces: dict[str, Any] = dataclasses.field(default_factory=dict)
    totals: list[Any] = dataclasses.field(default_factory=list)
    curves: dict[str, dict[str, Curve]] = dataclasses.field(default_factory=dict)
    gathered: Gathered | None = None

    def add(
        self,
        layers: Sequence[Layer],
        gathered: Gathered,
        curves: Mapping[str, Mapping[str, Curve]],
    ) -> None:
        """Take over one pass; moments are let go."""
        for name, sums in gathered.sums.items():
            self.rows[name] = sums.rows.cpu().numpy()
            self.traces[name] = sums.traces.cpu().numpy()
            if sums.columns is not None:
                self.columns[name] = sums.columns.cpu().numpy()
        index = {name: k for k, name in enumerate(gathered.names)}
        totals = torch.stack(gathered.seen.totals)
        for layer in layers:
            self.totals.append(sum(totals[:, index[name]] for name in layer.members))
        for backend, found in curves.items():
            self.curves.setdefault(backend, {}).update(found)
        self.gathered = dataclasses.replace(gathered, sums={}, owners={})


def assembled(
    model: nn.Module,
    found: Found,
    objective: Objective,
    parts: Parts,
    backends: Sequence[str],
    processes: Processes,
    arrays: Kept,
) -> Profile:
    """The profile of all passes together."""
    gathered, how = parts.gathered, objective.estimator
    assert gathered is not None
    size, architecture, seen = model_size(model), type(model).__name__, gathered.seen
    versions = {"rankopt": __version__, "torch": torch.__version__}
    info = ProfileInfo(
        versions=versions | {"transformers": version("transformers")},
        architecture=architecture,
        fingerprint=fingerprint(architecture, found.layers),
        task=objective.task,
        estimator=how.kind,
        unit=how.unit,
        draws=how.draws,
        seed=how.seed if how.random else None,
        examples=seen.examples,
        targets=seen.targets,
        units=gathered.units,
        processes=processes.count,
        stopped=seen.stopped,
        data_digest=seen.chain,
        model_parameters=size.model,
        model_bytes=size.model_bytes,
        layers=found.layers,
        left_alone=found.left_alone,
        backends=tuple(_described(name, how.unit, found, parts.curves[name]) for name in backends),
    )
    return Profile(
        info,
        parts.rows,
        {name: {x: c.losses for x, c in parts.curves[name].items()} for name in backends},
        {
            name: {x: c.ranks for x, c in parts.curves[name].items() if c.ranks is not None}
            for name in backends
        },
        fisher_columns=parts.columns,
        traces=parts.traces,
        batch_fisher=torch.stack(parts.totals, 1).numpy(),
        batch_units=np.array(seen.units),
        kept_arrays=arrays,
    )


def _described(name: str, unit: str, found: Found, curves: Mapping[str, Curve]) -> BackendInfo:
    backend = find_backend(name)
    scales = tuple(
        ScaleInfo(
            name=scale,
            unit=value.unit.format(unit=unit),
            factors=tuple(curves[layer.name].factors[scale] for layer in found.layers),
        )
        for scale, value in backend.scales.items()
    )
    return BackendInfo(name=name, source=backend.source, scales=scales)
