"""A dynamic program over changes of cost, which keeps its states in two lists, or in an array.

A state is a partial choice: its change of cost and of loss. A state is dropped when another costs
and loses no more, or when what it has added to the Lagrangian function, and what other rows must
add to bring the cost back to the room there is, exceed the tolerance.

While there are few states at costs that are far apart, they are lists sorted by cost, one from the
first row on and one from the last: where they meet, the best partner of a state is the dearest that
fits (Horowitz & Sahni 1974). A choice of many rows is then never looked at as such. Where states
fill the window of useful costs, an array of its costs takes a hundredth of the time for each; there
only states of the same cost are compared.
"""

import dataclasses
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rankopt_solvers.table import EPS, FloatArray, IntArray

#: Losses are below 2**53, so a partial choice that loses more than that leads nowhere; none of the
#: options of a step can make up for the loss of a state that there is not.
_MOST, _NEVER = 2**53, 2**54

#: Options that are told apart in the last bits of a loss.
_BITS = 6

#: Costs in the widest array: it and its temporaries take a few hundred megabytes.
_WIDEST = 2**23

#: A state in a list takes as long as this many in an array.
LISTED = 10

#: Partial choices held at once by the sorted list, whose states take much more memory.
_MOST_LISTED = 3_000_000

#: A window may be so many times as wide as there are states in it to be kept in an array.
WIDE = 10

#: Fewer states than that take no less time.
_FEW = 1_000

