"""Both sides whitened: the Kronecker-factored Fisher (Martens & Grosse, K-FAC, ICML 2015, section
3; for compression, Chekalina et al., Generalized Fisher-Weighted SVD, 2025).

The Fisher information of vec(W) is taken as E[x x^T] (x) E[g g^T] times the positions of a unit, so
that the second-order estimate of what the loss of one unit rises by is

    1/2 tr(E[gg^T] dW E[xx^T] dW^T) positions / units,

C_in the second moment of the inputs, C_out that of the output gradients. Singular moments are
harmless: no inverse is taken (see projection).

Moments of a few thousand positions fit those: what the second-order estimate says is free there is
not free on other text. So each of the two is damped by a small share of its own mean diagonal,

    C + DAMPING tr(C) / n 1,

which is K-FAC's factored Tikhonov damping (ibid., section 6.3, with pi from the traces). It costs
nothing on the text that was measured, and gains on others (experiments/13_refinement).

Scale: ``nats``, one half.
"""

import torch
from torch import Tensor

from rankopt.backends.base import ClosedForm, Scale
from rankopt.backends.gram import gram
from rankopt.backends.projection import Metric
from rankopt.backends.statistics import Statistics

#: Share of the mean diagonal that each moment is damped with.
DAMPING = 0.01


def _metric(weight: Tensor, seen: Statistics) -> Metric:
    out, into = weight.shape
    positions, wide = max(seen.positions, 1.0), weight.double()
    second = seen.need("second_moment") / positions
    gradient = seen.need("gradient_moment") / seen.units
    of_inputs = DAMPING * seen.input_energy / positions / into
    of_gradients = DAMPING * seen.gradient_energy / seen.units / out
    if out < into:
        # Of the larger side only the moment behind W is known, and W 1 W^T is added to it.
        return Metric(_damped(gradient, of_gradients), second + of_inputs * gram(wide.T))
    inputs = _damped(second, of_inputs)
    if out == into:
        return Metric(_damped(gradient, of_gradients), wide @ inputs @ wide.T)
    return Metric(inputs, gradient + of_gradients * gram(wide))


def _damped(moment: Tensor, by: float) -> Tensor:
    return moment + by * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


BACKEND = ClosedForm(
    name="kronecker",
    source="Martens & Grosse, ICML 2015, section 3; Chekalina et al. 2025",
    needs=frozenset({"second_moment", "gradient_moment"}),
    scales={"nats": Scale("nats per {unit} (second-order estimate)", lambda shape, seen: 0.5)},
    metric=_metric,
    weighted=lambda shape: True,
    dual=True,
)
