"""Lines of a comparison: means over calibrations, intervals, stability, predictions."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from rankopt.errors import ResultsError
from rankopt.plan.compare import Strategy, compare
from rankopt.profile.profile import Profile
from rankopt.results import (
    Line,
    Measured,
    MeasuredPlan,
    Results,
    compared_with,
    increase_name,
    increases,
    prediction,
    summarise,
)
from rankopt.results.correlation import Correlation
from rankopt.results.results import calibration_of
from tests.synthetic import synthetic_profile

stats = pytest.importorskip("scipy.stats")
STRATEGIES = tuple(map(Strategy.parse, ("uniform", "exact", "exact/layerwise")))


def resampled(count: int) -> list[Profile]:
    """Profiles of one model on other samples: each layer's losses grow by a share of their own."""
    made, found = synthetic_profile(), []
    for seed in range(count):
        shares = 10.0 ** np.random.default_rng(seed).uniform(-1.0, 1.0, len(made.info.layers))
        curves = {
            backend: {
                name: dataclasses.replace(curve, losses=curve.losses * share)
                for (name, curve), share in zip(of.items(), shares, strict=True)
            }
            for backend, of in made.curves.items()
        }
        found.append(dataclasses.replace(made, curves=curves))
    return found


def results(count: int = 3, keeps: tuple[float, ...] = (0.7, 0.5), **changes: Any) -> Results:
    """Every plan loses what it spares, and a little that differs between examples."""
    profiles = resampled(count)
    generator, plans = np.random.default_rng(0), []
    base = generator.normal(3.0, 1.0, 30)
    for profile in profiles:
        for row in compare(profile, keeps, STRATEGIES):
            plain = MeasuredPlan.of(row)
            more = (1 - row.keep) + 0.2 * (row.strategy.solver == "uniform")
            losses = base + more + generator.normal(0.0, 0.02, 30)
            plans.append(plain.model_copy(update={"measured": measured(losses), **changes}))
    return Results(
        rankopt="0",
        architecture="A",
        fingerprint="f",
        task="causal-lm",
        data="d",
        layers=profiles[0].info.layers,
        calibrations=tuple(calibration_of(each, f"p{n}") for n, each in enumerate(profiles)),
        dense=measured(base),
        plans=tuple(plans),
    )


def measured(losses: Any) -> Measured:
    return Measured(
        loss=float(np.mean(losses)),
        metrics={"perplexity": float(np.exp(np.mean(losses)))},
        examples=len(losses),
        targets=len(losses),
        example_losses=tuple(map(float, losses)),
        example_targets=(1,) * len(losses),
    )


def test_a_line_is_the_mean_over_calibrations_with_students_interval() -> None:
    found = results()
    lines = summarise(found)
    assert [(line.keep, line.strategy) for line in lines] == [
        (keep, str(strategy)) for keep in (0.7, 0.5) for strategy in STRATEGIES
    ]
    for line in lines:
        losses = [each.loss for each in line.measured]
        assert len(losses) == 3 and line.loss == pytest.approx(np.mean(losses))
        low, high = stats.t.interval(0.95, 2, np.mean(losses), stats.sem(losses))
        assert line.half_width == pytest.approx((high - low) / 2)
        spent = [row.size.planned / row.size.planned_dense for row in line.plans]
        assert line.kept == pytest.approx(np.mean(spent))
    (single, *_) = summarise(results(1))
    assert single.half_width is None and single.stability is None


def test_stability_is_the_correlation_of_what_layers_keep() -> None:
    found = results()
    line = next(x for x in summarise(found) if (x.strategy, x.keep) == ("exact", 0.5))
    dense = [layer.dense_cost for layer in found.layers]
    kept = [
        [x.cost(r, row.form) / d for x, r, d in zip(found.layers, row.ranks, dense, strict=True)]
        for row in line.plans
    ]
    pairs = [(0, 1), (0, 2), (1, 2)]
    wanted = np.mean([stats.spearmanr(kept[i], kept[j]).statistic for i, j in pairs])
    assert line.stability == pytest.approx(wanted)
    assert -1.0 <= line.stability < 1.0


def test_comparisons_are_at_the_same_budget_and_corrected_together() -> None:
    lines = summarise(results(), "exact")
    assert [line.against is None for line in lines] == [False, True, False] * 2
    for line in lines:
        if line.strategy == "uniform":
            assert line.against is not None
            assert line.against.mean == pytest.approx(0.2, abs=0.02)
            assert line.against.low < line.against.mean < line.against.high < 0.22
            assert line.against.low > 0.18
            # Four comparisons: the smallest p there can be, four times.
            assert line.against.corrected == pytest.approx(4 * line.against.p)
    with pytest.raises(ResultsError, match="no strategy 'greedy' to compare with; measured: unif"):
        compared_with(lines, "greedy")


