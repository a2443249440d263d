"""What is measured does not depend on how: in parts, on threads, spilled, or stopped early."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankopt import DataError, ModelError, OptionError, Profile, make_plan, profile_model
from rankopt.backends import BUILT_IN, find_backend
from rankopt.backends.base import ClosedForm, Decomposition
from rankopt.measure import checks, decompose
from rankopt.measure.accumulate import gather
from rankopt.measure.decompose import one_thread
from rankopt.measure.estimators import Estimator
from rankopt.measure.fisher import bytes_of_sums
from rankopt.measure.loss import ModelLoss
from rankopt.model.selection import find_layers
from rankopt.model.size import model_size
from rankopt.model.tasks import task_of
from rankopt.model.weights import weight_of, weight_shape
from rankopt.plan.stability import Stability
from rankopt.profile.spilled import SpilledArrays
from tests import tiny

Batch = dict[str, Any]


def different(count: int, seed: int = 0) -> list[Batch]:
    """Batches of one example each, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCABULARY, (count, 1, 8), generator=generator)
    return [{"input_ids": each} for each in ids]


def ranks_of(profile: Profile, keep: float = 0.8) -> np.ndarray:
    return np.array([entry.parameters for entry in make_plan(profile, keep=keep).layers])


def test_measuring_stops_when_twice_the_data_would_hardly_move_the_ranks() -> None:
    model, wanted = tiny.llama(), Stability(keep=0.6, tolerance=0.02)
    batches = different(1) * 64
    profile = profile_model(model, batches, stop=wanted)
    # The same data again and again: ranks cannot move.
    assert len(profile.batch_units) == 8 and profile.examples == 8
    assert profile.info.stopped == (
        "ranks have settled: 0.00% of the parameters at keep 0.6 moved between 4 and 8 batches"
    )
    whole = profile_model(model, batches[:8])
    assert whole.info.stopped is None
    assert whole.info.data_digest == profile.info.data_digest
    assert np.array_equal(ranks_of(whole), ranks_of(profile))


@pytest.mark.parametrize("tolerance", [0.08, 0.015, 0.001])
def test_it_stops_at_the_first_power_of_two_whose_ranks_have_moved_less(tolerance: float) -> None:
    model, batches = tiny.llama(), different(32, seed=5)
    found = profile_model(model, batches, stop=Stability(0.7, tolerance))
    looks = {n: profile_model(model, batches[:n], keep_bases=False) for n in (4, 8, 16, 32)}
    for half, count in ((4, 8), (8, 16), (16, 32)):
        plans = [make_plan(looks[n], keep=0.7) for n in (half, count)]
        spent = [np.array([entry.parameters for entry in plan.layers]) for plan in plans]
        # What one layer gives another takes: it has moved once.
        moved = abs(spent[1] - spent[0]).sum() / 2 / plans[1].budget.parameters
        if moved <= tolerance:
            assert len(found.batch_units) == count
            assert found.info.stopped and f" {moved:.2%} " in found.info.stopped
            return
    assert found.info.stopped is None and len(found.batch_units) == 32


def test_it_goes_on_while_ranks_move() -> None:
    model, half = tiny.llama(), different(32)
    with torch.no_grad():
        # Data that are ever more violent: what was seen before counts for nothing.
        model.model.embed_tokens.weight[3:32] *= 0.05
    batches = []
    for k, batch in enumerate(half):
        place = 3 + (k.bit_length() * 9) % 50
        batches.append({"input_ids": batch["input_ids"] % 9 + place})
    profile = profile_model(model, batches, stop=Stability(0.6, 1e-4))
    assert profile.info.stopped is None and len(profile.batch_units) == 32


def test_a_budget_that_no_ranks_meet_is_an_error_not_a_long_run() -> None:
    model = tiny.llama()
    with pytest.raises(DataError, match="no ranks to settle"):
        profile_model(model, different(9), stop=Stability(keep=0.01))


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 3, 7, 100])
def test_layers_in_parts_give_the_same_profile(part: int) -> None:
    model = tiny.t5()
    batches = tiny.batches(model)
    options: dict[str, Any] = {"backends": ["kronecker", "fwsvd_two_sided"], "estimator": "sampled"}
    whole = profile_model(model, iter(batches), **options)
    parts = profile_model(model, iter(batches), layers_at_a_time=part, **options)
    assert parts.digest() == whole.digest() and parts.info == whole.info
    assert parts.kept_arrays.keys() == whole.kept_arrays.keys()
    for name in whole.kept_arrays:
        assert np.array_equal(parts.kept_arrays[name], whole.kept_arrays[name])


