"""What the factors of any backend lose under the Kronecker-factored Fisher information.

A backend's own error says which factors are best of one rank and, with the little that it looks at,
what a layer's ranks are worth against each other. The diagonal ones take the inputs of a layer for
uncorrelated and alike: a layer whose inputs all point one way loses many times what they say
(experiments/05_backends, 14_classifiers). So where both moments were summed, the curve that ranks
are planned on is the error of the backend's factors under them (see kronecker),

    1/2 tr(E[gg^T] dW_r E[xx^T] dW_r^T) positions / units,      dW_r = W - W_r,

in nats, and the same estimate for all backends. It costs matrix products beside a decomposition.

Of the larger side of W only the moment behind W is known: E[yy^T], y = W x, for out <= in. That is
enough for closed forms, W_r = Q_r Z_r^T W. Factors at a grid of ranks are their part in the span of
W's rows and a rest R; the moment outside of the span is taken as a multiple of the identity with
the trace that is left, and nothing else is known of it.

Factors fit the data that made them, the better the more of them there are (the backend
``kronecker`` all the more, whose error this is): on other data they lose more. cross_fitted values
factors of one half of the data on the other half, and those of the other on the one. Factors of
half of the data are worse than those of all, so its mean with the loss on the same data is taken.
(Cross-validation, Stone, J. Royal Statistical Society B 1974; two folds, swapped, are called
cross-fitting by Chernozhukov et al., Econometrics Journal 2018.)

Factors are not optimal for an error that is not theirs, so the loss can rise with the rank: then
the larger one is taken at all lower ranks. It never is less than what the factors lose.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from rankopt.backends import kronecker
from rankopt.backends.base import Backend, Decomposition, Scale, recomputable
from rankopt.backends.projection import Metric, losses
from rankopt.backends.statistics import Statistics

#: Name of the scale, and what it is.
NAME = "kronecker"
SCALE = Scale("nats per {unit} (Kronecker-factored estimate)", lambda shape, seen: 1.0)
#: What it reads.
NEEDS = kronecker.BACKEND.needs


def needs_of(backends: Collection[Backend], moments: bool) -> frozenset[str]:
    """Statistics that backends need, and, with ``moments``, that valuing their factors needs."""
    needs = frozenset[str]().union(*(backend.needs for backend in backends))
    return needs | NEEDS if moments else needs


def any_fitted(backends: Collection[Backend]) -> bool:
    """Whether there is one to cross-fit: what is computed again from a few numbers for each row
    does not fit the data.
    """
    return not all(map(recomputable, backends))


def valued(
    backend: Backend, weight: Tensor, seen: Statistics, made: Decomposition
) -> Tensor | None:
    """Losses of a decomposition's factors in nats of a unit, float64, at its ranks, not increasing.

    None where it cannot be told: without both moments, and for a complete curve that does not say
    what it projects on.

    Args:
        backend: that made the decomposition.
        weight: W, shape ``(out, in)``.
        seen: statistics of the layer, of the data that made it or of others.
        made: of this weight.
    """
    if not seen.has_moments:
        return None
    metric = kronecker.BACKEND.metric(weight, seen)
    full = min(weight.shape)
    ranks: Sequence[int] = range(full + 1) if made.ranks is None else made.ranks
    if made.projections is not None:
        found = losses(*made.projections, metric)
    elif made.ranks is not None:
        found = _at(backend, weight, seen, made, ranks, metric)
    else:
        return None
    if ranks[-1] == full:
        # Of full rank the factors are W, whatever has no energy.
        found[-1] = 0.0
    return 0.5 * found.clamp_min(0.0).flip(0).cummax(0).values.flip(0)


def cross_fitted(
    backend: Backend,
    weight: Tensor,
    seen: Statistics,
    made: Decomposition,
    halves: tuple[Statistics, Statistics],
    largest: int,
) -> Tensor | None:
    """The mean of what valued says and of what it says of factors that other data made.

    Args:
        backend: that made the decomposition.
        weight: W, shape ``(out, in)``.
        seen: the layer's statistics.
        made: from them.
        halves: statistics of two halves of the data.
        largest: rank that is decomposed to.
    """
    own = valued(backend, weight, seen, made)
    if own is None:
        return None
    crossed = [
        valued(backend, weight, other, backend.decompose(weight, this, largest))
        for this, other in (halves, halves[::-1])
    ]
    known = [each for each in crossed if each is not None and each.shape == own.shape]
    return 0.5 * own + 0.25 * (known[0] + known[1]) if len(known) == 2 else None


def _at(
    backend: Backend,
    weight: Tensor,
    seen: Statistics,
    made: Decomposition,
    ranks: Sequence[int],
    metric: Metric,
) -> Tensor:
    """Twice the loss at some ranks, from the factors themselves."""
    changes = Changes(weight, seen, metric)
    found = []
    for place, rank in enumerate(ranks):
        lost = weight.double()
        if rank:
            there = made.made
            up, down = there[place] if there else backend.factors(weight, made.kept, rank)
            lost = lost - up.double() @ down.double()
        found.append(changes.twice(lost))
    return torch.stack(found)


class Changes:
    """What any change of a weight loses, its part in the span of the rows and the rest.

    Args:
        weight: W, shape ``(out, in)``.
        seen: statistics of the layer, with both moments.
        metric: the backend kronecker's of them, if it is there already.
        rtol: share of the largest singular value of W below which a direction counts as outside
            of the span; by default what rounding in float64 makes of none. A change that knows
            nothing of W, and so has a part in all directions, is divided by the smallest.
    """

    def __init__(
        self,
        weight: Tensor,
        seen: Statistics,
        metric: Metric | None = None,
        rtol: float | None = None,
    ) -> None:
        self._tall = weight.shape[0] > weight.shape[1]
        wide = weight.double()
        self._wide = wide = wide.T if self._tall else wide
        self._metric = metric or kronecker.BACKEND.metric(weight, seen)
        self._back = torch.linalg.pinv(wide, rtol=rtol)
        energy = (
            seen.gradient_energy / seen.units
            if self._tall
            else seen.input_energy / max(seen.positions, 1.0)
        ) * (1.0 + kronecker.DAMPING)
        inside = float((self._back @ self._metric.outer @ self._back.T).trace())
        self._outside = max(energy - inside, 0.0) / max(wide.shape[1] - wide.shape[0], 1)

    def twice(self, change: Tensor) -> Tensor:
        """Twice the loss in nats of a unit of a change of W, shape ``(out, in)``."""
        lost = change.double()
        lost = lost.T if self._tall else lost
        mixing = lost @ self._back
        rest = lost - mixing @ self._wide
        spread = mixing @ self._metric.outer @ mixing.T + self._outside * (rest @ rest.T)
        inner = self._metric.inner
        assert inner is not None
        total: Tensor = (inner * spread).sum()
        return total
