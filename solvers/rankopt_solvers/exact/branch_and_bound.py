"""The proven optimum of a sum, by branch and bound over convex hulls.

1. *Relax.* The linear relaxation at its exact break slope gives a bound, its vertices, filled, a
   choice (see hull, greedy). Costs count in multiples of their common divisor.
2. *Reduce.* An option whose reduced loss exceeds the distance between the two cannot be in a
   better choice (Dembo & Hammer 1980): of millions of options hundreds or thousands are left.
3. *Grid.* Losses are rounded to whole multiples of 2**-52 of the loss in hand: integers, whose sums
   are exact in any order. "Optimal" means: on this grid, which moves the loss of a choice by less
   than G * 2**-53 of it.
4. *Enumerate.* A dynamic program looks at all choices near the bound, nearest first (see core).
   When the edge at the break is short this is nearly always all there is to do.
5. *Branch.* When the edge is a long one (the jump to dense) the bound is too far off for that: the
   group that breaks takes either less than the far end of the edge or at least that, and both cases
   are relaxed again (Dyer, Riha & Walker 1995), the one with the smaller bound first.
6. *Symmetry.* Groups with identical options are interchangeable: they are kept sorted by cost,
   and a case that limits one of them limits those before or after it too.

Without limits the search ends with a proof. At a limit it returns the best choice found, and the
smallest bound of the cases left open is a true bound.
"""

import dataclasses
import heapq
import math
import time
from collections.abc import Callable

import numpy as np

from rankopt_solvers.exact.core import Core, core_of, enumerate_core
from rankopt_solvers.greedy import filled
from rankopt_solvers.hull import Relaxation, lower_bound, lower_hulls, options_within, relax
from rankopt_solvers.problem import Problem, refuse_side_budgets
from rankopt_solvers.solution import Case, Proof, Solution, certify
from rankopt_solvers.table import IntArray, Table, identical_rows

#: Partial choices that one dynamic program may look at. Where the edge at the break is a long one,
#: splitting the case does more; there the first case may take so many, each next one twice that.
MOST_STATES = 100_000_000
MOST_STATES_LONG = 3_000_000

#: An edge is long if it costs this many times what the next step of most rows costs.
LONG = 8

#: By how much the tolerance grows until the best choice of a case is found.
GROWTH = 1.5


