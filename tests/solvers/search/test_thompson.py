"""The linear model conditions as Gaussians do, and the sampler is one of Optuna's."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("optuna")

import optuna

from rankopt_solvers.search.thompson import (
    HIGHEST,
    LOWEST,
    ThompsonSampler,
    draw_weights,
    prior,
)

KINDS = ["a", "b", "c"] * 5
DEPTHS = [layer / 4 for layer in range(5) for _ in range(3)]


def measured(seed: int, count: int, noise: float = 0.0) -> tuple[Any, Any, Any]:
    """Masses, losses, and the true weights, drawn from the prior."""
    rng = np.random.default_rng(seed)
    covariance = 0.1 * prior(KINDS, DEPTHS, 15)
    weights = 1.0 + np.linalg.cholesky(covariance) @ rng.standard_normal(15)
    masses = rng.gamma(1.0, 1.0, (count, 15))
    return masses, 3.0 + 0.5 * masses @ weights + noise * rng.standard_normal(count), weights


def test_prior_is_positive_definite_and_says_who_is_alike() -> None:
    covariance = prior(KINDS, DEPTHS, 15)
    assert np.linalg.eigvalsh(covariance).min() >= 0.15 - 1e-9
    assert covariance[0, 3] > covariance[0, 4]  # the same kind against another, one layer on
    assert covariance[0, 1] > covariance[0, 13] > 0.0  # the same layer against the last
    assert np.diag(covariance) == pytest.approx(0.5 + 0.4 + 0.15)
    assert np.count_nonzero(prior(None, None, 15)) == 15


def test_many_measurements_of_a_linear_loss_give_the_true_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rankopt_solvers.search.thompson.NONLINEAR", 0.0)
    masses, losses, weights = measured(0, 60)
    for origin in (None, 3.0):
        found = draw_weights(
            masses, losses, prior(KINDS, DEPTHS, 15), np.random.default_rng(0), origin=origin
        )
        # Only ratios matter to the solver: the common factor is the model's s.
        assert np.corrcoef(found, weights)[0, 1] > 0.97
        assert found / found.mean() == pytest.approx(weights / weights.mean(), abs=0.15)


@pytest.mark.slow
def test_draws_scatter_about_the_posterior_mean_and_less_with_more_evidence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rankopt_solvers.search.thompson.NONLINEAR", 0.03)
    masses, losses, _ = measured(1, 40, noise=0.01)
    covariance = 0.05 * prior(KINDS, DEPTHS, 15)  # so small that no draw is clipped

    def draws(count: int) -> np.ndarray:
        return np.array(
            [
                draw_weights(masses[:count], losses[:count], covariance, np.random.default_rng(s))
                for s in range(200)
            ]
        )

    few, many = draws(4), draws(40)
    mean = draw_weights(masses, losses, covariance, np.random.default_rng(0), spread=0.0)
    error = many.std(axis=0) / np.sqrt(200)
    assert (np.abs(many.mean(axis=0) - mean) < 5 * error + 1e-9).all()
    assert many.std(axis=0).mean() < 0.5 * few.std(axis=0).mean()
    prior_spread = np.sqrt(np.diag(covariance))
    assert (few.std(axis=0) < 1.15 * prior_spread).all()


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_units_of_masses_and_losses_do_not_matter(factor: float) -> None:
    masses, losses, _ = measured(2, 12)
    covariance = prior(KINDS, DEPTHS, 15)
    plain = draw_weights(masses, losses, covariance, np.random.default_rng(3))
    other = draw_weights(factor * masses, losses, covariance, np.random.default_rng(3))
    moved = draw_weights(masses, 5.0 + 1e3 * losses, covariance, np.random.default_rng(3))
    assert other == pytest.approx(plain, rel=1e-6) and moved == pytest.approx(plain, rel=1e-4)


def test_without_evidence_it_is_the_prior_and_weights_stay_positive() -> None:
    covariance = prior(None, None, 15)
    for masses, losses in (
        (np.zeros((0, 15)), np.zeros(0)),
        (np.ones((3, 15)), np.ones(3)),
        (np.zeros((3, 15)), np.arange(3.0)),
    ):
        found = [
            draw_weights(masses, losses, covariance, np.random.default_rng(s), spread=9.0)
            for s in range(20)
        ]
        assert np.min(found) == LOWEST and np.max(found) <= HIGHEST


def test_sampler_serves_a_study_of_optunas_and_knows_only_its_groups() -> None:
    masses, losses, _ = measured(3, 6)
    sampler = ThompsonSampler(["x", "y"], lambda: (masses[:, :2], losses), seed=4)
    drawn = []
    for _ in range(2):
        study = optuna.create_study(sampler=sampler)
        for _ in range(3):
            trial = study.ask()
            drawn.append(
                [trial.suggest_float(f"weight:{g}", LOWEST, HIGHEST, log=True) for g in "xy"]
            )
            study.tell(trial, sum(drawn[-1]))
    assert drawn[:3] == drawn[3:]  # by seed and number alone
    assert len({tuple(pair) for pair in drawn[:2]}) == 2
    with pytest.raises(ValueError, match="weights of its 2 groups, not 'z'"):
        study.ask().suggest_float("z", 0.0, 1.0)
