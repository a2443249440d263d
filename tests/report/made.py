"""Profiles, plans and results to be reported, made without torch."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from rankopt import Profile, make_plan
from rankopt.plan.compare import Strategy, compare
from rankopt.plan.plan import Plan
from rankopt.results.results import Measured, MeasuredPlan, Results, calibration_of
from tests.synthetic import synthetic_profile

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
SHAPES = ((24, 24), (8, 24), (60, 24), (24, 60))
#: What a browser would run, load or take for the end of something.
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "a.1.{{data}}$&<!--<script>\u202e",
    "\"'><svg onload=alert(3)>",
)


def renamed(profile: Profile, names: Sequence[str], architecture: str | None = None) -> Profile:
    """The profile with other names for its layers, and the kinds that these have."""
    info = profile.info
    kinds = [re.split(r"(?:^|\.)\d+\.", name)[-1] for name in names]
    layers = tuple(
        layer.model_copy(update={"name": name, "kind": kind})
        for layer, name, kind in zip(info.layers, names, kinds, strict=True)
    )
    new = dict(zip((layer.name for layer in info.layers), names, strict=True))
    about = {"layers": layers, "architecture": architecture or info.architecture}
    return dataclasses.replace(
        profile,
        info=info.model_copy(update=about),
        fisher_rows={new.get(name, name): rows for name, rows in profile.fisher_rows.items()},
        curves={
            backend: {new[name]: curve for name, curve in curves.items()}
            for backend, curves in profile.curves.items()
        },
    )


def transformer(layers: int = 16, shapes: Sequence[tuple[int, int]] = SHAPES) -> Profile:
    """Layers in blocks of four, and a head that is in none."""
    made = synthetic_profile(shapes=[shapes[k % 4] for k in range(layers)])
    names = [f"model.layers.{k // 4}.{KINDS[k % 4]}" for k in range(layers - 1)]
    return renamed(made, [*names, "lm_head"])


def plans(profile: Profile) -> dict[str, Plan]:
    """One that is optimal, and one that is not."""
    return {
        "best": make_plan(profile, keep=0.7),
        "even": make_plan(profile, keep=0.7, solver="uniform"),
    }


def measured(increase: float, examples: int = 12) -> Measured:
    """A model that loses so much more than another, of a target."""
    each = np.random.default_rng(0).gamma(50.0, 0.06, examples) + increase
    loss = float(each.mean())
    return Measured(
        loss=loss,
        metrics={"perplexity": float(np.exp(loss))},
        examples=examples,
        targets=10 * examples,
        example_losses=tuple((10 * each).tolist()),
        example_targets=(10,) * examples,
        also={"code": Measured(loss=loss + 1, metrics={}, examples=1, targets=10)},
    )


def results(
    profile: Profile,
    name: str = "p.st",
    strategies: Sequence[Strategy] = (Strategy("exact"), Strategy("uniform")),
) -> Results:
    """Strategies at three budgets, which lose half as much again as was predicted."""
    rows = compare(profile, [0.9, 0.8, 0.6], strategies)
    info = profile.info
    return Results(
        rankopt="0",
        architecture=info.architecture,
        fingerprint=info.fingerprint,
        task=info.task,
        data="d" * 64,
        also={"code": "c" * 64},
        layers=info.layers,
        calibrations=(calibration_of(profile, name),),
        dense=measured(0.0),
        plans=tuple(
            MeasuredPlan.of(row, measured(1.5 * (row.plan.predicted or 0.0))) for row in rows
        ),
    )
