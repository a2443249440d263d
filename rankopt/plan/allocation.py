"""The reduction from a profile to a problem, and its inverse.

    Profile, backend, scale, objective, rank multiple, budget  ->  Problem
    choice of options                                          ->  rank of every layer

Every layer, with the partners that are tied to it, is a group. Its options are the ranks of its
loss curve that save parameters and are multiples of ``rank_multiple``, and dense. Rounding happens
here, in the list of options, never after solving. Nothing else knows both sides.
"""

import dataclasses
import math
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from rankopt.errors import OptionError
from rankopt.layers import DENSE, FloatArray, IntArray, Layer
from rankopt.plan.budget import whole_number
from rankopt.profile.profile import Profile
from rankopt_solvers import Group, Problem

#: ``total``: largest sum of retained Fisher information. ``layerwise``: largest sum of each
#: layer's retained share. ``maxmin``: largest smallest retained share.
Objective = Literal["total", "layerwise", "maxmin"]


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """All ranks on offer, with their costs and losses; budgets come later.

    Attributes:
        layers: the planned layers.
        ranks: the options of each layer; DENSE is the last.
        groups: one group for each layer, with the same options.
        lost_shares: share of the layer's own energy that each option loses, between 0 and 1.
        full_losses: loss of retaining nothing, in the unit of ``total``.
        objective: what the losses mean.
        rank_multiple: of the ranks on offer.
    """

    layers: tuple[Layer, ...]
    ranks: tuple[IntArray, ...]
    groups: tuple[Group, ...]
    lost_shares: tuple[FloatArray, ...]
    full_losses: tuple[float, ...]
    objective: Objective
    rank_multiple: int

    def problem(self, budget: int) -> Problem:
        """The problem under a budget of parameters; what one prepares serves all."""
        return self._prepared.with_budget(budget)

    @cached_property
    def _prepared(self) -> Problem:
        problem = Problem(self.groups, 0, "max" if self.objective == "maxmin" else "sum")
        # The level of a maxmin needs the table only; every bound of a sum needs the hulls too.
        _ = problem.table if problem.objective == "max" else problem.hulls
        return problem

    def fairness_problem(self, budget: int) -> Problem:
        """Minimise the largest lost share, whatever the objective: what ``threshold`` needs."""
        groups = tuple(
            Group(group.name, group.cost, lost)
            for group, lost in zip(self.groups, self.lost_shares, strict=True)
        )
        return Problem(groups, budget, "max")

    def retained_total(self, choice: Sequence[int]) -> float:
        """Retained share of the Fisher information of all layers together, in [0, 1]."""
        full = math.fsum(self.full_losses)
        lost = [
            f * x[j] for f, x, j in zip(self.full_losses, self.lost_shares, choice, strict=True)
        ]
        return 1.0 - math.fsum(lost) / full if full > 0 else 1.0

    def retained(self, choice: Sequence[int]) -> tuple[float, ...]:
        """Retained share of each layer's own Fisher information."""
        return tuple(1.0 - float(x[j]) for x, j in zip(self.lost_shares, choice, strict=True))

    def ranks_of(self, choice: Sequence[int]) -> tuple[int | None, ...]:
        """The inverse: rank of each layer, None for dense."""
        found = [int(r[j]) for r, j in zip(self.ranks, choice, strict=True)]
        return tuple(None if rank == DENSE else rank for rank in found)


#: One profile is planned many times. A copy of it is another profile: it may have other losses.
_TABULATED: "weakref.WeakKeyDictionary[Profile, dict[Any, Allocation]]" = (
    weakref.WeakKeyDictionary()
)


def allocation(
    profile: Profile, backend: str, scale: str, objective: Objective, rank_multiple: int
) -> Allocation:
    """Tabulate cost and loss of every rank of every layer.

    Args:
        profile: with loss curves of the backend.
        backend: whose curves the losses follow.
        scale: unit of the losses of the ``total`` objective, one of the backend's.
        objective: the other two objectives lose shares, which have no unit.
        rank_multiple: ranks on offer are multiples of it.

    Raises:
        OptionError: unknown objective or scale, a multiple below 1, or one that leaves no layer any
            rank.
        ProfileError: the profile lacks the backend.
    """
    if objective not in get_args(Objective):
        known = ", ".join(get_args(Objective))
        raise OptionError(f"unknown objective {objective!r}; known: {known}")
    key = (backend, scale, objective, whole_number("rank_multiple", rank_multiple, OptionError))
    tabulated = _TABULATED.setdefault(profile, {})
    if key not in tabulated:
        tabulated[key] = _tabulate(profile, *key)
    return tabulated[key]


def _tabulate(
    profile: Profile, backend: str, scale: str, objective: Objective, rank_multiple: int
) -> Allocation:
    factors = profile.backend(backend).find_scale(scale).factors
    ranks, groups, shares, full = [], [], [], []
    for layer, factor in zip(profile.info.layers, factors, strict=True):
        curve = profile.loss_curve(backend, layer.name)
        offered = curve.offered(layer, rank_multiple)
        lost = curve.at(offered)
        # A layer without any Fisher information loses nothing at any rank.
        lost_share = lost / curve.full if curve.full > 0 else np.zeros_like(lost)
        cost = np.where(offered == DENSE, layer.dense_cost, offered * layer.rank_cost)
        loss = lost * factor if objective == "total" else lost_share
        # Read-only arrays are not copied again.
        cost.flags.writeable = loss.flags.writeable = False
        ranks.append(offered)
        groups.append(Group(layer.name, cost, loss))
        shares.append(lost_share)
        full.append(curve.full * factor)
    if all(offered.size == 1 for offered in ranks):
        raise OptionError(
            f"no layer can be given a rank: of the ranks that {backend} was measured at and that "
            f"save parameters, none is a multiple of rank_multiple={rank_multiple}"
        )
    return Allocation(
        profile.info.layers,
        tuple(ranks),
        tuple(groups),
        tuple(shares),
        tuple(full),
        objective,
        rank_multiple,
    )
