"""Both sides whitened: the Kronecker-factored Fisher (Martens & Grosse, K-FAC, ICML 2015, section
3; for compression, Chekalina et al., Generalized Fisher-Weighted SVD, 2025).

The Fisher information of vec(W) is taken as E[x x^T] (x) E[g g^T] times the positions of a unit, so
that the second-order estimate of what the loss of one unit rises by is

    1/2 tr(E[gg^T] dW E[xx^T] dW^T) positions / units,

C_in the second moment of the inputs, C_out that of the output gradients. Singular moments are
harmless: no inverse is taken (see projection).

Scale: ``nats``, one half.
"""

from torch import Tensor

from rankopt.backends.base import ClosedForm, Scale
from rankopt.backends.projection import Metric
from rankopt.backends.statistics import Statistics


def _metric(weight: Tensor, seen: Statistics) -> Metric:
    second = seen.need("second_moment") / max(seen.positions, 1.0)
    gradient = seen.need("gradient_moment") / seen.units
    if weight.shape[0] < weight.shape[1]:
        return Metric(gradient, second)
    if weight.shape[0] == weight.shape[1]:
        wide = weight.double()
        return Metric(gradient, wide @ second @ wide.T)
    return Metric(second, gradient)


BACKEND = ClosedForm(
    name="kronecker",
    source="Martens & Grosse, ICML 2015, section 3; Chekalina et al. 2025",
    needs=frozenset({"second_moment", "gradient_moment"}),
    scales={"nats": Scale("nats per {unit} (second-order estimate)", lambda shape, seen: 0.5)},
    metric=_metric,
    weighted=lambda shape: True,
    dual=True,
)
