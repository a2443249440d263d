"""Every closed form, without an inverse: one symmetric eigenproblem on the smaller side.

Minimise ||L^T (W - W_r) R||_F over matrices of rank r, for weights C_out = L L^T on the outputs and
C_in = R R^T on the inputs. With X = L^T W R = U S V^T the optimum is L^-T U_r S_r V_r^T R^-1, which
textbooks compute and which breaks where a weight is zero. Let K be the smaller side of W and take

    out <= in:  T = L, N = W C_in W^T        in < out:  T = R, N = W^T C_out W.

The eigenvectors U of T^T N T (float64; energies S^2) give two K x r matrices

    Z = T U_r,    Q = N Z S_r^-2,            so that Z^T Q = 1, and

    out <= in:  W_r = Q (Z^T W)              in < out:  W_r = (W Z) Q^T,
    loss(r) = sum_{k > r} S_k^2.

Only kept energies are divided by: a zero weight is the limit of small ones, no epsilon. Where
T = 1, Q = Z. In float32 the vectors of the deeper half would be noise, hence float64; *stored* in
float32 they cost nothing. Directions without energy are left out, and full rank is completed with
what is best for the plain error, so that it gives W back.
"""

import dataclasses

import torch
from torch import Tensor

from rankopt.backends.gram import gram

#: Energies below this part of the largest are rounding noise of a float64 eigenproblem.
_DEAD = 1e-14


@dataclasses.dataclass(frozen=True)
class Metric:
    """Weights of a layer, seen from the smaller side.

    Attributes:
        inner: C_out if out <= in, else C_in; shape ``(K, K)``, or its diagonal ``(K,)``, or None
            for the identity.
        outer: N = W C_in W^T if out <= in, else W^T C_out W; shape ``(K, K)``, float64.
    """

    inner: Tensor | None
    outer: Tensor


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """What a decomposition found.

    Attributes:
        energies: S^2, shape ``(K,)``, largest first, float64.
        basis: Z, shape ``(K, K)``; columns without energy are zero.
        dual: Q, shape ``(K, K)``, or None where it equals Z or was not asked for.
    """

    energies: Tensor
    basis: Tensor
    dual: Tensor | None


def one_sided(weight: Tensor, inputs: Tensor | None) -> Metric:
    """The metric of C_out = 1 and C_in diagonal.

    Args:
        weight: W, shape ``(out, in)``.
        inputs: diagonal of C_in, shape ``(in,)``; None for the identity.
    """
    return two_sided(weight, None, inputs)


def two_sided(weight: Tensor, outputs: Tensor | None, inputs: Tensor | None) -> Metric:
    """The metric of two diagonals, shapes ``(out,)`` and ``(in,)``; None for the identity."""
    wide = weight.double()
    if weight.shape[0] <= weight.shape[1]:
        weighted = wide if inputs is None else wide * inputs.double().sqrt()
        return Metric(None if outputs is None else outputs.double(), gram(weighted.T))
    weighted = wide if outputs is None else wide * outputs.double().sqrt()[:, None]
    return Metric(None if inputs is None else inputs.double(), gram(weighted))


def _root(inner: Tensor) -> Tensor:
    """T with T T^T = inner; a vector stands for a diagonal."""
    if inner.dim() == 1:
        return inner.clamp_min(0.0).sqrt()
    # Any root will do: Cholesky's costs a fraction of the other, but a singular matrix has none.
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        values, vectors = torch.linalg.eigh(inner)
        root = vectors * values.clamp_min_(0.0).sqrt()
    return root


def decompose(metric: Metric, dual: bool = True) -> Spectrum:
    """Energies and vectors of every rank; see the module's text.

    Args:
        metric: the weights.
        dual: whether Q is wanted where it is not Z.
    """
    outer = metric.outer
    if metric.inner is None:
        values, vectors = torch.linalg.eigh(outer)
        return Spectrum(values.flip(0).clamp_min_(0.0), vectors.flip(1), None)
    root = _root(metric.inner)
    if root.dim() == 1:
        values, vectors = torch.linalg.eigh(root[:, None] * outer * root)
    else:
        values, vectors = torch.linalg.eigh(root.T @ outer @ root)
    energies, vectors = values.flip(0).clamp_min_(0.0), vectors.flip(1)
    live = energies > _DEAD * energies[0]
    basis = (root[:, None] * vectors if root.dim() == 1 else root @ vectors) * live
    lengths = torch.where(live, basis.norm(dim=0), 1.0)
    # Unit columns, whatever the weights' unit: they are to be stored in float32.
    basis /= lengths
    if not dual:
        return Spectrum(energies, basis, None)
    return Spectrum(
        energies, basis, (outer @ basis) * (lengths.square() / torch.where(live, energies, 1.0))
    )


