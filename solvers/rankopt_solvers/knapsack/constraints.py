"""Constraints beside the budgets, as a problem with fewer options and one more side budget."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from rankopt_solvers.problem import Problem, ProblemError, SideBudget
from rankopt_solvers.table import IntArray


@dataclasses.dataclass(frozen=True)
class AtMostChanged:
    """At most ``most`` groups take another option than in ``base``."""

    base: Sequence[int]
    most: int


def constrained(
    problem: Problem,
    forced: Mapping[str, int],
    forbidden: Mapping[str, Collection[int]],
    changed: AtMostChanged | None,
) -> tuple[Problem, list[IntArray]]:
    """The problem under constraints, and the original indices of its options.

    Args:
        problem: any.
        forced: by name of the group, the option to take.
        forbidden: by name of the group, options not to take.
        changed: how many groups may differ from a given choice.

    Returns:
        The problem itself if there are no constraints.

    Raises:
        ProblemError: an unknown group or option; a group without options; a negative number.
    """
    sizes = {group.name: group.cost.size for group in problem.groups}
    for name in (*forced, *forbidden):
        if name not in sizes:
            raise ProblemError(
                f"a constraint names the group {name!r}; the groups are "
                f"{', '.join(list(sizes)[:3])}, ..."
            )
    kept = []
    for name, size in sizes.items():
        out = [_option(name, size, j) for j in forbidden.get(name, ())]
        stay = np.ones(size, dtype=np.bool_)
        if name in forced:
            stay[:] = False
            stay[_option(name, size, forced[name])] = True
        stay[out] = False
        if not stay.any():
            raise ProblemError(
                f"group {name!r}: forced and forbidden options leave none of its {size}"
            )
        kept.append(np.flatnonzero(stay))
    inner = problem if not (forced or forbidden) else problem.restricted(kept)
    if changed is None:
        return inner, kept
    if len(changed.base) != len(sizes):
        raise ProblemError(f"at_most_changed: {len(changed.base)} options for {len(sizes)} groups")
    if changed.most < 0:
        raise ProblemError(f"at_most_changed: {changed.most} groups; a number >= 0 is needed")
    costs = tuple(
        (stay != _option(name, size, j)).astype(np.int64)
        for (name, size), stay, j in zip(sizes.items(), kept, changed.base, strict=True)
    )
    title = "number of changed groups"
    while title in {side.name for side in problem.side_budgets}:
        title += "'"
    extra = SideBudget(title, costs, changed.most)
    return dataclasses.replace(inner, side_budgets=(*inner.side_budgets, extra)), kept


def _option(name: str, size: int, j: int) -> int:
    if isinstance(j, bool) or int(j) != j or not 0 <= j < size:
        raise ProblemError(f"a constraint names option {j!r} of group {name!r}; it has {size}")
    return int(j)
