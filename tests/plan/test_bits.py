"""Ranks and bits under one budget of bytes: the best there is, counted to the byte, or refused."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rankopt import (
    ComparedPlan,
    Plan,
    Profile,
    Strategy,
    export_ranks,
    make_plan,
    measure_comparison,
)
from rankopt.errors import InfeasibleBudgetError, OptionError, PlanError, ProfileError
from rankopt.layers import AS_IS, BITS, DENSE, GROUP, Form, Layer
from rankopt.profile.curves import LossCurve
from tests.synthetic import synthetic_profile, tails

pytest.importorskip("cvxpy")

SHAPES = ((64, 96), (96, 64), (96, 96))


def with_rounding(form: Form = "pairs", seed: int = 0) -> Profile:
    """A made-up profile whose last layer has 50 inputs: no whole groups."""
    profile = synthetic_profile((*SHAPES, (64, 50)), seed=seed, backends=("fwsvd",))
    rng = np.random.default_rng(seed)
    info = profile.info.model_copy(update={"bits": BITS, "form": form})
    (backend,) = profile.backends
    # Spectra that fall slowly, as those of weights do: truncation is no bargain.
    curves = {
        x.name: LossCurve.complete(tails(rng.uniform(1, 9) / np.arange(1, min(shape) + 1)))
        for x in info.layers
        for shape in [(x.out_features, x.in_features)]
    }
    factors = info.backends[0].scales[0].factors
    full = {
        x.name: curves[x.name].full * factor for x, factor in zip(info.layers, factors, strict=True)
    }
    rounding: Any = {
        x.name: {
            bits: np.sort(rng.uniform(0, 1, x.rounded_ranks(form).size)) * full[x.name] * size
            for bits, size in ((8, 1e-4), (4, 1e-2))
            if x.can_round(None, bits)
        }
        for x in info.layers
    }
    return dataclasses.replace(
        profile, info=info, curves={backend: curves}, rounding={backend: rounding}
    )


def options(profile: Profile, layer: Layer, bits: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Rank, bits, bytes and loss of every option, counted here."""
    form, (info,) = profile.info.form, profile.info.backends
    scale = info.scales[0]
    factor = scale.factors[profile.info.layers.index(layer)]
    curve = profile.loss_curve(info.name, layer.name, scale.name)
    at = layer.rounded_ranks(form)
    out, into = layer.out_features, layer.in_features
    for rank in (*range(1, layer.largest_rank(form) + 1), None):
        truncated = curve.lost(rank) * factor
        if rank is None:
            matrices = [(out, into)]
        elif form == "pairs":
            matrices = [(out, rank), (rank, into)]
        elif out < into:
            matrices = [(rank, into), (out - rank, rank)]
        else:
            matrices = [(out, rank), (rank, into - rank)]
        numbers = sum(a * b for a, b in matrices)
        yield rank, None, numbers * layer.itemsize, truncated
        measured = profile.rounding_of(info.name, layer.name)
        for width in (b for b in bits if b in measured):
            if rank is not None and rank % GROUP:
                continue
            if width == 8:
                size = numbers + sum(4 * rows for rows, _ in matrices)
            else:
                size = numbers // 2 + numbers // 32 * layer.itemsize
            lost = measured[width]
            own = lost[-1] if rank is None else np.interp(rank, at[:-1], lost[:-1])
            yield rank, width, size, truncated + float(own)


