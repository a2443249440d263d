"""Truncation-aware data whitening (Wang et al., SVD-LLM, ICLR 2025, section 3.1).

Minimises the mean squared error of the layer's outputs, tr(dW E[x x^T] dW^T): C_in is the second
moment of the inputs, C_out = 1. The paper factorises the moment with Cholesky and inverts the
factor, which fails for singular moments; in projection form neither is needed, and only the
smaller side's moment is: W E[xx^T] W^T = E[yy^T].

Scales. An output error of one layer is not worth that of another, and ranks allocated on the bare
error come out worse than uniform ones. ``nats`` values it with the layer's mean squared output
gradient: 1/2 E[g^2] tr(dW E[xx^T] dW^T), the Kronecker-factored estimate (see kronecker) with
E[gg^T] taken as a multiple of the identity. ``outputs`` is the bare error of the paper.
"""

from torch import Tensor

from rankopt.backends.base import ClosedForm, Scale, Shape
from rankopt.backends.gram import gram
from rankopt.backends.projection import Metric
from rankopt.backends.statistics import Statistics


def _metric(weight: Tensor, seen: Statistics) -> Metric:
    moment = seen.need("second_moment") / max(seen.positions, 1.0)
    wide = weight.double()
    if weight.shape[0] < weight.shape[1]:
        return Metric(None, moment)
    if weight.shape[0] == weight.shape[1]:
        return Metric(None, wide @ moment @ wide.T)
    return Metric(moment, gram(wide))


def _nats(shape: Shape, seen: Statistics) -> float:
    return 0.5 * seen.gradient_energy / (seen.units * shape[0])


BACKEND = ClosedForm(
    name="whitened",
    source="Wang et al., SVD-LLM, ICLR 2025, section 3.1",
    needs=frozenset({"second_moment"}),
    scales={
        "nats": Scale("nats per {unit} (second-order estimate)", _nats),
        "outputs": Scale("squared output error", lambda shape, seen: 1.0),
    },
    metric=_metric,
    weighted=lambda shape: shape[0] > shape[1],
    dual=False,
)
