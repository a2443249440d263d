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
    wide, tall = weight.double(), weight.shape[0] > weight.shape[1]
    wide = wide.T if tall else wide
    back = torch.linalg.pinv(wide)
    energy = (
        seen.gradient_energy / seen.units if tall else seen.input_energy / max(seen.positions, 1.0)
    ) * (1.0 + kronecker.DAMPING)
    inside = float((back @ metric.outer @ back.T).trace())
    outside = max(energy - inside, 0.0) / max(wide.shape[1] - wide.shape[0], 1)
    inner = metric.inner
    assert inner is not None
    found = []
    for place, rank in enumerate(ranks):
        lost = wide
        if rank:
            there = made.made
            up, down = there[place] if there else backend.factors(weight, made.kept, rank)
            product = up.double() @ down.double()
            lost = wide - (product.T if tall else product)
        mixing = lost @ back
        rest = lost - mixing @ wide
        spread = mixing @ metric.outer @ mixing.T + outside * (rest @ rest.T)
        found.append((inner * spread).sum())
    return torch.stack(found)