def solve_exact(
    problem: Problem,
    *,
    time_limit: float = 60.0,
    max_nodes: int = 10_000,
    should_stop: Callable[[], bool] | None = None,
) -> Solution:
    """Solve a sum problem to proven optimality.

    Args:
        problem: a sum problem with one budget.
        time_limit: seconds, looked at between cases.
        max_nodes: cases to look at.
        should_stop: asked between cases; the search ends when it says True.

    Returns:
        A solution with status ``optimal`` and gap 0; ``time_limit`` when the clock or should_stop
        ended the search, ``feasible`` when max_nodes did.

    Raises:
        InfeasibleError: even the cheapest choice is over the budget.
        ProblemError: the problem has side budgets.
        ValueError: a limit that is not positive.
    """
    deadline = time.monotonic() + time_limit
    if not time_limit > 0:
        raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit!r}")
    if max_nodes < 1:
        raise ValueError(f"max_nodes must be at least 1, got {max_nodes!r}")
    refuse_side_budgets(problem, "exact")
    problem.require_feasible()
    table = problem.table
    budget = table.tightened(problem.budget)
    root = problem.relaxation
    position = filled(table, root)
    loss = math.fsum(table.loss[position].tolist())
    bound = lower_bound(table, root)
    proven = (bound, root.multiplier)
    if loss <= bound:
        return certify(problem, table.options_at(position), "exact", bound=proven)
    search = _Search(table, root, position, loss, bound, budget)

    def stopped() -> bool:
        return time.monotonic() > deadline or (should_stop is not None and should_stop())

    timed_out = search.run(max_nodes, stopped)
    choice = table.options_at(search.best())
    better = problem.loss_of(choice) < loss
    choice = choice if better else table.options_at(position)
    final = problem.loss_of(choice)
    open_bound = search.open_bound()
    least = final if open_bound is None else min(max(bound, open_bound), final)
    proof = Proof(root.multiplier, tuple(search.cases)) if least > bound else None
    return certify(
        problem,
        choice,
        "exact",
        timed_out=timed_out,
        bound=(least, root.multiplier),
        proof=proof,
        stats={
            "options": int(table.cost.size),
            "core": int(search.table.cost.size),
            "nodes": search.nodes,
            "states": search.states,
        },
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
    """A case: positions ``low[g] <= p < high[g]`` of the reduced table; index of its Case."""

    low: IntArray
    high: IntArray
    case: int


class _Search:
    """Branch and bound on the options that the root leaves, in whole numbers.

    Attributes:
        table: the reduced table; ``option`` holds positions of the full one.
        cases: the proof so far.
        nodes: cases looked at.
        states: partial choices that dynamic programs looked at.
    """

    def __init__(
        self,
        full: Table,
        root: Relaxation,
        position: IntArray,
        loss: float,
        bound: float,
        budget: int,
    ) -> None:
        self._full = full
        self.unit = max(math.ldexp(1.0, math.frexp(loss)[1] - 52), math.ulp(0.0))
        # A rounding to the grid for each row, and those of the reduced losses themselves.
        gap = (loss - bound) * (1 + 1e-12) + (full.rows + 4) * self.unit
        kept = np.zeros(full.cost.size, dtype=np.bool_)
        near, _ = options_within(full, root.multiplier, root.position, gap)
        kept[near[full.loss[near] <= loss]] = True
        kept[position] = True
        self._siblings = identical_rows(full)
        for row, rows in enumerate(self._siblings):
            if rows.size > 1 and rows[0] == row:
                # Rounding may have told them apart.
                which = [slice(int(full.start[r]), int(full.start[r + 1])) for r in rows.tolist()]
                union = np.logical_or.reduce([kept[w] for w in which])
                for w in which:
                    kept[w] = union
        core = full.keep(kept)
        scale = max(full.divisor, 1)
        base = core.cost[core.start[:-1]]
        # Differences to the first option kept are multiples of the divisor.
        cost = (core.cost - np.repeat(base, np.diff(core.start))) // scale
        self.budget = (budget - int(base.sum())) // scale
        self.table = Table(core.start, cost, np.rint(core.loss / self.unit), core.option)
        self.scale = scale
        at = np.searchsorted(np.flatnonzero(kept), position)
        self.incumbent = at
        self.loss = int(self.table.loss[at].sum())
        self.cases: list[Case] = []
        self.nodes = self.states = 0
        self._heap: list[tuple[float, int, _Node, Core]] = []
        self._counter = 0
        self._push(_Node(core.start[:-1].copy(), core.start[1:].copy(), self._case()))

    def best(self) -> IntArray:
        """The best choice found, as positions of the full table."""
        assert self.table.option is not None
        return self.table.option[self.incumbent]

    def open_bound(self) -> float | None:
        """The smallest bound of the cases left open, in units of the losses; None if none is."""
        if not self._heap:
            return None
        rounding = (self.table.rows + 4) * self.unit
        return self._heap[0][0] * self.unit - rounding

    def run(self, max_nodes: int, stopped: Callable[[], bool]) -> bool:
        """Look at cases until none is left or a limit is reached; True if the clock ended it."""
        while self._heap:
            if self._heap[0][0] > self.loss - 1:
                # All others are at least as high: nothing left can be better.
                self._heap.clear()
                return False
            if self.nodes >= max_nodes:
                return False
            if self.nodes and stopped():
                return True
            _, _, node, core = heapq.heappop(self._heap)
            self._look(node, core)
        return False

    def _case(self) -> int:
        self.cases.append(Case(0.0))
        return len(self.cases) - 1

    def _push(self, node: _Node) -> None:
        """Relax a case; keep it if a better choice could be in it."""
        table = self.table.between(node.low, node.high)
        if int(table.cost[table.start[:-1]].sum()) > self.budget:
            return
        relaxation = relax(table, lower_hulls(table), self.budget)
        self.cases[node.case] = Case(relaxation.multiplier * self.unit / self.scale)
        core = core_of(table, relaxation)
        self._improve(table, relaxation.position)
        if core.bound <= self.loss - 1:
            self._counter += 1
            heapq.heappush(self._heap, (core.bound, self._counter, node, core))

    def _improve(self, table: Table, position: IntArray) -> None:
        loss = int(table.loss[position].sum())
        if loss < self.loss:
            assert table.option is not None
            self.loss, self.incumbent = loss, table.option[position]

    def _look(self, node: _Node, core: Core) -> None:
        self.nodes += 1
        if core.relaxation.edge is None:
            # All edges fit: the relaxation's own choice is the best of this case.
            return
        self._improve(core.table, filled(core.table, core.relaxation))
        if not self._enumerate(core):
            self._branch(node, core)

    def _enumerate(self, core: Core) -> bool:
        """Look at the choices near the bound, in growing distance; False if they are too many."""
        gap = self.loss - 1 - core.bound
        if gap < 0:
            return True
        most = MOST_STATES
        if _is_long(core):
            # Where splitting does not help after all, the cases are not split for ever.
            most = min(most, MOST_STATES_LONG << min(self.nodes - 1, 20))
        # Start where a few options more than the vertices are in reach.
        few = min(core.table.rows + 32, core.reduced.size - 1)
        tolerance = min(float(np.partition(core.reduced, few)[few]), gap)
        tolerance = max(tolerance, gap * 1e-6)
        while True:
            found = enumerate_core(core, tolerance, most)
            self.states += found.states
            if found.position is not None:
                self._improve(core.table, found.position)
            if not found.complete:
                return False
            gap = self.loss - 1 - core.bound
            if tolerance >= gap:
                return True
            tolerance = min(tolerance * GROWTH, gap)

    def _branch(self, node: _Node, core: Core) -> None:
        assert core.relaxation.edge is not None and core.table.option is not None
        row, target = core.relaxation.edge
        # Positions of the reduced table, then those relative to the row: siblings share them.
        cut = int(core.table.option[target])
        siblings = self._siblings[row]
        offset = cut - int(self.table.start[row])
        below, above = self._case(), self._case()
        assert self.table.option is not None
        self.cases[node.case] = dataclasses.replace(
            self.cases[node.case],
            group=row,
            cost=int(self._full.cost[self.table.option[cut]]),
            below=below,
            above=above,
        )
        high, low = node.high.copy(), node.low.copy()
        earlier = siblings[siblings <= row]
        later = siblings[siblings >= row]
        high[earlier] = np.minimum(high[earlier], self.table.start[earlier] + offset)
        low[later] = np.maximum(low[later], self.table.start[later] + offset)
        for child in (_Node(node.low, high, below), _Node(low, node.high, above)):
            if (child.low < child.high).all():
                self._push(child)


def _is_long(core: Core) -> bool:
    """Whether the edge at the break jumps over what would be many steps of other rows."""
    assert core.relaxation.edge is not None
    table, position = core.table, core.relaxation.position
    row, target = core.relaxation.edge
    more = position[position + 1 < table.start[1:]]
    usual = float(np.median(table.cost[more + 1] - table.cost[more]))
    return float(table.cost[target] - table.cost[position[row]]) > LONG * usual