def test_a_strategy_that_only_some_calibrations_have_is_compared_on_those() -> None:
    whole = results()
    digests = [each.digest for each in whole.calibrations]
    fewer = tuple(
        row for row in whole.plans if row.strategy != "uniform" or row.calibration == digests[1]
    )
    lines = summarise(whole.model_copy(update={"plans": fewer}), "exact")
    uniform = next(line for line in lines if line.strategy == "uniform")
    exact = next(line for line in lines if line.strategy == "exact")
    assert uniform.against is not None and len(uniform.plans) == 1
    (this,), those = uniform.measured, exact.measured
    assert this.loss is not None and those[1].loss is not None
    assert uniform.against.mean == pytest.approx(this.loss - those[1].loss)


def test_plans_that_were_not_measured_are_left_out() -> None:
    found = results()
    bare = tuple(row.model_copy(update={"measured": None}) for row in found.plans[:3])
    lines = summarise(found.model_copy(update={"plans": (*bare, *found.plans[3:])}))
    assert {len(line.plans) for line in lines} == {2, 3}


def test_predictions_are_correlated_for_each_backend() -> None:
    found = results(1)
    dense = found.dense.loss
    assert dense is not None
    bare = tuple(row.model_copy(update={"predicted": None}) for row in found.plans)
    assert prediction(summarise(found.model_copy(update={"plans": bare})), dense) == {}
    falling = tuple(
        row.model_copy(update={"predicted": 9.0 - (row.measured.loss or 0.0)})
        for row in found.plans
        if row.measured is not None
    )
    turned = prediction(summarise(found.model_copy(update={"plans": falling})), dense)
    assert turned == {"fwsvd": Correlation(*[pytest.approx(-1.0)] * 3, 6)}
    told = tuple(
        row.model_copy(update={"predicted": (row.measured.loss or 0.0) ** 3})
        for row in found.plans
        if row.measured is not None
    )
    lines = summarise(found.model_copy(update={"plans": told}))
    assert prediction(lines, dense) == {"fwsvd": Correlation(*[pytest.approx(1.0)] * 3, 6)}
    assert prediction(lines[:2], dense) == {}


def test_what_is_predicted_is_the_divergence_where_all_have_one() -> None:
    """Here it rises where the loss falls, as of a model that is too sure of itself."""
    found = results(1)
    dense = found.dense.loss
    assert dense is not None

    def with_divergence(which: slice) -> list[Line]:
        plans = list(found.plans)
        for place in range(len(plans))[which]:
            row = plans[place]
            assert row.measured is not None and row.measured.loss is not None
            value = {"divergence": 9.0 - row.measured.loss}
            changed = row.measured.model_copy(update={"metrics": value})
            plans[place] = row.model_copy(update={"measured": changed})
        plans = [row.model_copy(update={"predicted": row.keep + k}) for k, row in enumerate(plans)]
        return summarise(found.model_copy(update={"plans": tuple(plans)}))

    some, all_of_them = with_divergence(slice(1, None)), with_divergence(slice(None))
    assert increases(some, dense) == [line.loss - dense for line in some if line.loss is not None]
    assert increase_name(some) == "increase over dense"
    assert increases(all_of_them, dense) == [9.0 - (line.loss or 0.0) for line in all_of_them]
    assert increase_name(all_of_them) == "divergence from dense"
    (ours,) = prediction(all_of_them, dense).values()
    (by_loss,) = prediction(some, dense).values()
    assert ours.rho == pytest.approx(-by_loss.rho)
    # One that is not finite has neither, and does not turn the others back.
    broken = Measured(loss=None, metrics={"accuracy": None}, examples=30, targets=30)
    first = all_of_them[0].plans[0].model_copy(update={"measured": broken})
    plans = (first, *(row for line in all_of_them[1:] for row in line.plans))
    lines = summarise(found.model_copy(update={"plans": plans}))
    assert increases(lines, dense)[0] is None and None not in increases(lines, dense)[1:]
    assert increase_name(lines) == "divergence from dense"


def test_a_loss_that_is_not_finite_has_no_mean() -> None:
    found = results()
    broken = Measured(loss=None, metrics={"perplexity": None}, examples=30, targets=30)
    plans = (found.plans[0].model_copy(update={"measured": broken}), *found.plans[1:])
    line = summarise(found.model_copy(update={"plans": plans}), "exact")[0]
    assert line.loss is None and line.half_width is None
    assert line.metrics == {"perplexity": None} and line.against is None
