"""A handful of log-multipliers that reweight the groups: what general samplers can search.

The weight of group g is exp(m[kind_g] + a (2 d_g - 1) + b (6 d_g^2 - 6 d_g + 1)) with the Legendre
polynomials of its depth d_g in [0, 1]. All parameters lie in [-2, 2]; zeros are the problem as
given. Only ratios of weights matter, so with a single kind its multiplier is left out.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rankopt_solvers.problem import Group, Problem, ProblemError
from rankopt_solvers.table import FloatArray

LARGEST = 2.0
_LINEAR, _QUADRATIC = "depth: linear", "depth: quadratic"


def reweighted(problem: Problem, weights: Iterable[float]) -> Problem:
    """The same options and budget, the losses of each group multiplied by its weight."""
    groups = tuple(
        Group(group.name, group.cost, group.loss * float(weight))
        for group, weight in zip(problem.groups, weights, strict=True)
    )
    return dataclasses.replace(problem, groups=groups)


def check_labels(
    problem: Problem, kinds: Sequence[str] | None, depths: Sequence[float] | None
) -> None:
    """Refuse kinds or depths that do not fit the groups.

    Raises:
        ProblemError: another number of them than of groups, or a depth outside [0, 1].
    """
    for name, given in (("kinds", kinds), ("depths", depths)):
        if given is not None and len(given) != len(problem.groups):
            raise ProblemError(f"{len(given)} {name} for {len(problem.groups)} groups")
    for group, depth in zip(problem.groups, depths or (), strict=False):
        if not 0.0 <= depth <= 1.0:
            raise ProblemError(f"group {group.name!r}: depths lie in [0, 1], got {depth!r}")


def multiplier_names(
    problem: Problem, kinds: Sequence[str] | None, depths: Sequence[float] | None
) -> list[str]:
    """The parameters; without kinds every group is its own kind."""
    labels = sorted(set(_labels(problem, kinds)))
    names = [f"kind: {label}" for label in labels] if len(labels) > 1 else []
    if depths is not None and len(set(depths)) > 1:
        names += [_LINEAR, _QUADRATIC]
    return names


def multiplier_weights(
    problem: Problem,
    kinds: Sequence[str] | None,
    depths: Sequence[float] | None,
    values: Mapping[str, float],
) -> FloatArray:
    """The weight of each group, shape ``(G,)``; a parameter that is not given is zero."""
    depth = np.zeros(len(problem.groups)) if depths is None else np.asarray(depths, dtype=float)
    logs = np.array([values.get(f"kind: {label}", 0.0) for label in _labels(problem, kinds)])
    logs = logs + values.get(_LINEAR, 0.0) * (2.0 * depth - 1.0)
    logs = logs + values.get(_QUADRATIC, 0.0) * (6.0 * depth**2 - 6.0 * depth + 1.0)
    return np.asarray(np.exp(logs))


def _labels(problem: Problem, kinds: Sequence[str] | None) -> list[str]:
    return [group.name for group in problem.groups] if kinds is None else list(kinds)
