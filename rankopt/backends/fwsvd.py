"""Fisher-weighted SVD (Hsu et al., Language Model Compression with Weighted Low-Rank Factorization,
ICLR 2022, equations 5 to 7).

The paper minimises sum_ij I_i (W_ij - (AB)_ij)^2 for y = xW, where a row i is an input feature and
I_i is the Fisher information of the row's weights. In our normal form W is (out, in), so the
weights of input feature i are column i, and D = diag(I).
"""

from torch import Tensor


def input_weights(row_fisher: Tensor) -> Tensor:
    """The mean row Fisher itself. Shapes ``(in,)`` -> ``(in,)``."""
    return row_fisher
