"""Two dynamic programs over changes of cost: one keeps an array of costs, one a sorted list.

A state is a partial choice: its change of cost and of loss. Of two with the same cost the one that
loses less is kept. A state is dropped when what it has added to the Lagrangian function, and what
later rows must add to bring the cost back to the room there is, exceed the tolerance.
"""

import dataclasses
import math
from functools import cached_property

import numpy as np

from rankopt_solvers.table import EPS, FloatArray, IntArray

_NEVER = 2**61

#: Costs in the widest array: it and its temporaries take a few hundred megabytes.
_WIDEST = 2**23

#: Partial choices held at once by the sorted list, whose states take much more memory.
_MOST_LISTED = 3_000_000

#: Complete or not, chosen option of each step (None if there is no choice), its loss, states.
Outcome = tuple[bool, list[int] | None, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A row with a choice; arrays of shape ``(K,)``.

    Attributes:
        row: of the table.
        change: of cost, relative to the relaxation's vertex.
        loss: change of loss.
        reduced: what the option adds to the Lagrangian function, >= 0, rounded down.
    """

    row: int
    change: IntArray
    loss: IntArray
    reduced: FloatArray


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """What to choose from.

    Attributes:
        steps: in the order of the program.
        cost: change of cost to begin with.
        loss: change of loss to begin with.
        room: largest change of cost in the end.
        multiplier: lam per unit of cost.
        left: largest sum of reduced losses, and of lam times unspent room beyond the lattice's.
    """

    steps: list[Step]
    cost: int
    loss: int
    room: int
    multiplier: float
    left: float

    @cached_property
    def up(self) -> "Reach":
        """How far later steps can raise the cost."""
        return Reach.of([(step.change, step.reduced) for step in self.steps])

    @cached_property
    def down(self) -> "Reach":
        """How far later steps can lower the cost."""
        return Reach.of([(-step.change, step.reduced) for step in self.steps])

    @cached_property
    def unspent(self) -> float:
        """Most that can be left unspent."""
        return self.left / self.multiplier * (1 + 4 * EPS) + 1 if self.multiplier else np.inf

    @cached_property
    def windows(self) -> list[tuple[int, int]]:
        """Smallest and largest useful change of cost after each step."""
        low = high = self.cost
        found = []
        for k, step in enumerate(self.steps):
            low, high = low + int(step.change.min()), high + int(step.change.max())
            least = self.room - self.up.total(k, self.left) - min(self.unspent, 2.0**62)
            most = self.room + self.down.total(k, self.left)
            low, high = max(low, int(np.floor(least))), min(high, int(np.ceil(most)))
            found.append((low, high))
        return found

    @property
    def is_narrow(self) -> bool:
        """Whether the windows are small, and not much wider than there can be states in them."""
        width = max((high - low + 1 for low, high in self.windows), default=1)
        choices = math.prod(step.change.size for step in self.steps[:32])
        return width <= min(_WIDEST, 4 * choices)


@dataclasses.dataclass(frozen=True, eq=False)
class Reach:
    """How much the rows after a step can add to the cost for a given sum of reduced losses.

    The increments of all rows are taken best first, even out of a row's order: an upper bound.
    """

    step: IntArray
    change: FloatArray
    reduced: FloatArray

    @classmethod
    def of(cls, options: list[tuple[IntArray, FloatArray]]) -> "Reach":
        """From ``(change, reduced)`` of each step."""
        steps: list[IntArray] = [np.empty(0, dtype=np.int64)]
        gains: list[FloatArray] = [np.empty(0)]
        prices: list[FloatArray] = [np.empty(0)]
        for step, (change, price) in enumerate(options):
            order = np.argsort(price, kind="stable")
            reach = np.maximum.accumulate(np.maximum(change[order], 0))
            gain = np.diff(reach, prepend=0)
            # An option that reaches no further is never the cheapest way there.
            useful = gain > 0
            prices.append(np.diff(price[order][useful], prepend=0.0))
            gains.append(gain[useful].astype(np.float64))
            steps.append(np.full(int(useful.sum()), step))
        gain, price = np.concatenate(gains), np.concatenate(prices)
        with np.errstate(divide="ignore"):
            order = np.argsort(-(gain / price), kind="stable")
        return cls(np.concatenate(steps)[order], gain[order], price[order])

    def _sums(self, step: int) -> tuple[FloatArray, FloatArray]:
        later = self.step > step
        spent = np.concatenate(([0.0], np.cumsum(self.reduced[later])))
        return spent, np.concatenate(([0.0], np.cumsum(self.change[later])))

    def total(self, step: int, budget: float) -> float:
        """Largest further change for one budget."""
        return float(self.after(step, np.array([budget]))[0])

    def after(self, step: int, budget: FloatArray) -> FloatArray:
        """Largest further change for budgets >= 0, rounded up."""
        spent, reached = self._sums(step)
        whole = np.searchsorted(spent, budget, side="right") - 1
        price = np.append(np.diff(spent), 1.0)
        rate = np.append(np.diff(reached), 0.0) / np.where(price > 0, price, 1.0)
        return reached[whole] + (budget - spent[whole]) * rate[whole] + 1.0

    def price(self, step: int, change: FloatArray) -> FloatArray:
        """Least sum of reduced losses for a further change >= 0, rounded down; inf if too far."""
        spent, reached = self._sums(step)
        paid: FloatArray = np.interp(change - 1.0, reached, spent)
        return np.where(change - 1.0 > reached[-1], np.inf, paid * (1 - 1e-9))


def run_dense(given: Steps, most_states: int) -> Outcome:
    """An array of costs: for windows that are not much wider than the states in them."""
    low, high = given.cost, given.cost
    best = np.array([given.loss], dtype=np.int64)
    picks: list[tuple[int, IntArray]] = []
    states = 0
    for k, (step, (least, most)) in enumerate(zip(given.steps, given.windows, strict=True)):
        states += best.size * step.change.size
        if states > most_states:
            return False, None, 0, states
        first = max(least, low + int(step.change.min()))
        last = min(most, high + int(step.change.max()))
        if first > last:
            return True, None, 0, states
        longer = np.full(last - first + 1, _NEVER, dtype=np.int64)
        pick = np.zeros(longer.size, dtype=np.min_scalar_type(step.change.size))
        for option, (change, loss) in enumerate(
            zip(step.change.tolist(), step.loss.tolist(), strict=True)
        ):
            a, b = max(low + change, first), min(high + change, last)
            if a > b:
                continue
            here = slice(a - first, b - first + 1)
            there = best[a - change - low : b - change - low + 1] + loss
            better = there < longer[here]
            np.copyto(longer[here], there, where=better)
            np.copyto(pick[here], option, where=better)
        paid = given.multiplier * np.arange(first, last + 1)
        added = longer + paid
        np.abs(paid, out=paid)
        added -= 2 * EPS * paid
        if k % 8 == 7 or k + 1 == len(given.steps):
            missing = given.room - np.arange(first, last + 1, dtype=np.float64)
            added += np.where(
                missing < 0,
                given.down.price(k, -missing),
                given.up.price(k, np.maximum(missing - given.unspent, 0.0)),
            )
        longer[added > given.left] = _NEVER
        alive = np.flatnonzero(longer < _NEVER // 2)
        if not alive.size:
            return True, None, 0, states
        a, b = int(alive[0]), int(alive[-1]) + 1
        low, high, best = first + a, first + b - 1, longer[a:b]
        picks.append((low, pick[a:b]))
    fits = best[: given.room - low + 1]
    if not fits.size or int(fits.min()) >= _NEVER // 2:
        return True, None, 0, states
    cost, loss = low + int(np.argmin(fits)), int(fits.min())
    options = []
    for step, (base, pick) in zip(reversed(given.steps), reversed(picks), strict=True):
        option = int(pick[cost - base])
        options.append(option)
        cost -= int(step.change[option])
    return True, options[::-1], loss, states


def run_sparse(given: Steps, most_states: int) -> Outcome:
    """A list of states sorted by cost: for costs with nothing in common."""
    cost, loss = np.array([given.cost]), np.array([given.loss], dtype=np.int64)
    history: list[tuple[IntArray, IntArray]] = []
    states = 0
    for k, (step, (least, most)) in enumerate(zip(given.steps, given.windows, strict=True)):
        before = cost.size
        states += before * step.change.size
        if states > most_states or before * step.change.size > _MOST_LISTED:
            return False, None, 0, states
        costs = (cost[None, :] + step.change[:, None]).ravel()
        losses = (loss[None, :] + step.loss[:, None]).ravel()
        paid = given.multiplier * costs
        budget = given.left - (losses + paid - 2 * EPS * np.abs(paid))
        index = np.flatnonzero((budget >= 0) & (costs >= least) & (costs <= most))
        missing, budget = given.room - costs[index], budget[index]
        reachable = missing <= given.up.after(k, budget) + given.unspent
        reachable &= -missing <= given.down.after(k, budget)
        index = index[reachable]
        if not index.size:
            return True, None, 0, states
        index = index[np.argsort(costs[index], kind="stable")]
        losses = losses[index]
        # Of two partial choices the dearer one must lose less.
        smallest = np.minimum.accumulate(losses)
        index = index[np.concatenate(([True], losses[1:] < smallest[:-1]))]
        cost, loss = costs[index], (loss[None, :] + step.loss[:, None]).ravel()[index]
        history.append((index % before, index // before))
    fits = np.flatnonzero(cost <= given.room)
    if not fits.size:
        return True, None, 0, states
    state = int(fits[np.argmin(loss[fits])])
    total = int(loss[state])
    options = []
    for parent, option in reversed(history):
        options.append(int(option[state]))
        state = int(parent[state])
    return True, options[::-1], total, states
