"""FWSVD with both sides weighted: the rank-one Fisher.

Where FWSVD weights input features only, the element-wise Fisher information is taken as the product
of its margins, F_oi = columns_o rows_i / total, the best rank-one fit that has the right sums over
rows and over columns (that of an independence table). min sum_oi F_oi (W_oi - (AB)_oi)^2 then has
the closed form of two diagonal weights, C_out = diag(columns) / total and C_in = diag(rows): the
two-sided scaling that Hsu et al. (ICLR 2022) leave out because it costs the output side, which here
is free.

Scale: ``nats``, one half: the second-order estimate of what the loss of one unit rises by.
"""

from torch import Tensor

from rankopt.backends.base import ClosedForm, Scale
from rankopt.backends.projection import Metric, two_sided
from rankopt.backends.statistics import Statistics


def _metric(weight: Tensor, seen: Statistics) -> Metric:
    rows, columns = seen.need("rows"), seen.need("columns")
    total = rows.sum()
    # A layer without any Fisher information has no shares either.
    shares = columns / total if total > 0 else columns
    return two_sided(weight, shares, rows / seen.units)


BACKEND = ClosedForm(
    name="fwsvd_two_sided",
    source="rank-one Fisher, after Hsu et al., ICLR 2022",
    needs=frozenset({"rows", "columns"}),
    scales={"nats": Scale("nats per {unit} (second-order estimate)", lambda shape, seen: 0.5)},
    metric=_metric,
    weighted=lambda shape: True,
    dual=True,
)