#: Steps after which what later ones can reach is summed up again: in between it is overrated.
_STEPS = 8

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

    def backwards(self) -> "Steps":
        """The steps from the last on, to meet the state that these begin with."""
        room = self.room - self.cost
        return dataclasses.replace(self, steps=self.steps[::-1], cost=0, loss=0, room=room)

    def window(self, k: int, low: int, high: int) -> tuple[int, int]:
        """Smallest and largest useful change of cost after step k, from those before it."""
        change = self.steps[k].change
        least = self.room - self.up.total(k, self.left) - min(self.unspent, 2.0**62)
        most = self.room + self.down.total(k, self.left)
        return (
            max(low + int(change.min()), int(np.floor(least))),
            min(high + int(change.max()), int(np.ceil(most))),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Reach:
    """How much the rows after a step can add to the cost for a given sum of reduced losses.

    The increments of all rows are taken best first, even out of a row's order: an upper bound.
    """

    step: IntArray
    change: FloatArray
    reduced: FloatArray
    _sums: dict[int, tuple[FloatArray, FloatArray, FloatArray]] = dataclasses.field(
        default_factory=dict
    )

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

    def _later(self, step: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Prices and changes of the increments after the step added up, and the change per price.

        A few steps before it may be among them: that reaches further, so no state is lost.
        """
        since = (step + 1) // _STEPS * _STEPS - 1
        if since not in self._sums:
            later = self.step > since
            spent = np.concatenate(([0.0], np.cumsum(self.reduced[later])))
            reached = np.concatenate(([0.0], np.cumsum(self.change[later])))
            price = np.append(np.diff(spent), 1.0)
            rate = np.append(np.diff(reached), 0.0) / np.where(price > 0, price, 1.0)
            self._sums.clear()
            self._sums[since] = spent, reached, rate
        return self._sums[since]

    def total(self, step: int, budget: float) -> float:
        """Largest further change for one budget."""
        return float(self.after(step, np.array([budget]))[0])

    def after(self, step: int, budget: FloatArray) -> FloatArray:
        """Largest further change for budgets >= 0, rounded up."""
        spent, reached, rate = self._later(step)
        whole = np.searchsorted(spent, budget, side="right") - 1
        return reached[whole] + (budget - spent[whole]) * rate[whole] + 1.0

    def price(self, step: int, change: FloatArray) -> FloatArray:
        """Least sum of reduced losses for a further change >= 0, rounded down; inf if too far."""
        spent, reached, _ = self._later(step)
        paid: FloatArray = np.interp(change - 1.0, reached, spent)
        return np.where(change - 1.0 > reached[-1], np.inf, paid * (1 - 1e-9))


@dataclasses.dataclass(eq=False)
class _List:
    """States sorted by cost, and where they come from: parent and option after each step."""

    cost: IntArray
    loss: IntArray
    history: list[tuple[IntArray, IntArray]] = dataclasses.field(default_factory=list)

    def options(self, state: int) -> list[int]:
        """The options that lead to a state."""
        options = []
        for parent, option in reversed(self.history):
            options.append(int(option[state]))
            state = int(parent[state])
        return options[::-1]


def run(given: Steps, most_states: int, wide: float = WIDE) -> Outcome:
    """The best choice.

    Args:
        given: what to choose from.
        most_states: partial choices to look at before giving up.
        wide: see WIDE; 0 is lists throughout, inf an array.
    """
    ends = (given, given.backwards())
    lists = [_List(np.array([end.cost]), np.array([end.loss], dtype=np.int64)) for end in ends]
    seen = 0
    while sum(len(states.history) for states in lists) < len(given.steps):
        side = int(lists[1].cost.size < lists[0].cost.size)
        end, states = ends[side], lists[side]
        k = len(states.history)
        low, high = int(states.cost[0]), int(states.cost[-1])
        window = end.window(k, low, high)
        if window[0] > window[1]:
            return True, None, 0, seen
        width = max(window[1] - window[0], high - low)
        if side == 0 and width < min(_WIDEST, wide * (states.cost.size + _FEW)):
            return _run_array(given, k, states, seen, most_states)
        many = states.cost.size * end.steps[k].change.size
        seen += many
        if seen * LISTED > most_states or many > _MOST_LISTED:
            return False, None, 0, seen
        _extend(end, k, states, window)
        if not states.cost.size:
            return True, None, 0, seen
    first, second = lists
    partner = np.searchsorted(second.cost, given.room - first.cost, side="right") - 1
    fits = np.flatnonzero(partner >= 0)
    if not fits.size:
        return True, None, 0, seen
    losses = first.loss[fits] + second.loss[partner[fits]]
    state = int(fits[np.argmin(losses)])
    options = first.options(state) + second.options(int(partner[state]))[::-1]
    return True, options, int(losses.min()), seen


def _extend(given: Steps, k: int, states: _List, window: tuple[int, int]) -> None:
    """Add a step to a list, in place."""
    step, before = given.steps[k], states.cost.size
    costs = (states.cost[None, :] + step.change[:, None]).ravel()
    losses = (states.loss[None, :] + step.loss[:, None]).ravel()
    paid = given.multiplier * costs
    budget = given.left - (losses + paid - 2 * EPS * np.abs(paid))
    index = np.flatnonzero((budget >= 0) & (costs >= window[0]) & (costs <= window[1]))
    missing, budget = given.room - costs[index], budget[index]
    reachable = missing <= given.up.after(k, budget) + given.unspent
    reachable &= -missing <= given.down.after(k, budget)
    index = index[reachable]
    index = index[np.argsort(costs[index], kind="stable")]
    # Of two partial choices the dearer one must lose less.
    smallest = np.minimum.accumulate(losses[index])
    index = index[np.append(True, losses[index[1:]] < smallest[:-1])[: index.size]]
    states.cost, states.loss = costs[index], losses[index]
    states.history.append((index % before, index // before))


def _run_array(given: Steps, start: int, states: _List, seen: int, most_states: int) -> Outcome:
    """The steps from ``start`` on, with an array of costs."""
    low, high = int(states.cost[0]), int(states.cost[-1])
    best = np.full(high - low + 1, _NEVER, dtype=np.int64)
    # Of states with the same cost the last one loses least.
    best[states.cost - low] = np.minimum(states.loss, _NEVER)
    picks: list[tuple[int, npt.NDArray[np.unsignedinteger]]] = []
    for k, step in enumerate(given.steps[start:], start):
        seen += best.size * step.change.size
        if seen > most_states:
            return False, None, 0, seen
        first, last = given.window(k, low, high)
        if first > last:
            return True, None, 0, seen
        longer, pick = _extended(step, low, best, first, last)
        paid = given.multiplier * np.arange(first, last + 1)
        added = longer + paid
        np.abs(paid, out=paid)
        added -= 2 * EPS * paid
        if k % _STEPS == _STEPS - 1 or k + 1 == len(given.steps):
            missing = given.room - np.arange(first, last + 1, dtype=np.float64)
            added += np.where(
                missing < 0,
                given.down.price(k, -missing),
                given.up.price(k, np.maximum(missing - given.unspent, 0.0)),
            )
        longer[(added > given.left) | (longer > _MOST)] = _NEVER
        alive = np.flatnonzero(longer < _NEVER)
        if not alive.size:
            return True, None, 0, seen
        a, b = int(alive[0]), int(alive[-1]) + 1
        low, high, best = first + a, first + b - 1, longer[a:b]
        picks.append((low, pick[a:b]))
    fits = best[: max(given.room - low + 1, 0)]
    if not fits.size or int(fits.min()) == _NEVER:
        return True, None, 0, seen
    cost, loss = low + int(np.argmin(fits)), int(fits.min())
    options = []
    for step, (base, pick) in zip(reversed(given.steps), reversed(picks), strict=False):
        option = int(pick[cost - base])
        options.append(option)
        cost -= int(step.change[option])
    state = int(np.searchsorted(states.cost, cost, side="right")) - 1
    return True, states.options(state) + options[::-1], loss, seen


def _extended(
    step: Step, low: int, best: IntArray, first: int, last: int
) -> tuple[IntArray, npt.NDArray[np.unsignedinteger]]:
    """The least loss at each cost from ``first`` to ``last`` after a step, and its option.

    The option is carried in the last bits of the loss, so that one minimum finds both.
    """
    size, high = last - first + 1, low + best.size - 1
    longer = np.full(size, _NEVER, dtype=np.int64)
    pick = np.zeros(size, dtype=np.min_scalar_type(step.change.size))
    shifted, sums = best << _BITS, np.empty_like(best)
    for base in range(0, step.change.size, 2**_BITS):
        least = np.full(size, _NEVER << _BITS, dtype=np.int64)
        some = slice(base, base + 2**_BITS)
        pairs = zip(step.change[some].tolist(), step.loss[some].tolist(), strict=True)
        for option, (change, loss) in enumerate(pairs):
            a, b = max(low + change, first), min(high + change, last)
            if a > b:
                continue
            before = shifted[a - change - low : b - change - low + 1]
            there = np.add(before, (loss << _BITS) + option, out=sums[: before.size])
            here = least[a - first : b - first + 1]
            np.minimum(here, there, out=here)
        option_of = least & (2**_BITS - 1)
        least >>= _BITS
        better = least < longer
        np.copyto(longer, least, where=better)
        np.copyto(pick, option_of + base, where=better, casting="unsafe")
    return longer, pick
