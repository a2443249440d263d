"""Losses on data that did not make the factors: halves of the data in one pass."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rankopt import Compressed, Profile, apply_plan, make_plan, profile_model
from rankopt.backends import find_backend
from rankopt.backends.valued import cross_fitted, valued
from rankopt.errors import DataError, OptionError
from rankopt.measure.accumulate import gather
from rankopt.measure.estimators import Estimator
from rankopt.measure.loss import ModelLoss
from rankopt.model.selection import find_layers
from rankopt.model.tasks import task_of
from rankopt.model.weights import weight_of
from tests import tiny

BACKENDS = ("kronecker", "fwsvd")


def curves(profile: Profile, backend: str, scale: str) -> np.ndarray:
    return np.concatenate(
        [profile.loss_curve(backend, x.name, scale).losses for x in profile.info.layers]
    )


def test_everything_else_is_what_it_was() -> None:
    model = tiny.llama()
    batches = tiny.batches(model, count=5)
    plain = profile_model(model, batches, backends=BACKENDS)
    found = profile_model(model, batches, backends=BACKENDS, cross_fit=True)
    assert found.info.cross_fit and not plain.info.cross_fit
    for layer in plain.info.layers:
        rows = plain.fisher_rows[layer.name], found.fisher_rows[layer.name]
        assert np.allclose(*rows, rtol=1e-10, atol=0.0)
    for backend in BACKENDS:
        own = curves(plain, backend, "nats")
        assert np.allclose(curves(found, backend, "nats"), own, rtol=1e-6, atol=1e-9 * own.max())
    assert found.info.data_digest == plain.info.data_digest
    assert [scale.name for scale in found.backend("kronecker").scales] == ["kronecker", "nats"]


@pytest.mark.parametrize("kind", ["llama", "bert-classification", "t5"])
def test_it_is_that_of_the_two_halves_measured_apart(kind: str) -> None:
    model = tiny.MODELS[kind]()
    batches = tiny.batches(model, count=5)
    profile = profile_model(
        model, batches, backends=BACKENDS, estimator="empirical", cross_fit=True
    )
    modules = dict(find_layers(model).modules)
    needs = frozenset[str]().union(*(find_backend(name).needs for name in BACKENDS))

    def of(some: Any) -> Any:
        loss = ModelLoss(task_of(model), Estimator("empirical"))
        return gather(model, modules, some, loss, needs, progress=False)

    whole, even, odd = of(batches), of(batches[::2]), of(batches[1::2])
    for name in BACKENDS:
        backend = find_backend(name)
        for layer in profile.info.layers[::3]:
            weight = weight_of(modules[layer.name])
            largest = layer.largest_rank("pivoted")
            seen = whole.statistics(layer.name)
            halves = even.statistics(layer.name), odd.statistics(layer.name)
            made = backend.decompose(weight, seen, largest)
            # FWSVD reads a number for each row, and does not fit the data.
            wanted = (
                valued(backend, weight, seen, made)
                if name == "fwsvd"
                else cross_fitted(backend, weight, seen, made, halves, largest)
            )
            assert wanted is not None
            curve = profile.loss_curve(name, layer.name, "kronecker").losses
            assert np.allclose(curve, wanted.numpy(), rtol=1e-5, atol=1e-8 * float(wanted[0]))


def test_plans_expect_to_lose_more_and_apply(tmp_path: Path) -> None:
    """What factors lose on other data is more than on those that they fit."""
    model = tiny.llama()
    batches = tiny.batches(model, count=4)
    plain = profile_model(model, batches)
    found = profile_model(model, batches, cross_fit=True)
    found.save(tmp_path / "it")
    found = Profile.load(tmp_path / "it")
    told, before = (make_plan(profile, keep=0.6) for profile in (found, plain))
    assert told.scale == "kronecker" and before.scale == "nats"
    assert told.predicted is not None and before.predicted is not None
    assert told.predicted > before.predicted
    assert make_plan(found, keep=0.6, scale="nats").ranks == before.ranks
    apply_plan(model, told, found)


def test_it_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    model = tiny.llama()
    batches = tiny.batches(model, count=5)
    wanted = profile_model(model, batches, cross_fit=True)
    path = tmp_path / "partial"

    def stopped() -> Iterator[Any]:
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_model(model, stopped(), cross_fit=True, checkpoint=path, checkpoint_every=1)
    with pytest.raises(DataError, match="halves of the data apart"):
        profile_model(model, batches, cross_fit=False, checkpoint=path)
    found = profile_model(model, batches, cross_fit=True, checkpoint=path, checkpoint_every=1)
    assert found.digest() == wanted.digest()
    plain = tmp_path / "plain"
    with pytest.raises(KeyboardInterrupt):
        profile_model(model, stopped(), checkpoint=plain, checkpoint_every=1)
    with pytest.raises(DataError, match="another cross_fit"):
        profile_model(model, batches, cross_fit=True, checkpoint=plain)


def test_it_goes_with_rounds_parts_and_a_stop() -> None:
    model = tiny.llama()
    batches = tiny.batches(model, count=4)
    wanted = profile_model(model, batches, cross_fit=True)
    parts = profile_model(model, batches, cross_fit=True, layers_at_a_time=3)
    assert np.allclose(
        curves(parts, "kronecker", "kronecker"), curves(wanted, "kronecker", "kronecker")
    )
    again = profile_model(model, batches, cross_fit=True, again=Compressed(0.5))
    assert again.info.cross_fit and again.info.again is not None
    assert not np.allclose(
        curves(again, "kronecker", "kronecker"), curves(wanted, "kronecker", "kronecker")
    )
    early = profile_model(
        model, [*batches, *batches], cross_fit=True, stop=lambda *_: ([], "enough")
    )
    assert early.digest() != wanted.digest() and early.info.stopped == "enough"
    assert np.allclose(
        curves(early, "kronecker", "kronecker"), curves(wanted, "kronecker", "kronecker")
    )


class Chooser(nn.Module):
    """The second layer is used by batches that say so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, *, deep: bool) -> torch.Tensor:
        hidden = self.first(x)
        return self.second(hidden) if deep else hidden


