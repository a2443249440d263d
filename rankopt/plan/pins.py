"""Pins: ranks that a person has decided. The rest is optimal for them."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from rankopt.errors import OptionError
from rankopt.layers import DENSE, Layer
from rankopt.plan.allocation import Allocation
from rankopt_solvers import Group

#: Glob of layer names -> rank, or ``dense``.
Pins = Mapping[str, int | Literal["dense"]]


def pinned(offered: Allocation, pins: Pins) -> Allocation:
    """What is on offer where the pinned layers have one option each.

    A pinned layer has no part in what is shared out: where the largest loss or a floor counts, its
    own does not.

    Args:
        offered: all options.
        pins: of several that name a layer, the last decides.

    Raises:
        OptionError: a glob that names no planned layer, no rank, or one that is not on offer.
    """
    chosen = _chosen(offered.layers, pins)
    if not chosen:
        return offered
    ranks, groups, shares = list(offered.ranks), list(offered.groups), list(offered.lost_shares)
    for index, (pattern, rank) in chosen.items():
        kept = [_option(offered, index, pattern, rank)]
        group = groups[index]
        loss = group.loss[kept] if offered.objective != "maxmin" else np.zeros(1)
        ranks[index], shares[index] = ranks[index][kept], shares[index][kept]
        groups[index] = Group(group.name, group.cost[kept], loss)
    return dataclasses.replace(
        offered,
        ranks=tuple(ranks),
        groups=tuple(groups),
        lost_shares=tuple(shares),
        pinned=tuple(offered.layers[index].name for index in sorted(chosen)),
    )


def _chosen(layers: Sequence[Layer], pins: Pins) -> dict[int, tuple[str, int]]:
    """Place of a layer -> the pin that decides, and its rank."""
    found: dict[int, tuple[str, int]] = {}
    places = {name: index for index, layer in enumerate(layers) for name in layer.members}
    for pattern, wanted in pins.items():
        whole = isinstance(wanted, int | np.integer) and not isinstance(wanted, bool)
        if wanted != "dense" and not (whole and int(wanted) >= 1):
            raise OptionError(f"pin {pattern!r}: a rank of 1 or more, or dense, not {wanted!r}")
        # A name is itself: of thousands of pins none is compared with every layer.
        hits = [places[pattern]] if pattern in places else _matching(layers, pattern)
        if not hits:
            raise OptionError(
                f"pin {pattern!r} names no planned layer; the first is {layers[0].name}"
            )
        rank = DENSE if wanted == "dense" else int(wanted)
        found |= dict.fromkeys(hits, (pattern, rank))
    return found


def _matching(layers: Sequence[Layer], pattern: str) -> list[int]:
    """Places of the layers that a glob names."""
    return [
        index
        for index, layer in enumerate(layers)
        if any(fnmatch.fnmatchcase(name, pattern) for name in layer.members)
    ]


def _option(offered: Allocation, index: int, pattern: str, rank: int) -> int:
    layer, ranks = offered.layers[index], offered.ranks[index]
    hits = np.flatnonzero(ranks == rank)
    if hits.size:
        return int(hits[0])
    what = f"pin {pattern!r}: layer {layer.name} cannot have rank {rank}"
    largest = layer.largest_rank(offered.form)
    if rank > largest:
        raise OptionError(
            f"{what}: the largest that saves parameters in the form {offered.form} is {largest}; "
            "dense keeps it as it is"
        )
    if rank % offered.rank_multiple:
        raise OptionError(f"{what}: it is no multiple of {offered.rank_multiple}")
    near = sorted(ranks[ranks != DENSE].tolist(), key=lambda other: abs(other - rank))[:2]
    raise OptionError(f"{what}: {offered.backend} was measured at other ranks, near it {near}")
