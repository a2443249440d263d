"""Plain SVD: min ||W - AB||_F, all weights alike (Eckart & Young 1936)."""

from rankopt.backends.base import ClosedForm, Scale
from rankopt.backends.projection import one_sided

BACKEND = ClosedForm(
    name="svd",
    source="Eckart & Young 1936",
    needs=frozenset(),
    scales={"frobenius": Scale("squared weights", lambda shape, seen: 1.0)},
    metric=lambda weight, seen: one_sided(weight, None),
    weighted=lambda shape: False,
    dual=False,
)
