"""The options of all groups in flat arrays (compressed sparse rows), dominated ones left out.

Row g holds the undominated options of group g: cost strictly up, loss strictly down. Work that
touches every option goes through the rows block by block, so that its temporary arrays stay in the
processor's cache and a model with millions of options needs little more memory than its tables.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_Number = TypeVar("_Number", np.int64, np.float64)

EPS = float(np.finfo(np.float64).eps)

#: Options of a block: its float64 temporaries fit a second-level cache.
BLOCK = 2**15

#: Options of a run: what is looked at in every problem are the runs, and few of them from within.
RUN = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Undominated options; N in all, of G groups.

    Attributes:
        start: shape ``(G+1,)``; row g is ``start[g]:start[g+1]``.
        cost: shape ``(N,)``, strictly increasing inside a row.
        loss: shape ``(N,)``, strictly decreasing inside a row.
        option: shape ``(N,)``, index of the option in its group; None if no option was left out.
    """

    start: IntArray
    cost: IntArray
    loss: FloatArray
    option: IntArray | None

    @property
    def rows(self) -> int:
        """Number of groups."""
        return self.start.size - 1

    def options_at(self, position: IntArray) -> tuple[int, ...]:
        """Option indices of one position in each row, shape ``(G,)``."""
        if self.option is None:
            return tuple((position - self.start[:-1]).tolist())
        return tuple(self.option[position].tolist())

    def blocks(self) -> Iterator[tuple[int, "Table"]]:
        """Tables of about BLOCK options, views of this one, each with its first row's index."""
        first = 0
        while first < self.rows:
            last = int(np.searchsorted(self.start, self.start[first] + BLOCK, side="right")) - 1
            last = max(last, first + 1)
            a, b = int(self.start[first]), int(self.start[last])
            start = self.start[first : last + 1] - a
            yield first, Table(start, self.cost[a:b], self.loss[a:b], None)
            first = last

    @cached_property
    def runs(self) -> "Table":
        """At most RUN neighbours as one option: the cost of the first, the loss of the last.

        No option of a run costs or loses less than that, so where the pair is out of the question
        the whole run is. The last option of a row is a run of its own; ``option`` holds the
        position of each run's first option.
        """
        size = (np.diff(self.start) - 2) // RUN + 2
        start = np.concatenate(([0], np.cumsum(size)))
        first = np.repeat(self.start[:-1] - RUN * start[:-1], size)
        first += RUN * np.arange(first.size)
        first[start[1:] - 1] = self.start[1:] - 1
        last = np.append(first[1:], self.start[-1]) - 1
        return Table(start, self.cost[first], self.loss[last], first)

    @cached_property
    def run_end(self) -> IntArray:
        """Position after the last option of each run."""
        assert self.runs.option is not None
        return np.append(self.runs.option[1:], self.start[-1])

    def runs_between(self, low: IntArray, high: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """The runs inside ``low[k] <= position < high[k]``, cut to that, for any ranges.

        Returns:
            Index of each range's first run, one more than there are ranges; the first position of
            each run; and the one after its last.
        """
        first = self.runs.option
        assert first is not None
        a, b = np.searchsorted(first, low, side="right") - 1, np.searchsorted(first, high)
        inside = ranges(a, b)
        return (
            np.concatenate(([0], np.cumsum(b - a))),
            np.maximum(first[inside], np.repeat(low, b - a)),
            np.minimum(self.run_end[inside], np.repeat(high, b - a)),
        )

    @cached_property
    def divisor(self) -> int:
        """Common divisor of all cost differences inside rows; 0 if there are none."""
        divisor = 0
        for _, block in self.blocks():
            if divisor == 1:
                break
            rest = block.cost - block.spread(block.cost[block.start[:-1]])
            if divisor:
                rest %= divisor
            while (rest := rest[rest != 0]).size:
                divisor = math.gcd(divisor, int(rest[0]))
                rest = rest % divisor
        return divisor

    def spread(self, values: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
        """One value for each row, repeated for its options."""
        return np.repeat(values, np.diff(self.start))

    def tightened(self, budget: int) -> int:
        """The largest total cost <= budget that a choice of undominated options can have.

        Every choice costs the cheapest choice plus a multiple of the divisor, so nothing is lost,
        and the bound no longer counts parameters that cannot be spent.
        """
        base = int(self.cost[self.start[:-1]].sum())
        if self.divisor == 0:
            return base
        most = int(self.cost[self.start[1:] - 1].sum())
        return min(base + (budget - base) // self.divisor * self.divisor, most)

    def last_affordable(self, limit: IntArray) -> IntArray:
        """For each row the last position whose cost is at most ``limit[g]`` (or its first)."""
        low, high = self.start[:-1].copy(), self.start[1:].copy()
        while True:
            open_rows = high - low > 1
            if not open_rows.any():
                return low
            middle = (low + high) // 2
            fits = self.cost[middle] <= limit
            low = np.where(open_rows & fits, middle, low)
            high = np.where(open_rows & ~fits, middle, high)

    def first_within(self, level: float) -> IntArray:
        """For each row the first position with a loss of at most level; its end if none has."""
        low, high = self.start[:-1] - 1, self.start[1:].copy()
        while True:
            open_rows = high - low > 1
            if not open_rows.any():
                return high
            middle = np.where(open_rows, (low + high) // 2, self.start[:-1])
            within = self.loss[middle] <= level
            high = np.where(open_rows & within, middle, high)
            low = np.where(open_rows & ~within, middle, low)

    def keep(self, mask: BoolArray) -> "Table":
        """The table of the options marked, shape ``(N,)``; ``option`` holds their positions."""
        return self.at(np.flatnonzero(mask))

    def at(self, kept: IntArray) -> "Table":
        """The table of the options at these positions, in order; ``option`` holds them."""
        start = np.searchsorted(kept, self.start)
        return Table(start.astype(np.int64), self.cost[kept], self.loss[kept], kept)

    def between(self, low: IntArray, high: IntArray) -> "Table":
        """The table of the options ``low[g] <= position < high[g]``; ``option`` as in keep."""
        start = np.concatenate(([0], np.cumsum(high - low)))
        kept = ranges(low, high)
        return Table(start, self.cost[kept], self.loss[kept], kept)


def ranges(low: IntArray, high: IntArray) -> IntArray:
    """All positions ``low[k] <= p < high[k]``, one range after the other."""
    size = high - low
    start = np.cumsum(size) - size
    positions: IntArray = np.arange(int(size.sum())) + np.repeat(low - start, size)
    return positions


def pareto(cost: IntArray, loss: FloatArray) -> IntArray:
    """Indices of options that no other option beats: cost strictly up, loss strictly down."""
    order = np.lexsort((loss, cost))
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], loss[order][:-1])))
    return np.asarray(order[loss[order] < best_before], dtype=np.int64)


