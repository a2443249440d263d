"""Bits beside ranks: what rounding weights to 8 or 4 bits saves in bytes, and what it loses.

Each option of a layer, a rank or dense, is on offer with its weights rounded, too, where that was
measured. What it loses is the sum of two second-order estimates, of truncation and of rounding.
Both say too little where much is lost, and alike: scaled by what was measured of each, plans got no
better (experiments/LOG.md).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rankopt.errors import OptionError, ProfileError
from rankopt.layers import AS_IS, BITS, DENSE, GROUP, Bits, FloatArray, IntArray, Layer
from rankopt.plan.allocation import Allocation
from rankopt.profile.profile import Profile
from rankopt_solvers import Group


def with_bits(offered: Allocation, profile: Profile, bits: Sequence[Bits]) -> Allocation:
    """What is on offer, and each option that can be rounded, rounded to each of the bits.

    Args:
        offered: ranks, of the objective ``total``, in nats.
        profile: that they are of.
        bits: 8, 4.

    Raises:
        OptionError: other bits, another objective, scale or form than losses of rounding are of.
        ProfileError: the profile has no such losses.
    """
    _require_comparable(offered, profile, bits)
    ranks, groups, lost_shares, widths = [], [], [], []
    for layer, own, group, lost, whole in zip(
        offered.layers,
        offered.ranks,
        offered.groups,
        offered.lost_shares,
        offered.full_losses,
        strict=True,
    ):
        places, losses = [np.arange(own.size)], [group.loss]
        kinds = [np.full(own.size, AS_IS, dtype=np.int64)]
        measured = profile.rounding_of(offered.backend, layer.name)
        for width in (each for each in BITS if each in bits and each in measured):
            kept = np.flatnonzero(_whole(own))
            more = _between(layer, own[kept], measured[width], offered)
            # The last option stays the dense one as it is.
            places.insert(0, kept)
            losses.insert(0, group.loss[kept] + more)
            kinds.insert(0, np.full(kept.size, width, dtype=np.int64))
        at = np.concatenate(places)
        ranks.append(own[at])
        widths.append(np.concatenate(kinds))
        loss = np.concatenate(losses)
        groups.append(Group(group.name, group.cost[at], loss))
        more = (loss - group.loss[at]) / (whole or 1.0)
        lost_shares.append(np.minimum(lost[at] + more, 1.0))
    return dataclasses.replace(
        offered,
        ranks=tuple(ranks),
        groups=tuple(groups),
        lost_shares=tuple(lost_shares),
        bits=tuple(widths),
    )


def _whole(ranks: IntArray) -> IntArray:
    """Which may be rounded: whole groups, or dense."""
    return np.asarray((ranks == DENSE) | (ranks % GROUP == 0))


def _between(layer: Layer, ranks: IntArray, lost: FloatArray, offered: Allocation) -> FloatArray:
    """Losses of rounding at some ranks, from those at which it was measured."""
    at = layer.rounded_ranks(offered.form)
    low = at != DENSE
    between = np.interp(ranks, at[low], lost[low]) if low.any() else np.zeros(ranks.size)
    return np.where(ranks == DENSE, lost[-1], between)


def _require_comparable(offered: Allocation, profile: Profile, bits: Sequence[Bits]) -> None:
    unknown = [each for each in bits if each not in BITS]
    if unknown or not bits:
        known = " or ".join(map(str, BITS))
        raise OptionError(f"bits are {known}, or both, not {list(bits)}")
    if offered.objective != "total" or not offered.unit.startswith("nats"):
        raise OptionError(
            "bits compare what truncation and rounding lose in nats: they take the objective total "
            f"and a scale in nats, not {offered.objective} and {offered.scale}"
        )
    missing = [each for each in bits if each not in profile.info.bits]
    if missing or not profile.rounding.get(offered.backend):
        named = " ".join(map(str, bits))
        raise ProfileError(
            f"the profile has no losses of rounding to {missing[0] if missing else bits[0]} bits "
            f"with backend {offered.backend}: profile again with --bits {named}"
        )
    if offered.form != profile.info.form:
        raise OptionError(
            f"losses of rounding are of the form {profile.info.form}, not {offered.form}: profile "
            f"again with --form {offered.form}"
        )
