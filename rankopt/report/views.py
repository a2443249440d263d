"""Views: the losses of a profile as one backend and one scale see them, thinned for drawing.

A curve of thousands of points is drawn with dozens. They are chosen at equal distances along the
curve as it is seen, with a logarithmic loss: with t_i = (rank_i - rank_0) / range and
s_i = log loss_i / range of it, the length up to point i is the sum of |dt| + |ds|, and points are
taken at equal steps of it. Steep parts and flat ones are both followed, and the ends stay.

The frontier is the sweep of ``rankopt_solvers.frontier`` over all budgets, in share of the planned
layers' parameters. Its points are vertices of the linear relaxation, so that no plan in the same
form lies below them: what a plan is above the curve is its distance to the best.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rankopt.errors import OptionError, ProfileError
from rankopt.layers import FloatArray, Form, IntArray
from rankopt.plan.allocation import allocation
from rankopt.profile.profile import Profile
from rankopt_solvers import frontier

#: Points of a frontier.
FRONTIER_POINTS = 200
#: Points of a layer's curve: as many as all curves together leave it.
CURVE_POINTS = 60
FEWEST_POINTS = 10
ALL_POINTS = 60_000
#: Losses below this share of the largest are rounding, or nothing that can be told from zero.
FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class View:
    """Whose losses are looked at.

    Attributes:
        backend: of the profile.
        scale: one of its scales.
        unit: of the losses.
    """

    backend: str
    scale: str
    unit: str

    @property
    def name(self) -> str:
        """As a reader chooses it."""
        return f"{self.backend}, scale {self.scale}"

    def lost(self, profile: Profile, ranks: Sequence[int | None]) -> list[float] | None:
        """What each layer loses at its rank; None where a rank was not measured.

        Args:
            profile: that the view is of.
            ranks: of each of its layers, None for dense.
        """
        factors = profile.backend(self.backend).find_scale(self.scale).factors
        try:
            return [
                factor * profile.loss_curve(self.backend, layer.name, self.scale).lost(rank)
                for layer, factor, rank in zip(profile.info.layers, factors, ranks, strict=True)
            ]
        except ProfileError:
            return None


def views_of(profile: Profile, asked: Iterable[tuple[str, str]]) -> list[View]:
    """The views that a report has: those of its plans, then of all other backends.

    Args:
        profile: what was measured.
        asked: backend and scale of each plan.
    """
    defaults = [(backend.name, backend.scales[0].name) for backend in profile.info.backends]
    seen: dict[tuple[str, str], View] = {}
    for backend, scale in (*asked, *defaults):
        found = profile.backend(backend).find_scale(scale)
        seen.setdefault((backend, scale), View(backend, scale, found.unit))
    return list(seen.values())


def curves_of(profile: Profile, views: Sequence[View]) -> list[list[dict[str, Any]]]:
    """The loss curve of every layer in every view.

    Returns:
        For each view and layer ``rank`` and ``loss``, lists of as many points; empty for a layer
        that loses nothing at any rank.
    """
    each = ALL_POINTS // max(len(views) * len(profile.info.layers), 1)
    points = min(max(each, FEWEST_POINTS), CURVE_POINTS)
    found = []
    for view in views:
        factors = profile.backend(view.backend).find_scale(view.scale).factors
        curves = []
        for layer, factor in zip(profile.info.layers, factors, strict=True):
            curve = profile.loss_curve(view.backend, layer.name, view.scale)
            losses = curve.losses * factor
            shown = np.flatnonzero(losses > losses[0] * FLOOR)
            ranks, losses = curve.ranks[shown], losses[shown]
            kept = thinned(ranks.astype(np.float64), losses, points)
            curves.append({"rank": ranks[kept].tolist(), "loss": rounded(losses[kept])})
        found.append(curves)
    return found


def frontiers_of(profile: Profile, view: View, forms: Iterable[Form]) -> list[dict[str, Any]]:
    """The least loss at every budget, a list of points.

    Args:
        profile: what was measured.
        view: whose losses.
        forms: of low ranks; those that the profile does not reach have no curve.

    Returns:
        ``form``, ``share`` of the planned layers' parameters, and ``loss`` of each point.
    """
    rows = []
    for form in forms:
        try:
            offered = allocation(profile, view.backend, view.scale, form=form)
        except OptionError:
            continue
        swept = frontier(offered.problem(0))
        shown = np.flatnonzero(swept.loss > swept.loss[0] * FLOOR)
        shares = swept.cost[shown] / profile.info.planned_parameters
        losses = swept.loss[shown]
        kept = thinned(shares, losses, FRONTIER_POINTS)
        rows += [
            {"form": form, "share": share, "loss": loss}
            for share, loss in zip(rounded(shares[kept], 6), rounded(losses[kept]), strict=True)
        ]
    return rows


def thinned(x: FloatArray, y: FloatArray, count: int) -> IntArray:
    """Places of at most ``count`` points of a curve, the ends among them; see the module's text.

    Args:
        x: increasing, ``(n,)``.
        y: above zero, ``(n,)``.
        count: two or more.
    """
    if x.size <= count:
        return np.arange(x.size, dtype=np.int64)
    along = np.zeros(x.size)
    for values in (x, np.log(y)):
        steps = np.abs(np.diff(values))
        along[1:] += np.cumsum(steps) / (steps.sum() or 1.0)
    places: IntArray = np.unique(np.searchsorted(along, np.linspace(0.0, along[-1], count)))
    return np.minimum(places, x.size - 1)


def rounded(values: Iterable[float] | FloatArray, digits: int = 4) -> list[float]:
    """The values with as many digits as can be seen, which is most of a report's size."""
    return [float(f"{value:.{digits}g}") for value in values]


def total(lost: Sequence[float] | None) -> float | None:
    """Loss of all layers together; None of what was not measured."""
    return None if lost is None else math.fsum(lost)
