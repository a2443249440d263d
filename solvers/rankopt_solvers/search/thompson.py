r"""A Bayesian linear model of a measured loss, and an Optuna sampler that draws from it.

The model. Choice i discards x_ig from group g (the loss of the option in the problem's tables) and
was measured to lose y_i. The tables say that what is discarded adds up; the measurement says how
much a unit of it matters in each group:

    y_i = d + s sum_g (1 + u_g) x_ig + e_i,     u ~ N(0, K),
    K_gh = 0.5 [kind_g = kind_h] + 0.4 exp(-(depth_g - depth_h)^2 / (2 0.3^2)) + 0.15 [g = h].

d is the loss of discarding nothing (measured, or unknown: a flat prior), s > 0 the common factor
from the tables' unit to the measured one. The noise e_i has the variance
``noise^2 + (0.3 (y_i - min y))^2``: far above the best choice the loss is not linear in what is
discarded (it saturates), so such measurements say less. s and noise maximise the marginal
likelihood on a grid.

The draw (Thompson 1933; Russo et al., A Tutorial on Thompson Sampling, 2018). u is drawn from its
posterior by Matheron's rule (Wilson et al., 2020, eq. 9): draw u and e from the prior, correct them
by the residual to what was measured. The weights 1 + u_g, kept positive, reweight the problem; the
exact solver then makes the choice that would be best if the draw were the truth. Draws shrink
towards the posterior mean in a cycle of three (1, 1/2, 0): a third of the trials exploits.
Proposals that repeat a measured choice widen the next draw.

numpy and, for the sampler, optuna. A module of its own because its base class is Optuna's.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from rankopt_solvers.table import FloatArray

#: Variances of what a kind, a depth and a single group add to the weight, relative to one.
KIND, DEPTH, OWN = 0.5, 0.4, 0.15
#: Groups at a distance of this share of the depth still resemble each other.
LENGTH = 0.3
#: Share of its distance to the best that a measurement is uncertain by.
NONLINEAR = 0.3
#: Weights stay in here: the solver needs positive ones, and no group is worth nothing.
LOWEST, HIGHEST = 0.05, 20.0
CYCLE = (1.0, 0.5, 0.0)

#: What was measured so far: discarded masses (n, G) and losses (n,).
Evidence = Callable[[], tuple[FloatArray, FloatArray]]


def prior(kinds: Sequence[str] | None, depths: Sequence[float] | None, groups: int) -> FloatArray:
    """K, shape ``(G, G)``; without kinds or depths their part of the variance is left out."""
    covariance = OWN * np.eye(groups)
    if kinds is not None:
        labels = np.array(list(kinds))
        covariance += KIND * (labels[:, None] == labels[None, :])
    if depths is not None:
        depth = np.array(list(depths), dtype=np.float64)
        covariance += DEPTH * np.exp(-0.5 * ((depth[:, None] - depth[None, :]) / LENGTH) ** 2)
    if kinds is None and depths is None:
        covariance += KIND * np.eye(groups)
    return covariance


def _likelihood(covariance: FloatArray, residual: FloatArray) -> float:
    """Log density of N(0, covariance) at the residual, without its constant."""
    lower = np.linalg.cholesky(covariance)
    white = np.linalg.solve(lower, residual)
    return float(-np.log(np.diag(lower)).sum() - 0.5 * white @ white)


def draw_weights(
    masses: FloatArray,
    losses: FloatArray,
    covariance: FloatArray,
    rng: np.random.Generator,
    *,
    origin: float | None = None,
    spread: float = 1.0,
) -> FloatArray:
    """One draw of the groups' weights 1 + u, clipped to [0.05, 20].

    Args:
        masses: discarded by each measured choice, shape ``(n, G)``.
        losses: measured, shape ``(n,)``, finite.
        covariance: K, shape ``(G, G)``.
        rng: numpy's generator.
        origin: the measured loss of discarding nothing, if known.
        spread: distance from the posterior mean: 1 is a Thompson draw, 0 the mean.
    """
    groups = covariance.shape[0]
    if origin is not None:
        masses = np.vstack([masses, np.zeros(groups)])
        losses = np.append(losses, origin)
    prior_u = np.linalg.cholesky(covariance) @ rng.standard_normal(groups)
    if losses.size < 2 or np.ptp(losses) == 0.0 or not masses.any():
        return np.clip(1.0 + spread * prior_u, LOWEST, HIGHEST)
    # In units of the largest mass and of the spread of the losses, so that grids are the same.
    unit, size = float(masses.sum(axis=1).max()), float(np.ptp(losses))
    masses, losses = masses / unit, losses / size
    total, between = masses.sum(axis=1), masses @ covariance @ masses.T
    measured = losses if origin is None else losses[:-1]
    floor = np.zeros_like(losses)
    floor[: measured.size] = (NONLINEAR * (measured - measured.min())) ** 2
    centre = float(losses.min()) if origin is None else float(losses[-1])
    residual = losses - centre
    flat = np.full_like(between, 10.0 if origin is None else 0.0)

    def marginal(s: float, noise: float) -> FloatArray:
        return np.asarray(s * s * between + flat + np.diag(floor + noise**2))

    grid = [(s, noise) for s in np.geomspace(0.01, 100.0, 25) for noise in (1e-4, 1e-3, 0.01, 0.1)]
    s, noise = max(grid, key=lambda p: _likelihood(marginal(*p), residual - p[0] * total))
    gain = s * covariance @ masses.T
    deviations = np.sqrt(floor + noise**2) * rng.standard_normal(losses.size)
    level = math.sqrt(float(flat[0, 0])) * float(rng.standard_normal())
    simulated = s * masses @ prior_u + deviations + level
    right = np.column_stack([residual - s * total, simulated])
    mean, correction = (gain @ np.linalg.solve(marginal(s, noise), right)).T
    drawn = prior_u - correction
    return np.asarray(np.clip(1.0 + mean + spread * drawn, LOWEST, HIGHEST))


class ThompsonSampler(BaseSampler):
    """Proposes the weight of every group; the caller solves the reweighted problem.

    The draw depends on the seed, the number of the trial and what was measured before, on nothing
    else: a resumed study goes on as if it had not been interrupted, except that the number of a
    trial that was cut off is not used again.

    Args:
        names: of the groups.
        evidence: called at every draw.
        kinds, depths: see the module; one for each group, or None.
        origin: the measured loss of discarding nothing, if known.
        seed: for the draws.
    """

    def __init__(
        self,
        names: Sequence[str],
        evidence: Evidence,
        *,
        kinds: Sequence[str] | None = None,
        depths: Sequence[float] | None = None,
        origin: float | None = None,
        seed: int = 0,
    ) -> None:
        self.names, self.evidence, self.origin, self.seed = tuple(names), evidence, origin, seed
        self.covariance = prior(kinds, depths, len(self.names))

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """One weight for each group."""
        space = FloatDistribution(LOWEST, HIGHEST, log=True)
        return {f"weight:{name}": space for name in self.names}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A draw from the posterior, by group."""
        masses, losses = self.evidence()
        trials = study.get_trials(deepcopy=False)[: trial.number]
        repeats = 0
        for earlier in reversed(trials):
            if "repeats" not in earlier.user_attrs:
                break
            repeats += 1
        spread = max(CYCLE[trial.number % len(CYCLE)], 0.25 if repeats else 0.0)
        rng = np.random.default_rng([self.seed, trial.number])
        weights = draw_weights(
            masses,
            losses,
            self.covariance,
            rng,
            origin=self.origin,
            spread=spread * 1.25 ** min(repeats, 12),
        )
        return {f"weight:{n}": float(w) for n, w in zip(self.names, weights, strict=True)}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """No parameter but the groups' weights can be drawn.

        Raises:
            ValueError: naming the parameter.
        """
        raise ValueError(
            f"ThompsonSampler draws the weights of its {len(self.names)} groups, not {param_name!r}"
        )