@pytest.mark.parametrize("deep", [0, 1])
def test_a_layer_that_only_one_half_has_seen_is_planned(deep: int) -> None:
    """Of the other half nothing is known, and no factors come of it."""
    torch.manual_seed(0)
    model = Chooser()
    batches = [{"x": torch.randn(4, 3, 6), "deep": number % 2 == deep} for number in range(6)]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return model(batch["x"], deep=batch["deep"]).square().sum((1, 2))

    profile = profile_model(model, batches, loss_fn=loss, include=["*"], cross_fit=True)
    assert [layer.name for layer in profile.info.layers] == ["first", "second"]
    plan = make_plan(profile, keep=0.7)
    assert plan.size.planned <= plan.budget.parameters


def test_one_batch_has_no_halves(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama()
    profile = profile_model(model, tiny.batches(model, count=1), cross_fit=True)
    assert [scale.name for scale in profile.backend("kronecker").scales] == ["nats"]
    assert not profile.info.cross_fit
    assert "one batch has no halves" in capsys.readouterr().err


def test_diagonal_backends_have_nothing_to_cross_fit() -> None:
    model = tiny.llama()
    batches = tiny.batches(model, count=4)
    found = profile_model(model, batches, backends=("fwsvd", "svd"), cross_fit=True)
    plain = profile_model(model, batches, backends=("fwsvd", "svd"))
    assert not found.info.cross_fit and found.digest() == plain.digest()


def test_it_needs_moments() -> None:
    model = tiny.llama()
    with pytest.raises(OptionError, match="not with moments=False"):
        profile_model(model, tiny.batches(model), moments=False, cross_fit=True)
