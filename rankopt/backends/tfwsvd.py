"""TFWSVD: every weight has its own Fisher information (Hua et al., Numerical Optimizations for
Weighted Low-rank Estimation on Language Model, EMNLP 2022, equation 3).

Minimise over up (out, r) and down (r, in), with F >= 0 the element-wise Fisher information,

    E(up, down) = sum_oi F_oi (W - up down)_oi^2.

Unless F is a product of row and column weights there is no closed form, and the problem is NP-hard.
What is found is a local minimum, no worse than the closed forms one of which it starts from: plain
SVD, FWSVD, and two-sided weights, once from the margins of F and once from those of sqrt(F), which
few large F_oi do not rule: that start is the best of the four on nearly every matrix we tried.

For one factor fixed, E is a least-squares problem for each row of the other, with Hessian
H_o = down diag(F_o) down^T. To solve them takes out in r^2 FLOP. Instead, each row moves once
along its preconditioned gradient, exactly as far as is best for it; then the columns of down
alike. The preconditioner is the Hessian of the rank-one Fisher: a number for each row, times
down diag(rows) down^T. Directions are computed in float32; the residual that they start from and
all that is kept, in float64: as in iterative refinement, a direction's error is a part of a small
correction.

Cost of an iteration: 8 out in r FLOP in float32 and 2 out in r + 4 r^2 (out + in) in float64; of
choosing the start 8 out in r in float64 and, once for all ranks, four symmetric eigenproblems of
size min(out, in). Solutions of different ranks are not nested, so each rank is solved by itself
and only a grid of ranks is offered. Eight ranks of a 576 x 1536 matrix take about three seconds of
one core, fifty times as long as FWSVD.

More iterations fit F, not the loss. On SmolLM2-135M, 20 iterations lower E by 5 % to 14 % if F was
measured on 16 windows of text, and by 2 % to 7 % if on 64; on the F of as many other windows the
same factors are 4 % to 11 % worse, and between 3 % better and 3 % worse, than the start, which is
smoother than F. Most of either is there after three (experiments/02_profile_cost).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankopt.backends import projection
from rankopt.backends.base import Decomposition, Scale
from rankopt.backends.statistics import Statistics
from rankopt.errors import OptionError

#: Alternations; see the module's text.
ITERATIONS = 3
#: Ranks offered besides zero.
RANKS = 8
#: Ranks offered are multiples of this where the matrix is big enough.
_MULTIPLE = 8
#: Errors below this part of ||W||^2 in the same metric are rounding of float64.
_ROUNDING = 1e-24
#: Keeps the preconditioner, scaled to a unit diagonal, positive definite; it moves no optimum.
_RIDGE = 1e-10


@dataclasses.dataclass(frozen=True)
class Result:
    """What a minimisation found.

    Attributes:
        up: shape ``(out, r)``, float64.
        down: shape ``(r, in)``, float64.
        errors: E at the start and after each iteration; not increasing. Shorter than asked for if
            an iteration did not improve: it is undone, and the last.
    """

    up: Tensor
    down: Tensor
    errors: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Losses on a grid of ranks.

    Attributes:
        losses: shape ``(ranks,)``, float64, not increasing.
        origins: for each rank the one whose solution, continued with zeros, it has: itself, or a
            lower one that came out better.
        starts: for each rank the closed form it starts from.
        factors: for each rank the solution, of its origin's rank.
    """

    losses: Tensor
    origins: tuple[int, ...]
    starts: tuple[int, ...]
    factors: tuple[tuple[Tensor, Tensor], ...]


def weighted_error(weight: Tensor, approximation: Tensor, fisher: Tensor) -> float:
    """E in float64; three shapes ``(out, in)``."""
    difference = weight.double() - approximation.double()
    return float(difference.square_().mul_(fisher).sum())


def minimise(weight: Tensor, fisher: Tensor, up: Tensor, down: Tensor, iterations: int) -> Result:
    """Alternate from given factors; deterministic.

    Args:
        weight: W, shape ``(out, in)``.
        fisher: F >= 0, shape ``(out, in)``; a row or a column of zeros leaves its weights as they
            start.
        up: shape ``(out, r)``.
        down: shape ``(r, in)``.
        iterations: at most so many.
    """
    wide, exact = weight.double(), fisher.double()
    up, down = up.double(), down.double()
    residual = up @ down - wide
    errors = [float(residual.square().mul_(exact).sum())]
    mean = exact.mean()
    if mean <= 0.0 or up.shape[1] == 0:
        return Result(up, down, tuple(errors))
    # Out of reach of float32's smallest numbers.
    relative = exact / mean
    columns, rows = relative.mean(1), relative.mean(0)
    narrow = relative.float()
    turned = narrow.T.contiguous()
    for _ in range(iterations):
        now = residual.float()
        new_up, lengths, change = _step(up, down, narrow, now, columns, rows)
        now.addcmul_(lengths, change)
        new_down = _step(down.T, new_up.T, turned, now.T.contiguous(), rows, columns)[0].T
        torch.sub(new_up @ new_down, wide, out=residual)
        error = float(residual.square().mul_(exact).sum())
        if not error < errors[-1]:
            break
        up, down = new_up, new_down
        errors.append(error)
    return Result(up, down, tuple(errors))


