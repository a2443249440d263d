"""The one-sided weighted optimum as a projection of W.

Minimise ||(W - W_r) sqrt(D)||_F over matrices of rank r, D diagonal and >= 0. With U the left
singular vectors of X = W sqrt(D), the optimum is

    W_r = U_r (U_r^T W),    loss(r) = sum_{k>r} sigma_k(X)^2,

which is the textbook U_r S_r V_r^T D^(-1/2) wherever D has an inverse, and its limit elsewhere: an
input feature without Fisher information needs no epsilon. One symmetric eigenproblem on the smaller
side gives the spectrum and the vectors, in float64: in float32 the vectors of the deeper half are
noise. On the taller side U is recovered as the QR of X V.
"""

import torch
from torch import Tensor

#: Columns of X V shorter than this part of the longest are rounding noise: their energy is below
#: what a float64 eigenproblem resolves.
_DEAD = 1e-7


def decompose(weight: Tensor, input_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and singular vectors of the smaller side.

    Args:
        weight: W, shape ``(out, in)``.
        input_weights: diagonal of D, shape ``(in,)``.

    Returns:
        Energies sigma^2, shape ``(K,)`` with K = min(out, in), largest first, and the vectors in
        columns, shape ``(K, K)``: left singular ones if out <= in, else right singular ones. Both
        float64.
    """
    weighted = weight.double() * input_weights.double().sqrt()
    tall = weight.shape[0] > weight.shape[1]
    gram = weighted.T @ weighted if tall else weighted @ weighted.T
    energies, vectors = torch.linalg.eigh(gram)
    return energies.flip(0).clamp_min_(0.0), vectors.flip(1)


def left_vectors(weight: Tensor, input_weights: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal U, so that U[:, :r] U[:, :r]^T W is optimal for every r up to its width.

    Args:
        weight: W, shape ``(out, in)``.
        input_weights: diagonal of D, shape ``(in,)``.
        basis: vectors of the smaller side from decompose, shape ``(K, R)``, any precision.

    Returns:
        Shape ``(out, R)``, float64. Directions without any weighted energy are continued with the
        best ones for the plain error, so that full rank gives W back.
    """
    weight, basis = weight.double(), basis.double()
    width = basis.shape[1]
    if weight.shape[0] <= weight.shape[1]:
        orthonormal: Tensor = torch.linalg.qr(basis).Q
        return orthonormal
    images = (weight * input_weights.double().sqrt()) @ basis
    lengths = images.norm(dim=0)
    live = int((lengths > _DEAD * lengths.max()).sum())
    vectors: Tensor = torch.linalg.qr(images[:, :live]).Q
    if live < width:
        rest = weight - vectors @ (vectors.T @ weight)
        more = torch.linalg.svd(rest, full_matrices=False).U[:, : width - live]
        vectors = torch.linalg.qr(torch.cat([vectors, more], dim=1)).Q
    return vectors


def weighted_error(weight: Tensor, approximation: Tensor, input_weights: Tensor) -> float:
    """||(W - W_r) sqrt(D)||_F^2 in float64; shapes ``(out, in)``, ``(out, in)``, ``(in,)``."""
    difference = weight.double() - approximation.double()
    return float((difference.square() * input_weights.double()).sum())
