"""The reduction from a profile to a problem, and its inverse.

    Profile, backend, scale, objective, rank multiple, form, budget  ->  Problem
    choice of options                                          ->  rank of every layer

Every layer, with the partners that are tied to it, is a group. Its options are the ranks of its
loss curve that save parameters in the form and are multiples of ``rank_multiple``, and dense.
Rounding happens here, in the list of options, never after solving. Nothing else knows both sides.
"""

import dataclasses
import math
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from rankopt.errors import OptionError
from rankopt.layers import BITS, DENSE, FORMS, Bits, FloatArray, Form, IntArray, Layer
from rankopt.plan.budget import whole_number
from rankopt.profile.profile import Profile
from rankopt_solvers import Group, Problem, within_level

#: ``total``: largest sum of retained Fisher information. ``layerwise``: largest sum of each
#: layer's retained share. ``maxmin``: largest smallest retained share.
Objective = Literal["total", "layerwise", "maxmin"]


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """All ranks on offer, with their costs and losses; budgets come later.

    Attributes:
        layers: the planned layers.
        ranks: the options of each layer; DENSE is the last.
        bits: of each layer and option, what its weights are rounded to, AS_IS the dtype they have;
            empty where all are left in it.
        groups: one group for each layer, with the same options.
        lost_shares: share of the layer's own energy that each option loses, between 0 and 1.
        full_losses: loss of retaining nothing, in the unit of ``total``.
        objective: what the losses mean.
        rank_multiple: of the ranks on offer.
        backend: whose losses they are.
        scale: how layers compare.
        unit: of the losses.
        form: how matrices of lower rank are kept, which decides what they cost.
        min_retained: share that every option retains, if that was asked for; of the layers that
            are not pinned.
        pinned: layers with one option, that somebody has decided.
    """

    layers: tuple[Layer, ...]
    ranks: tuple[IntArray, ...]
    groups: tuple[Group, ...]
    lost_shares: tuple[FloatArray, ...]
    full_losses: tuple[float, ...]
    objective: Objective
    rank_multiple: int
    backend: str
    scale: str
    unit: str
    form: Form = "pairs"
    min_retained: float | None = None
    pinned: tuple[str, ...] = ()
    bits: tuple[IntArray, ...] = ()

    def problem(self, budget: int) -> Problem:
        """The problem under a budget of parameters; what one prepares serves all."""
        return self._prepared.with_budget(budget)

    @cached_property
    def _prepared(self) -> Problem:
        problem = Problem(self.groups, 0, "max" if self.objective == "maxmin" else "sum")
        _ = problem.table
        return problem

    def fairness_problem(self, budget: int) -> Problem:
        """Minimise the largest lost share, whatever the objective: what ``threshold`` needs."""
        groups = tuple(
            Group(group.name, group.cost, lost)
            for group, lost in zip(self.groups, self.free_shares, strict=True)
        )
        return Problem(groups, budget, "max")

    @cached_property
    def free_shares(self) -> tuple[FloatArray, ...]:
        """The lost shares, where pinned layers lose nothing: what levels and floors look at."""
        named = set(self.pinned)
        return tuple(
            np.zeros_like(lost) if layer.name in named else lost
            for layer, lost in zip(self.layers, self.lost_shares, strict=True)
        )

    def with_floor(self, problem: Problem, share: float | None) -> "Allocation":
        """The options that retain a share of their layer's Fisher information.

        Args:
            problem: of these options, with one budget.
            share: None is the largest share that the budget allows to all layers.

        Raises:
            InfeasibleError: the budget does not reach the cheapest options.
        """
        level = None if share is None else 1.0 - share
        _, options, level = within_level(problem, level, self.free_shares)
        return dataclasses.replace(self.restricted(options), min_retained=1.0 - level)

    def restricted(self, kept: Sequence[IntArray]) -> "Allocation":
        """With some of the options: for each layer their places, at least one."""
        return dataclasses.replace(
            self,
            ranks=tuple(ranks[k] for ranks, k in zip(self.ranks, kept, strict=True)),
            groups=tuple(
                Group(group.name, group.cost[k], group.loss[k])
                for group, k in zip(self.groups, kept, strict=True)
            ),
            lost_shares=tuple(lost[k] for lost, k in zip(self.lost_shares, kept, strict=True)),
            bits=tuple(bits[k] for bits, k in zip(self.bits, kept, strict=bool(self.bits))),
        )

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

    def bits_of(self, choice: Sequence[int]) -> tuple[Bits | None, ...]:
        """What each layer is rounded to, None for its own dtype."""
        if not self.bits:
            return (None,) * len(self.layers)
        found = [int(bits[j]) for bits, j in zip(self.bits, choice, strict=True)]
        return tuple(next((each for each in BITS if each == bits), None) for bits in found)


