"""A profile refuses what cannot be, and says how sure it is."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rankopt.errors import OptionError, ProfileError
from rankopt.layers import DENSE
from rankopt.profile.curves import LossCurve
from rankopt.profile.info import BackendInfo, ProfileInfo, ScaleInfo
from rankopt.profile.jackknife import relative_standard_errors
from rankopt.profile.profile import Profile
from tests.synthetic import backend_info, full_profile, recurved, synthetic_profile


def damaged(where: str, value: float) -> dict[str, Any]:
    """A full profile's field with one number replaced, in the third layer or the third batch."""
    made = full_profile()
    if where == "batch_units":
        assert made.batch_units is not None
        return {where: np.append(made.batch_units[:-1], value)}
    if where == "losses":
        return recurved(made, "fwsvd", lambda c: (c.ranks, np.append(c.losses[:-1], value)))
    arrays = getattr(made, where)
    name = "block.0.proj" if where == "traces" else "block.2.proj"
    return {where: {**arrays, name: np.append(arrays[name][:-1], value)}}


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e-300])
@pytest.mark.parametrize("where", ["fisher_rows", "fisher_columns", "traces", "losses"])
def test_impossible_numbers_are_refused_naming_the_layer(value: float, where: str) -> None:
    with pytest.raises(ProfileError, match=r"block\.\d\.proj.*NaN, infinite or negative"):
        dataclasses.replace(full_profile(), **damaged(where, value))
    with pytest.raises(ProfileError, match="batches' units holds NaN"):
        dataclasses.replace(full_profile(), **damaged("batch_units", value))


def with_curve(losses: Any, ranks: Any = None, layer: str = "block.1.proj") -> Profile:
    """A profile with one curve replaced; the layer is 16 x 40."""
    made = synthetic_profile()
    values = np.asarray(losses)
    curve = LossCurve.complete(values) if ranks is None else LossCurve(np.asarray(ranks), values)
    changed = {**made.curves["fwsvd"], layer: curve}
    return dataclasses.replace(made, curves={**made.curves, "fwsvd": changed})


@pytest.mark.parametrize(
    ("losses", "ranks", "message"),
    [
        (np.arange(17.0), None, "rises with the rank"),
        (np.zeros(16), None, "17 float64 losses"),
        (np.zeros(18), None, "17 float64 losses"),
        (np.zeros(17, np.float32), None, "17 float64 losses.*float32"),
        (np.zeros((17, 1)), None, "17 float64 losses"),
        (np.zeros(3), [0, 2], "2 float64 losses"),
        (np.zeros(2), [1, 2], "ranks from 0 to at most 16"),
        (np.zeros(2), [0, 17], "ranks from 0 to at most 16"),
        (np.zeros(2), [0.0, 2.0], "ranks from 0"),
        (np.zeros(0), np.zeros(0, np.int64), "ranks from 0"),
        (np.zeros(3), [0, 4, 4], "do not increase"),
    ],
)
def test_impossible_curves_are_refused_naming_the_layer(
    losses: Any, ranks: Any, message: str
) -> None:
    with pytest.raises(ProfileError, match=rf"block\.1\.proj: the fwsvd.*{message}"):
        with_curve(losses, ranks)


def test_curve_knows_its_own_ranks_only() -> None:
    curve = LossCurve(np.array([0, 2, 5]), np.array([3.0, 1.0, 0.5]))
    assert curve.full == 3.0
    assert curve.at(np.array([5, DENSE, 0, 2])).tolist() == [0.5, 0.0, 3.0, 1.0]
    for missing in (1, 6):
        with pytest.raises(ProfileError, match=f"no rank {missing}"):
            curve.at(np.array([2, missing]))


@pytest.mark.parametrize(
    "statistics",
    [
        {"fisher_rows": {"partner.1": np.ones(41)}},
        {"fisher_rows": {"block.1.proj": np.ones(16)}},
        {"fisher_rows": {"block.1.proj": np.ones(40, np.float32)}},
        {"fisher_columns": {"block.1.proj": np.ones(40)}},
        {"fisher_columns": {"partner.1": np.ones(16)}},
        {"traces": {"block.1.proj": np.ones(2)}},
    ],
)
def test_misshapen_statistics_are_refused_naming_the_layer(statistics: dict[str, Any]) -> None:
    ((field, changed),) = statistics.items()
    (name,) = changed
    made = full_profile()
    with pytest.raises(ProfileError, match=rf"layer {name}: its .* must be float64"):
        dataclasses.replace(made, **{field: {**getattr(made, field), **changed}})


def test_a_partner_has_rows_of_either_side_and_columns_of_the_other() -> None:
    made = full_profile()
    turned = dataclasses.replace(
        made,
        fisher_rows={**made.fisher_rows, "partner.1": np.ones(40)},
        fisher_columns={**made.fisher_columns, "partner.1": np.ones(16)},
    )
    own = made.fisher_rows["block.1.proj"].sum()
    assert turned.fisher_trace("block.1.proj") == pytest.approx(own + 40.0)
    assert made.fisher_trace("block.1.proj") == pytest.approx(
        own + made.fisher_rows["partner.1"].sum()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": 0.0}, "units"),
        ({"units": math.nan}, "units"),
        ({"estimator": "guessed"}, "estimator"),
        ({"backends": ()}, "backends"),
        ({"format_version": 1}, "format_version"),
    ],
)
def test_impossible_descriptions_are_refused(change: dict[str, Any], message: str) -> None:
    content = dict(synthetic_profile().info) | change
    with pytest.raises(ValidationError, match=message):
        ProfileInfo(**content)