def test_sums_that_do_not_fit_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.llama()
    batches, needs = tiny.batches(model), ("columns", "elements", "second_moment")
    modules = find_layers(model).modules
    sums = gather(model, modules, batches, ModelLoss(task_of(model), Estimator()), needs).sums
    kept = [
        tensor.numel() * tensor.element_size()
        for name in modules
        for kind, tensor in sums[name].tensors().items()
        if kind != "traces"
    ]
    bound = bytes_of_sums([weight_shape(module) for module in modules.values()], needs)
    shared = [name for name in modules if sums[name].second is None]
    lost = bytes_of_sums([weight_shape(modules[name]) for name in shared], ["second_moment"])
    lost -= bytes_of_sums([weight_shape(modules[name]) for name in shared], [])
    assert shared and sum(kept) == bound - lost
    weights = model_size(model).model_bytes
    moments = bytes_of_sums([weight_shape(m) for m in modules.values()], ["second_moment"])
    for missing, part, warned in [(0, None, False), (1, None, True), (1, 2, False)]:
        monkeypatch.setattr(
            checks, "memory_for", lambda _, missing=missing: weights + moments - missing
        )
        options: dict[str, Any] = {"backends": ["whitened"], "moments": False}
        profile_model(model, batches, layers_at_a_time=part, **options)
        text = capsys.readouterr().err
        assert (f"statistics of {len(modules)} layers" in text) == warned
        assert ("layers_at_a_time" in text) == warned


def test_groups_stay_whole_in_parts() -> None:
    model = tiny.llama()
    options: dict[str, Any] = {"include": ["lm_head", "*.mlp.*"], "untie": True}
    whole, parts = (
        profile_model(model, tiny.batches(model), layers_at_a_time=n, **options) for n in (None, 1)
    )
    assert parts.digest() == whole.digest()
    head = next(layer for layer in whole.info.layers if layer.partners)
    assert head.members == ("lm_head", "model.embed_tokens")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_arrays_on_disk_and_threads_change_nothing(kind: str, workers: int, tmp_path: Path) -> None:
    model = tiny.ARCHITECTURES[kind]()
    batches = tiny.batches(model)
    inside = profile_model(model, batches, backends=BUILT_IN, workers=2)
    with SpilledArrays(tmp_path) as kept:
        outside = profile_model(model, batches, backends=BUILT_IN, store=kept, workers=workers)
        assert outside.digest() == inside.digest()
        assert outside.kept_arrays is kept and len(kept) == len(inside.kept_arrays) > 50
        for name in inside.kept_arrays:
            assert np.array_equal(kept[name], inside.kept_arrays[name]), name
        outside.save(tmp_path / "outside.safetensors")
    loaded = Profile.load(tmp_path / "outside.safetensors")
    assert loaded.digest() == inside.digest()
    for backend in BUILT_IN:
        for layer in inside.info.layers:
            kept, again = (each.kept(backend, layer.name) for each in (inside, loaded))
            assert kept.keys() == again.keys()
            assert all(np.array_equal(kept[kind], again[kind]) for kind in kept)


def test_what_cannot_be_computed_again_is_kept_though_bases_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.bert()
    batches = tiny.batches(model)
    spare = {"kronecker", "tfwsvd", "whitened"}
    every = {"keep_bases": True}
    cases = [({"keep_bases": False}, None, spare), ({}, 1000, spare), (every, 1000, set(BUILT_IN))]
    for options, limit, wanted in cases:
        if limit is not None:
            monkeypatch.setattr(decompose, "BASES_LIMIT", limit)
        profile = profile_model(model, batches, backends=BUILT_IN, **options)
        name = profile.info.layers[0].name
        assert {backend for backend in BUILT_IN if profile.kept(backend, name)} == wanted


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_profile_says_what_the_backends_say(name: str) -> None:
    model = tiny.gpt2()
    batches = tiny.batches(model)
    options: dict[str, Any] = {"unit": "token", "seed": 3, "moments": False}
    profile = profile_model(model, batches, backends=[name], **options)
    info, backend = profile.info, find_backend(name)
    assert (info.unit, info.seed, info.draws, info.units) == ("token", 3, 1, info.targets)
    (said,) = info.backends
    assert (said.name, said.source) == (name, backend.source)
    assert [scale.name for scale in said.scales] == list(backend.scales)
    assert "nats" not in backend.scales or "nats per token" in said.scales[0].unit
    modules = find_layers(model).modules
    objective = ModelLoss(task_of(model), Estimator(unit="token", seed=3))
    seen = gather(model, modules, batches, objective, backend.needs)
    for k, layer in enumerate(info.layers):
        weight, statistics = weight_of(modules[layer.name]), seen.statistics(layer.name)
        with one_thread():
            found = backend.decompose(weight, statistics, layer.largest_rank("pivoted"))
        assert np.array_equal(profile.curves[name][layer.name].losses, found.losses.numpy())
        for scale in said.scales:
            shape = (layer.out_features, layer.in_features)
            assert scale.factors[k] == backend.scales[scale.name].factor(shape, statistics)


