"""Backends: which matrix is truncated, and so which loss a rank has.

Every backend here weights the input side of W (out, in) with a diagonal D and truncates the
SVD of W sqrt(D); `projection` does that without ever dividing by D.
"""

import dataclasses
from collections.abc import Callable

from torch import Tensor

from rankopt.backends import fwsvd, svd
from rankopt.errors import BudgetError


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to factorise.

    Attributes:
        name: in profiles, plans and on the command line.
        input_weights: mean row Fisher, shape ``(in,)`` -> diagonal of D, shape ``(in,)``.
    """

    name: str
    input_weights: Callable[[Tensor], Tensor]


BACKENDS: dict[str, Backend] = {
    "fwsvd": Backend("fwsvd", fwsvd.input_weights),
    "svd": Backend("svd", svd.input_weights),
}


def find_backend(name: str) -> Backend:
    """A backend by name.

    Raises:
        BudgetError: no such backend; lists those that exist.
    """
    if name not in BACKENDS:
        raise BudgetError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]