@pytest.mark.parametrize("form", ["pairs", "pivoted"])
def test_no_choice_of_ranks_and_bits_is_better(form: Form) -> None:
    profile = with_rounding(form)
    # Of all options of a layer only those that no cheaper one beats can be in the best choice.
    fronts = []
    for layer in profile.info.layers:
        ordered = sorted(options(profile, layer, BITS), key=lambda x: (x[2], x[3]))
        best, front = np.inf, []
        for option in ordered:
            if option[3] < best:
                best = option[3]
                front.append(option)
        # Every twentieth is enough for a bound: the plan may only be better than these.
        fronts.append(front[::20] + front[-1:])
    for share in (0.6, 0.3, 0.15):
        budget = int(profile.info.planned_bytes * share)
        plan = make_plan(profile, max_bytes=budget, bits=BITS)
        losses = [
            sum(x[3] for x in taken)
            for taken in itertools.product(*fronts)
            if sum(x[2] for x in taken) <= budget
        ]
        assert plan.certificate.loss <= min(losses) * (1 + 1e-12)
        found = {(e.layer.name, e.rank, e.bits): e for e in plan.layers}
        size = loss = 0.0
        for layer in profile.info.layers:
            for rank, width, own, lost in options(profile, layer, BITS):
                if (layer.name, rank, width) in found:
                    size, loss = size + own, loss + lost
                    assert found[layer.name, rank, width].bytes_in(form) == own
        assert plan.certificate.loss == pytest.approx(loss, rel=1e-12)
        assert size == plan.limits[0].spent <= budget
        info = profile.info
        assert plan.size.model_bytes == info.model_bytes - info.planned_bytes + size
        assert plan.predicted == pytest.approx(loss * info.units / info.targets)
        assert Plan.from_json(plan.to_json()) == plan


def test_more_bits_on_offer_are_never_worse() -> None:
    profile = with_rounding("pivoted")
    for share in (0.5, 0.25):
        budget = int(profile.info.planned_bytes * share)
        losses = [
            make_plan(profile, max_bytes=budget, bits=bits).certificate.loss
            for bits in ((), (8,), (8, 4))
        ]
        assert losses == sorted(losses, reverse=True)
        assert losses[1] < losses[0]