def tabulate(options: Sequence[tuple[IntArray, FloatArray]]) -> Table:
    """Flat arrays of the undominated options of every group."""
    costs, losses = [], []
    kept: list[IntArray | None] = []
    for cost, loss in options:
        if bool((cost[1:] > cost[:-1]).all()) and bool((loss[1:] < loss[:-1]).all()):
            kept.append(None)
        else:
            best = pareto(cost, loss)
            kept.append(best)
            cost, loss = cost[best], loss[best]
        costs.append(cost)
        losses.append(loss)
    size = np.array([cost.size for cost in costs], dtype=np.int64)
    option = None
    if any(indices is not None for indices in kept):
        option = np.concatenate(
            [np.arange(n) if k is None else k for k, n in zip(kept, size.tolist(), strict=True)]
        )
    start = np.concatenate(([0], np.cumsum(size)))
    return Table(start, np.concatenate(costs), np.concatenate(losses), option)


def identical_rows(table: Table) -> list[IntArray]:
    """For each row the rows with the same options, itself included, in order."""
    first, last = table.start[:-1], table.start[1:] - 1
    middle = (first + last) // 2
    looks = zip(
        (last - first).tolist(),
        table.cost[last].tolist(),
        table.loss[first].tolist(),
        table.loss[middle].tolist(),
        strict=True,
    )
    classes: dict[tuple[float, ...], list[list[int]]] = {}
    for row, look in enumerate(looks):
        here = slice(int(first[row]), int(last[row]) + 1)
        for members in classes.setdefault(look, []):
            there = slice(int(first[members[0]]), int(last[members[0]]) + 1)
            if np.array_equal(table.cost[here], table.cost[there]) and np.array_equal(
                table.loss[here], table.loss[there]
            ):
                members.append(row)
                break
        else:
            classes[look].append([row])
    found: list[IntArray] = [np.empty(0, dtype=np.int64)] * table.rows
    for group in classes.values():
        for members in group:
            for row in members:
                found[row] = np.array(members)
    return found
