"""Profiles whose curves are valued with the Kronecker-factored Fisher information."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankopt import OptionError, Profile, ProfileError, make_plan, profile_model
from rankopt.backends import BUILT_IN, find_backend
from rankopt.backends.valued import valued
from rankopt.measure.accumulate import gather
from rankopt.measure.decompose import one_thread
from rankopt.measure.estimators import Estimator
from rankopt.measure.loss import ModelLoss
from rankopt.model.selection import find_layers
from rankopt.model.weights import weight_of
from rankopt.profile.curves import LossCurve
from tests import tiny

OTHERS = [name for name in BUILT_IN if name != "kronecker"]
MOMENTS = frozenset({"second_moment", "gradient_moment"})


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_default_scale_is_what_the_factors_lose(name: str) -> None:
    model = tiny.llama()
    options: dict[str, Any] = {"include": ["lm_head", "*.mlp.down_proj"], "untie": True}
    profile = profile_model(model, tiny.batches(model), backends=[name], **options)
    scales = profile.backend(name).scales
    if name == "kronecker":
        assert [scale.name for scale in scales] == ["nats"] and not profile.valued
        return
    assert scales[0].name == "kronecker" and scales[0].valued
    assert scales[0].unit == "nats per example (Kronecker-factored estimate)"
    assert not any(scale.valued for scale in scales[1:])
    modules, backend = find_layers(model, **options).modules, find_backend(name)
    objective = ModelLoss("causal-lm", Estimator())
    seen = gather(model, modules, tiny.batches(model), objective, backend.needs | MOMENTS)
    for layer in profile.info.layers:
        wanted = np.zeros(1)
        for member in layer.members:
            weight, statistics = weight_of(modules[member]), seen.statistics(member)
            with one_thread():
                made = backend.decompose(weight, statistics, layer.largest_rank("pivoted"))
                found = valued(backend, weight, statistics, made)
            assert found is not None
            wanted = wanted + found.numpy()
        assert profile.loss_curve(name, layer.name, "kronecker").losses == pytest.approx(wanted)
        own = profile.loss_curve(name, layer.name)
        assert own is profile.curves[name][layer.name]
        assert own is profile.loss_curve(name, layer.name, scales[1].name)


def test_without_moments_a_backend_is_planned_on_its_own_error() -> None:
    model = tiny.llama()
    for backends in (["fwsvd"], ["fwsvd", "kronecker"]):
        profile = profile_model(model, tiny.batches(model), backends=backends, moments=False)
        assert [scale.name for scale in profile.backend().scales] == ["nats", "sum"]
        assert not profile.valued
    with pytest.raises(OptionError, match="has no scale 'kronecker'"):
        make_plan(profile, keep=0.8, scale="kronecker")


@pytest.fixture(scope="module")
def profile() -> Profile:
    model = tiny.llama()
    return profile_model(model, tiny.batches(model), backends=["fwsvd", "kronecker", "tfwsvd"])


@pytest.mark.parametrize("backend", ["fwsvd", "tfwsvd"])
def test_plans_under_each_scale_predict_by_the_best_estimate(
    profile: Profile, backend: str
) -> None:
    plans = {
        scale: make_plan(profile, keep=0.7, backend=backend, scale=scale)
        for scale in ("kronecker", "nats")
    }
    assert plans["kronecker"].predicted is not None and plans["nats"].predicted is not None
    assert plans["kronecker"].predicted <= plans["nats"].predicted
    per_target = profile.info.units / profile.info.targets
    for scale, plan in plans.items():
        assert plan.scale == scale
        lost = sum(
            profile.loss_curve(backend, entry.layer.name, "kronecker").lost(entry.rank)
            for entry in plan.layers
        )
        assert plan.predicted == pytest.approx(lost * per_target)
    assert plans["kronecker"].certificate.loss == pytest.approx(
        plans["kronecker"].predicted / per_target
    )


def test_a_file_gives_the_same_curves(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.st")
    again = Profile.load(tmp_path / "p.st")
    assert again.digest() == profile.digest()
    assert set(again.valued) == {"fwsvd", "tfwsvd"}
    for backend in again.valued:
        for layer in profile.info.layers:
            one, two = (p.loss_curve(backend, layer.name, "kronecker") for p in (profile, again))
            assert np.array_equal(one.losses, two.losses)
            assert np.array_equal(one.ranks, two.ranks) and one.on_grid == two.on_grid


def test_values_that_are_missing_or_unsound_are_refused(profile: Profile) -> None:
    with pytest.raises(ProfileError, match="no fwsvd losses"):
        dataclasses.replace(profile, valued={})
    name = profile.info.layers[0].name
    rising = profile.valued["fwsvd"][name].losses[::-1].copy()
    curves = {**profile.valued["fwsvd"], name: LossCurve.complete(rising)}
    with pytest.raises(ProfileError, match=f"layer {name}: the fwsvd loss curve rises"):
        dataclasses.replace(profile, valued={**profile.valued, "fwsvd": curves})


def test_values_change_the_digest(profile: Profile) -> None:
    name = profile.info.layers[0].name
    curve = profile.valued["fwsvd"][name]
    more = dataclasses.replace(curve, losses=2.0 * curve.losses)
    other = {**profile.valued, "fwsvd": {**profile.valued["fwsvd"], name: more}}
    assert dataclasses.replace(profile, valued=other).digest() != profile.digest()