def factors(
    weight: Tensor, basis: Tensor, dual: Tensor | None, rank: int, identity: bool
) -> tuple[Tensor, Tensor]:
    """``up`` (out, rank), orthonormal, and ``down`` (rank, in).

    In the weight's precision, or float32 if that is less: what float64 would gain is lost again
    when the factors are stored beside weights of that precision.

    Args:
        weight: W, shape ``(out, in)``.
        basis: Z, shape ``(K, R)`` with R >= rank, any precision.
        dual: Q, or None: T = 1, or C_out = 1 so that W_r is the projection on the columns of W Z.
        rank: r.
        identity: T = 1, so that the basis is orthonormal.
    """
    own = torch.promote_types(weight.dtype, torch.float32)
    wide, z = weight.to(own), basis[:, :rank].to(own)
    short = weight.shape[0] <= weight.shape[1]
    if short and identity:
        return z, z.T @ wide
    live = int((z != 0.0).any(0).sum())
    z, q = z[:, :live], None if dual is None else dual[:, :live].to(own)
    if q is None:
        up = torch.linalg.qr(wide @ z).Q
        down = up.T @ wide
    else:
        # Rounding of deep columns spoils Z^T Q = 1; with it the columns of Q are best for this Z.
        q = torch.linalg.solve(z.T @ q, q, left=False)
        up, mix = torch.linalg.qr(q if short else wide @ z)
        down = mix @ (z.T @ wide if short else q.T)
    if live < rank:
        u, s, v = torch.linalg.svd(wide - up @ down, full_matrices=False)
        more = slice(0, rank - live)
        up, mix = torch.linalg.qr(torch.cat([up, u[:, more] * s[more]], 1))
        down = mix @ torch.cat([down, v[more]])
    return up, down


def losses(basis: Tensor, dual: Tensor, metric: Metric) -> Tensor:
    """Errors, at every rank 0..K, of what was projected for one metric under another; ``(K+1,)``.

    With A the inner and N the outer weights, and both sums over i, j <= r,
    tr(A N) - 2 sum_i q_i^T A N z_i + sum_ij (q_i^T A q_j)(z_i^T N z_j). Rounding is of the size of
    float64's of the first, and may make small losses negative.

    Args:
        basis: Z, shape ``(K, K)``.
        dual: Q, likewise.
        metric: the other, its inner weights a matrix.
    """
    inner, outer = metric.inner, metric.outer
    assert inner is not None and inner.dim() == 2
    linear = ((outer @ (inner @ dual)) * basis).sum(0)
    both = (dual.T @ inner @ dual) * (basis.T @ outer @ basis)
    squares = both.cumsum_(0).cumsum_(1).diagonal()
    whole = (inner * outer).sum()
    return torch.cat([whole[None], whole - 2.0 * linear.cumsum(0) + squares])


def error(weight: Tensor, approximation: Tensor, metric: Metric) -> float:
    """||L^T (W - W_r) R||_F^2 in float64.

    The approximation's rows (out <= in), or columns, lie in the span of W's, as those of every
    closed form do: only then does the smaller side know enough.
    """
    difference, wide = (weight.double() - approximation.double()), weight.double()
    if weight.shape[0] > weight.shape[1]:
        difference, wide = difference.T, wide.T
    # difference = M W, with M on the smaller side.
    mixing = difference @ torch.linalg.pinv(wide)
    inner = metric.inner
    lost = mixing @ metric.outer @ mixing.T
    if inner is None:
        return float(lost.trace())
    if inner.dim() == 1:
        return float(inner @ lost.diagonal())
    return float((inner * lost).sum())