def test_factors_and_names_must_match_the_layers() -> None:
    info = synthetic_profile().info
    content = dict(info)
    short = backend_info("fwsvd", info.layers[1:])
    for change, message in (
        ({"backends": (short,)}, "scale nats of backend fwsvd has 3 factors for 4 layers"),
        ({"backends": info.backends[:1] * 2}, "backend fwsvd is there twice"),
        ({"layers": (info.layers[0], *info.layers[:3])}, r"layer block\.0\.proj is there twice"),
    ):
        with pytest.raises(ValidationError, match=message):
            ProfileInfo(**{**content, **change})
    for name in ("a/b", "a.b", "", "a b"):
        with pytest.raises(ValidationError, match="name"):
            BackendInfo(name=name, source="", scales=info.backends[0].scales)
    with pytest.raises(ValidationError, match="factors"):
        ScaleInfo(name="nats", unit="nats", factors=(1.0, math.inf))


def test_backend_that_was_not_measured_names_those_that_were() -> None:
    made = synthetic_profile(backends=["fwsvd"])
    for ask in (made.backend, lambda name: made.loss_curve(name, "block.0.proj")):
        with pytest.raises(ProfileError, match=r"'svd', only for fwsvd.*--backend svd"):
            ask("svd")
    assert made.backend().name == "fwsvd"
    assert made.backend().find_scale().name == "nats"
    with pytest.raises(OptionError, match="no scale 'metric'; known: nats, sum"):
        made.backend().find_scale("metric")


def by_hand(sums: np.ndarray, units: np.ndarray) -> list[float]:
    """Leave out one batch at a time, in a loop and in plain words."""
    n, found = len(units), []
    for layer in range(sums.shape[1]):
        s = sums[:, layer]
        whole = math.fsum(s) / math.fsum(units)
        without = [math.fsum(np.delete(s, b)) / math.fsum(np.delete(units, b)) for b in range(n)]
        mean = math.fsum(without) / n
        variance = (n - 1) / n * math.fsum((x - mean) ** 2 for x in without)
        found.append(math.sqrt(variance) / whole if whole else 0.0)
    return found


@settings(max_examples=100, deadline=None)
@given(
    batches=st.integers(2, 9),
    layers=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1e-200, 1e-6, 1.0, 1e200]),
    silent=st.booleans(),
)
def test_standard_errors_are_those_of_leaving_out_one_batch(
    batches: int, layers: int, seed: int, size: float, silent: bool
) -> None:
    rng = np.random.default_rng(seed)
    sums, units = rng.gamma(0.5, 1.0, (batches, layers)), rng.integers(1, 9, batches) * 1.0
    if silent:
        sums[:, 0] = 0.0
    wanted = by_hand(sums, units)
    np.testing.assert_allclose(relative_standard_errors(sums * size, units), wanted, rtol=1e-7)
    empty = np.vstack([sums, np.zeros(layers)]), np.append(units, 0.0)
    np.testing.assert_allclose(relative_standard_errors(*empty), wanted, rtol=1e-7)


def test_standard_errors_are_the_spread_of_repeated_measurements() -> None:
    """Of equal batches it is the textbook's s/sqrt(n); and repeating the measurement agrees."""
    rng = np.random.default_rng(0)
    sums, ones = rng.gamma(2.0, 1.0, (400, 1)), np.ones(400)
    (found,) = relative_standard_errors(sums, ones)
    assert found == pytest.approx(sums.std(ddof=1) / math.sqrt(400) / sums.mean(), rel=1e-9)
    units = rng.integers(1, 5, (2000, 30)) * 1.0
    values = rng.gamma(2.0, units)
    ratios = values.sum(1) / units.sum(1)
    each = [relative_standard_errors(v[:, None], u)[0] for v, u in zip(values, units, strict=True)]
    assert np.mean(each) == pytest.approx(ratios.std() / ratios.mean(), rel=0.1)


@pytest.mark.parametrize("tiny", [5e-324, 1e-300, 1e-18])
def test_batches_that_vanish_beside_one_leave_it_unsure_and_not_nan(tiny: float) -> None:
    units = np.array([tiny, tiny, tiny, 1.0])
    found = relative_standard_errors(np.ones((4, 2)), units)
    assert (found > 1e6).all()
    # Leaving any batch out of these leaves the same ratio of sums to units.
    assert relative_standard_errors(units[:, None], units) == pytest.approx(0.0, abs=1e-6)


def test_fewer_than_two_batches_are_infinitely_unsure_and_none_is_nan() -> None:
    made = full_profile()
    assert all(0 < error < 1 for error in made.standard_errors().values())
    assert list(made.standard_errors()) == [layer.name for layer in made.info.layers]
    assert made.batch_fisher is not None and made.batch_units is not None
    for count in (0, 1):
        few = dataclasses.replace(
            made, batch_fisher=made.batch_fisher[:count], batch_units=made.batch_units[:count]
        )
        assert set(few.standard_errors().values()) == {math.inf}
    assert set(synthetic_profile().standard_errors().values()) == {math.inf}
    with pytest.raises(ProfileError, match="belong together"):
        dataclasses.replace(made, batch_units=None)
    with pytest.raises(ProfileError, match="batches' Fisher must be"):
        dataclasses.replace(made, batch_fisher=made.batch_fisher[:-1])


def test_changed_copy_is_planned_anew() -> None:
    """Tables of options are kept with a profile; a copy must not inherit them."""
    from rankopt import make_plan

    made = synthetic_profile()
    make_plan(made, keep=0.6)
    other = synthetic_profile(seed=5)
    copy = dataclasses.replace(made, curves=other.curves)
    assert make_plan(copy, keep=0.6).certificate == make_plan(other, keep=0.6).certificate
