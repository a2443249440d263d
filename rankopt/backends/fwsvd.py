"""Fisher-weighted SVD (Hsu et al., Language Model Compression with Weighted Low-Rank Factorization,
ICLR 2022, equations 5 to 7).

The paper minimises sum_ij I_i (W_ij - (AB)_ij)^2 for y = xW, where a row i is an input feature and
I_i is the Fisher information of the row's weights. In our normal form W is (out, in), so the
weights of input feature i are column i, C_in = diag(I) with I the mean over units, C_out = 1.

Scales: ``sum`` is the paper's, where the Fisher information of a row is the *sum* over its weights:
the same within a layer, but it counts wide layers more. ``nats`` takes the *mean* over the row and
one half, so that the loss is the second-order estimate 1/2 sum_ij F_ij dW_ij^2 of what the loss of
one unit rises by.
"""

from torch import Tensor

from rankopt.backends.base import ClosedForm, Scale
from rankopt.backends.projection import Metric, one_sided
from rankopt.backends.statistics import Statistics


def _metric(weight: Tensor, seen: Statistics) -> Metric:
    return one_sided(weight, seen.need("rows") / seen.units)


BACKEND = ClosedForm(
    name="fwsvd",
    source="Hsu et al., ICLR 2022, equations 5-7",
    needs=frozenset({"rows"}),
    scales={
        "nats": Scale(
            "nats per {unit} (second-order estimate)", lambda shape, seen: 0.5 / shape[0]
        ),
        "sum": Scale("row-sum Fisher units", lambda shape, seen: 1.0),
    },
    metric=_metric,
    weighted=lambda shape: shape[0] > shape[1],
    dual=False,
)