def test_a_groups_loss_is_that_of_its_members_each_with_its_own_value() -> None:
    model = tiny.llama()
    batches = tiny.batches(model)
    options: dict[str, Any] = {"include": ["lm_head"], "untie": True}
    modules = find_layers(model, **options).modules
    objective = ModelLoss("causal-lm", Estimator())
    for name in ("fwsvd", "kronecker", "whitened", "svd"):
        backend = find_backend(name)
        seen = gather(model, modules, batches, objective, backend.needs)
        profile = profile_model(model, batches, backends=[name], moments=False, **options)
        scale = profile.info.backends[0].scales[0]
        wanted = np.zeros(25)
        for member, module in modules.items():
            weight, statistics = weight_of(module), seen.statistics(member)
            found = backend.decompose(weight, statistics, 5)
            factor = backend.scales[scale.name].factor(tuple(weight.shape), statistics)
            wanted += factor * found.losses.numpy()
        assert scale.factors[0] * profile.curves[name]["lm_head"].losses == pytest.approx(
            wanted, rel=1e-9
        )
        assert set(profile.fisher_rows) == {"lm_head", "model.embed_tokens"}
        assert profile.batch_fisher.shape == (2, 1)
        rows = [profile.fisher_rows[member].sum() for member in modules]
        assert profile.batch_fisher.sum() == pytest.approx(sum(rows), rel=1e-9)


def test_records_of_batches_add_up_to_the_whole() -> None:
    model = tiny.llama()
    batches = [*tiny.batches(model, size=3), *tiny.batches(model, count=1, size=2)]
    profile = profile_model(model, batches)
    assert profile.batch_units.tolist() == [3.0, 3.0, 2.0] and profile.units == 8
    for k, layer in enumerate(profile.info.layers):
        total = profile.fisher_rows[layer.name].sum()
        assert profile.batch_fisher[:, k].sum() == pytest.approx(total, rel=1e-12)


@dataclasses.dataclass(frozen=True)
class Broken(ClosedForm):
    """Losses of the wrong kind."""

    how: str = ""

    def decompose(self, weight: torch.Tensor, statistics: Any, largest: int) -> Decomposition:
        found = super().decompose(weight, statistics, largest)
        losses = found.losses[1:] if self.how == "short" else found.losses * torch.nan
        return Decomposition(losses, found.kept)


@pytest.mark.parametrize("how", ["short", "nan"])
def test_losses_that_are_none_are_refused_naming_layer_and_backend(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    svd = find_backend("svd")
    fields = {f.name: getattr(svd, f.name) for f in dataclasses.fields(ClosedForm)}
    monkeypatch.setattr("rankopt.backends.svd.BACKEND", Broken(**fields, how=how))
    model = tiny.bert()
    with pytest.raises(ModelError, match=r"layer bert\.encoder.*: backend svd returned losses"):
        profile_model(model, tiny.batches(model), backends=["svd"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"layers_at_a_time": 0}, "layers_at_a_time must be at least 1"),
        ({"layers_at_a_time": 2, "stop": Stability()}, "does not go with"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"backends": []}, "at least one backend"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], complaint: str) -> None:
    model = tiny.bert()
    with pytest.raises(OptionError, match=complaint):
        profile_model(model, tiny.batches(model), **options)


def test_an_unknown_backend_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(OptionError, match="unknown backend 'pca'"):
        profile_model(tiny.bert(), iter(()), backends=["fwsvd", "pca"])