def test_groups_and_shared_matrices_are_kept_whole() -> None:
    profile = with_rounding("pivoted")
    plan = make_plan(profile, max_bytes=profile.info.planned_bytes // 8, bits=BITS)
    assert any(entry.bits == 4 for entry in plan.layers)
    for entry in plan.layers:
        assert entry.bits is None or entry.rank is None or entry.rank % GROUP == 0
        assert entry.bits != 4 or entry.layer.in_features % GROUP == 0
    shown = str(plan)
    assert f"{sum(e.bits == 4 for e in plan.layers)} in 4 bits" in shown


def test_a_pin_decides_a_rank_and_not_its_bits() -> None:
    profile = with_rounding("pivoted")
    name = profile.info.layers[0].name
    budget = profile.info.planned_bytes // 6
    for pin in (32, "dense"):
        plan = make_plan(profile, max_bytes=budget, bits=BITS, pins={name: pin})  # type: ignore[dict-item]
        assert plan.layers[0].rank == (None if pin == "dense" else pin)
        assert plan.layers[0].bits is not None


def test_a_floor_holds_for_rounded_layers() -> None:
    profile = with_rounding("pivoted")
    budget = profile.info.planned_bytes // 4
    plan = make_plan(profile, max_bytes=budget, bits=BITS, min_retained=0.9)
    assert min(entry.retained for entry in plan.layers) >= 0.9 - 1e-12


def test_parameters_and_bytes_together() -> None:
    profile = with_rounding("pivoted")
    budget = profile.info.planned_bytes // 5
    plan = make_plan(profile, keep=0.7, max_bytes=budget, bits=BITS)
    assert plan.size.planned <= 0.7 * profile.info.planned_parameters
    assert plan.limits[0].spent <= budget


def test_mistakes_say_what_is_missing() -> None:
    profile = with_rounding("pivoted")
    budget = profile.info.planned_bytes // 4
    with pytest.raises(OptionError, match="bits need max_bytes"):
        make_plan(profile, keep=0.5, bits=BITS)
    with pytest.raises(OptionError, match="bits are 8 or 4"):
        make_plan(profile, max_bytes=budget, bits=(2,))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="objective total"):
        make_plan(profile, max_bytes=budget, bits=BITS, objective="layerwise")
    with pytest.raises(OptionError, match="--form pairs"):
        make_plan(profile, max_bytes=budget, bits=BITS, form="pairs")
    plain = synthetic_profile(SHAPES)
    with pytest.raises(ProfileError, match="--bits 8"):
        make_plan(plain, max_bytes=plain.info.planned_bytes // 2, bits=(8,))
    with pytest.raises(InfeasibleBudgetError, match="max_bytes"):
        make_plan(profile, max_bytes=10, bits=BITS)


def test_without_bits_nothing_is_rounded_and_files_say_nothing_of_it() -> None:
    profile = with_rounding("pivoted")
    info = profile.info.model_copy(update={"bits": ()})
    plain = dataclasses.replace(profile, info=info, rounding={})
    budget = profile.info.planned_bytes // 3
    ours = make_plan(profile, max_bytes=budget)
    theirs = make_plan(plain, max_bytes=budget)
    assert ours.ranks == theirs.ranks and ours.predicted == theirs.predicted
    assert '"bits"' not in ours.to_json()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bits": 2}, "bits"),
        ({"bits": None}, "model_bytes is"),
        ({"rank": 33}, "multiples of 32"),
    ],
)
def test_files_that_do_not_add_up_are_refused(change: dict[str, Any], says: str) -> None:
    profile = with_rounding("pivoted")
    plan = make_plan(profile, max_bytes=profile.info.planned_bytes // 8, bits=BITS)
    number = next(k for k, entry in enumerate(plan.layers) if entry.bits == 4)
    content = json.loads(plan.to_json())
    content["layers"][number].update(change)
    if "rank" in change:
        layer = plan.layers[number].layer
        content["layers"][number]["parameters"] = layer.cost(33, "pivoted")
    with pytest.raises(PlanError, match=says):
        Plan.from_json(json.dumps(content))


def test_profiles_with_rounding_are_saved_and_checked(tmp_path: Any) -> None:
    profile = with_rounding("pivoted")
    profile.save(tmp_path / "p.st")
    again = Profile.load(tmp_path / "p.st")
    assert again.info == profile.info and again.digest() == profile.digest()
    budget = profile.info.planned_bytes // 5
    assert (
        make_plan(again, max_bytes=budget, bits=BITS).layers
        == make_plan(profile, max_bytes=budget, bits=BITS).layers
    )
    name, (backend,) = profile.info.layers[0].name, profile.backends
    short: Any = {backend: {name: {8: np.zeros(1)}}}
    with pytest.raises(ProfileError, match=f"{name}: rounding to 8 bits"):
        dataclasses.replace(profile, rounding=short)


def test_bytes_of_layers_are_those_of_their_matrices() -> None:
    layer = synthetic_profile(((64, 96),)).info.layers[0]
    ranks = np.array([32, 64, DENSE])
    assert layer.bytes_of(ranks, "pairs", AS_IS).tolist() == [
        layer.itemsize * each for each in (32 * 160, 64 * 160, 64 * 96)
    ]
    assert layer.bytes_of(ranks, "pairs", 8).tolist() == [
        32 * 160 + 4 * (64 + 32),
        64 * 160 + 4 * (64 + 64),
        64 * 96 + 4 * 64,
    ]
    # Of 64 rows 32 are kept, and 32 are made of them.
    assert layer.bytes_of(ranks, "pivoted", 8)[0] == 32 * 96 + 32 * 32 + 4 * 64


def test_what_has_ranks_only_takes_no_bits() -> None:
    profile = with_rounding("pivoted")
    budget = profile.info.planned_bytes // 8
    plan = make_plan(profile, max_bytes=budget, bits=BITS)
    for kind in ("peft", "csv", "json"):
        with pytest.raises(OptionError, match="plan without bits"):
            export_ranks(plan, kind)
    row = ComparedPlan(Strategy("exact"), 0.5, plan, 0.0)
    with pytest.raises(OptionError, match="rounds layers"):
        measure_comparison(None, profile, [row], [])  # type: ignore[arg-type]