def _step(
    factor: Tensor, other: Tensor, fisher: Tensor, residual: Tensor, own: Tensor, across: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Move each row of a factor along its preconditioned gradient, as far as is best for it.

    Args:
        factor: what moves, shape ``(n, r)``, float64.
        other: the factor it is multiplied with, shape ``(r, m)``, float64.
        fisher: shape ``(n, m)``, float32.
        residual: factor @ other - W, shape ``(n, m)``, float32.
        own: mean Fisher of each row, shape ``(n,)``, float64.
        across: mean Fisher of each column, shape ``(m,)``, float64.

    Returns:
        The moved factor, and what the residual changes by: lengths ``(n, 1)`` times ``(n, m)``.
    """
    narrow = other.float()
    gradient = ((fisher * residual) @ narrow.T).double()
    direction = _precondition(gradient, (other * across) @ other.T)
    direction /= torch.where(own > 0.0, -own, -torch.inf)[:, None]
    change = direction.float() @ narrow
    curvature = torch.mul(change, change).mul_(fisher).sum(1).double()
    slope = (gradient * direction).sum(1)
    lengths = torch.where(curvature > 0.0, -slope / curvature, 0.0)[:, None]
    return factor + lengths * direction, lengths.float(), change


def _precondition(gradient: Tensor, metric: Tensor) -> Tensor:
    """Gradient times the metric's inverse; shapes ``(n, r)``, ``(r, r)``; 0 where a factor is 0."""
    sizes = metric.diagonal()
    scales = torch.where(sizes > 0.0, sizes.rsqrt(), 0.0)
    scaled = scales[:, None] * metric * scales
    scaled.diagonal().fill_(1.0 + _RIDGE)
    root = torch.linalg.cholesky(scaled)
    solved: Tensor = torch.cholesky_solve((gradient * scales).T, root).T * scales
    return solved


@dataclasses.dataclass(frozen=True)
class _Start:
    """A closed form for all ranks (see projection)."""

    basis: Tensor
    dual: Tensor | None
    identity: bool

    @classmethod
    def of(cls, weight: Tensor, outputs: Tensor | None, inputs: Tensor | None) -> "_Start":
        metric = projection.two_sided(weight, outputs, inputs)
        found = projection.decompose(metric)
        return cls(found.basis, found.dual, metric.inner is None)

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return projection.factors(weight, self.basis, self.dual, rank, self.identity)


def _starts(weight: Tensor, fisher: Tensor, only: int | None = None) -> dict[int, _Start]:
    """Plain SVD, and unless nothing is weighted FWSVD and both two-sided ones; or one of them."""
    weights: list[tuple[Tensor | None, Tensor | None]] = [(None, None)]
    largest = fisher.max()
    if largest > 0.0:
        relative = fisher / largest
        roots = relative.sqrt()
        weights.append((None, relative.sum(0)))
        weights.append((relative.sum(1), relative.sum(0)))
        weights.append((roots.sum(1).square(), roots.sum(0).square()))
    return {
        number: _Start.of(weight, *sides)
        for number, sides in enumerate(weights)
        if only is None or number == only
    }


def _solve(
    weight: Tensor, fisher: Tensor, starts: Mapping[int, _Start], rank: int, iterations: int
) -> tuple[Tensor, Tensor, float, int]:
    """Factors of one rank, ``up`` orthonormal; their error, 0 if it is only rounding; the start."""
    nothing = _ROUNDING * weighted_error(weight, torch.zeros_like(weight), fisher)
    if rank >= min(weight.shape):
        nothing = torch.inf
    best: tuple[float, Tensor, Tensor, int] | None = None
    for number, start in starts.items():
        up, down = start.factors(weight, rank)
        error = weighted_error(weight, up @ down, fisher)
        if error <= nothing:
            # The first of them: plain SVD is close to W where nothing is weighted too.
            return up, down, 0.0, number
        if best is None or error < best[0]:
            best = error, up, down, number
    assert best is not None
    found = minimise(weight, fisher, best[1], best[2], iterations)
    up, mix = torch.linalg.qr(found.up)
    down = mix @ found.down
    return up, down, weighted_error(weight, up @ down, fisher), best[3]


def grid(largest: int, count: int = RANKS) -> tuple[int, ...]:
    """The ranks on offer: 0, ..., largest in ``count`` about equal steps.

    Args:
        largest: the largest rank that saves parameters; offered as it is.
        count: ranks besides zero, fewer if there are not so many. The others are multiples of 8 if
            the steps are at least as long.
    """
    multiple = _MULTIPLE if largest >= _MULTIPLE * count else 1
    steps = (multiple * round(largest * k / (count * multiple)) for k in range(1, count))
    return tuple(sorted({0, largest, *(rank for rank in steps if rank < largest)}))


def curve(
    weight: Tensor, fisher: Tensor, ranks: Sequence[int], iterations: int = ITERATIONS
) -> Curve:
    """The error of the factors at each rank.

    Args:
        weight: W, shape ``(out, in)``.
        fisher: F >= 0, shape ``(out, in)``.
        ranks: increasing.
        iterations: see minimise.
    """
    wide, exact = weight.double(), fisher.double()
    starts = _starts(wide, exact)
    losses: list[float] = []
    origins: list[int] = []
    chosen: list[int] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for rank in ranks:
        up, down, error, start = _solve(wide, exact, starts, rank, iterations)
        worse = bool(losses) and error > losses[-1]
        losses.append(losses[-1] if worse else error)
        origins.append(origins[-1] if worse else rank)
        chosen.append(chosen[-1] if worse else start)
        pairs.append(pairs[-1] if worse else (up, down))
    values = torch.tensor(losses, dtype=torch.float64)
    return Curve(values, tuple(origins), tuple(chosen), tuple(pairs))


def factors(
    weight: Tensor,
    fisher: Tensor,
    rank: int,
    iterations: int = ITERATIONS,
    origin: int | None = None,
    start: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors that a curve reports the error of: solved again, with the same result.

    Args:
        weight: W, shape ``(out, in)``.
        fisher: F >= 0, shape ``(out, in)``.
        rank: r.
        iterations: see minimise.
        origin: the rank whose solution it is, from the curve; itself if not given.
        start: the closed form it starts from, from the curve; looked for if not given.

    Returns:
        ``up`` (out, r) with orthonormal columns and ``down`` (r, in), float64.
    """
    wide, exact = weight.double(), fisher.double()
    solved = rank if origin is None else origin
    starts = _starts(wide, exact, start)
    up, down, _, _ = _solve(wide, exact, starts, solved, iterations)
    if solved < rank:
        up = torch.cat([up, up.new_zeros(len(up), rank - solved)], 1)
        down = torch.cat([down, down.new_zeros(rank - solved, down.shape[1])])
    return up, down


@dataclasses.dataclass(frozen=True)
class ElementWise:
    """The backend; see rankopt.backends.base.

    Attributes:
        iterations: see minimise.
        count: ranks offered besides zero.
    """

    iterations: int = ITERATIONS
    count: int = RANKS
    name: str = "tfwsvd"
    source: str = "Hua et al., EMNLP 2022, equation 3"
    needs: frozenset[str] = frozenset({"elements"})

    @property
    def scales(self) -> Mapping[str, Scale]:
        """See Backend."""
        return {"nats": Scale("nats per {unit} (second-order estimate)", lambda shape, seen: 0.5)}

    def decompose(self, weight: Tensor, statistics: Statistics, largest: int) -> Decomposition:
        """See Backend; keeps F, as large as W, instead of the factors of each rank."""
        fisher = _mean(statistics)
        ranks = grid(largest, self.count)
        found = curve(weight, fisher, ranks, self.iterations)
        origins = torch.tensor([ranks, found.origins, found.starts], dtype=torch.float32)
        kept = {"fisher": fisher, "origins": origins}
        return Decomposition(found.losses, kept, ranks, made=found.factors)

    def factors(
        self, weight: Tensor, kept: Mapping[str, Tensor], rank: int
    ) -> tuple[Tensor, Tensor]:
        """See Backend.

        Raises:
            OptionError: a rank that is not on the grid.
        """
        ranks, origins, starts = (part.int().tolist() for part in kept["origins"])
        if rank not in ranks:
            raise OptionError(
                f"tfwsvd has factors at ranks {', '.join(map(str, ranks))}, not at {rank}: plan "
                "with the profile's ranks"
            )
        place = ranks.index(rank)
        how = origins[place], starts[place]
        return factors(weight, kept["fisher"], rank, self.iterations, *how)

    def error(self, weight: Tensor, approximation: Tensor, statistics: Statistics) -> float:
        """See Backend."""
        return weighted_error(weight, approximation, _mean(statistics))


def _mean(statistics: Statistics) -> Tensor:
    """F in float32, as it is kept: the curve is about the factors that will be solved for again."""
    return (statistics.need("elements") / statistics.units).float()


BACKEND = ElementWise()