#: One profile is planned many times. A copy of it is another profile: it may have other losses.
_TABULATED: "weakref.WeakKeyDictionary[Profile, dict[Any, Allocation]]" = (
    weakref.WeakKeyDictionary()
)


def allocation(
    profile: Profile,
    backend: str | None = None,
    scale: str | None = None,
    objective: Objective = "total",
    rank_multiple: int = 1,
    form: Form | None = None,
) -> Allocation:
    """Tabulate cost and loss of every rank of every layer.

    Args:
        profile: with loss curves of the backend.
        backend: whose curves the losses follow; by default the profile's first.
        scale: unit of the losses of the ``total`` objective, one of the backend's; by default its
            first.
        objective: the other two objectives lose shares, which have no unit.
        rank_multiple: ranks on offer are multiples of it.
        form: ``pairs`` or ``pivoted``; by default the profile's.

    Raises:
        OptionError: unknown objective, scale or form, a form that the profile does not reach, a
            multiple below 1, or one that leaves no layer any rank.
        ProfileError: the profile lacks the backend.
    """
    if objective not in get_args(Objective):
        known = ", ".join(get_args(Objective))
        raise OptionError(f"unknown objective {objective!r}; known: {known}")
    measured = profile.backend(backend)
    multiple = whole_number("rank_multiple", rank_multiple, OptionError)
    form = _form_of(profile, form)
    key = (measured.name, measured.find_scale(scale).name, objective, multiple, form)
    tabulated = _TABULATED.setdefault(profile, {})
    if key not in tabulated:
        tabulated[key] = _tabulate(profile, *key)
    return tabulated[key]


def _form_of(profile: Profile, form: Form | None) -> Form:
    if form is None:
        return profile.info.form
    if form not in FORMS:
        raise OptionError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    if form == "pivoted" and profile.info.form == "pairs":
        raise OptionError(
            "the profile was made for pairs of factors, and what it keeps does not reach to all "
            "ranks that save parameters in the form pivoted: profile again with form pivoted"
        )
    return form


def _tabulate(
    profile: Profile,
    backend: str,
    scale: str,
    objective: Objective,
    rank_multiple: int,
    form: Form,
) -> Allocation:
    compared = profile.backend(backend).find_scale(scale)
    factors = compared.factors
    ranks, groups, shares, full = [], [], [], []
    for layer, factor in zip(profile.info.layers, factors, strict=True):
        curve = profile.loss_curve(backend, layer.name, scale)
        offered = curve.offered(layer, rank_multiple, form)
        lost = curve.at(offered)
        # A layer without any Fisher information loses nothing at any rank.
        lost_share = lost / curve.full if curve.full > 0 else np.zeros_like(lost)
        cost = layer.costs(offered, form)
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
        layers=profile.info.layers,
        ranks=tuple(ranks),
        groups=tuple(groups),
        lost_shares=tuple(shares),
        full_losses=tuple(full),
        objective=objective,
        rank_multiple=rank_multiple,
        backend=backend,
        scale=scale,
        unit=compared.unit if objective == "total" else "lost share of a layer's Fisher",
        form=form,
    )
