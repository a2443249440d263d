"""An instance's options under a rank multiple, a budget and an objective.

A layer of shape (m, n) with squared singular values s_1 >= s_2 >= ... offers the ranks q, 2q, ...
that cost less than dense, rank r with loss sum_{k>r} s_k, and "dense" at cost mn with loss 0. As a
pair of factors rank r costs r (m + n), in the pivoted form r (m + n - r): concave, and below mn up
to full rank. Losses are summed from the small end, so the tail keeps its digits. ``sum`` minimises
the total loss, ``layerwise`` the sum of the lost fractions.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
from instances import FloatArray, Instance, Layer

from rankopt_solvers import Group, Problem

IntArray = npt.NDArray[np.int64]
Form = Literal["pairs", "pivoted"]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An instance with a rank multiple, a budget and an objective, as plain arrays.

    Attributes:
        ranks: the rank of every option, one array per layer; -1 is dense, the last option.
        costs: parameters of every option, increasing.
        losses: loss of every option, decreasing to 0.
        budget: largest number of parameters.
        total: the loss of keeping nothing.
    """

    instance: Instance
    multiple: int
    keep: float
    objective: str
    ranks: tuple[IntArray, ...]
    costs: tuple[IntArray, ...]
    losses: tuple[FloatArray, ...]
    budget: int
    total: float

    @property
    def name(self) -> str:
        """Instance, rank multiple and budget."""
        return f"{self.instance.name} q={self.multiple} {self.keep:.0%}"

    @property
    def options(self) -> int:
        """Options of all layers."""
        return sum(cost.size for cost in self.costs)

    def problem(self) -> Problem:
        """A new Problem, without anything that an earlier solve may have prepared."""
        tables = zip(self.instance.layers, self.costs, self.losses, strict=True)
        groups = tuple(Group(layer.name, cost, loss) for layer, cost, loss in tables)
        return Problem(groups, self.budget)

    def retained(self, loss: float) -> float:
        """Fraction of the information that a choice with this loss retains."""
        return 1.0 - loss / self.total


def offered_ranks(layer: Layer, multiple: int, form: Form = "pairs") -> IntArray:
    """Multiples that save parameters; the multiple is halved where it leaves none."""
    most = layer.break_even if form == "pairs" else min(layer.rows, layer.columns) - 1
    while multiple > most and multiple > 1:
        multiple //= 2
    return np.arange(multiple, most + 1, multiple, dtype=np.int64)


def cases(
    instance: Instance,
    multiple: int,
    keeps: Iterable[float],
    objectives: Iterable[str],
    form: Form = "pairs",
) -> Iterator[Case]:
    """One case for each objective and kept fraction, on common tables."""
    ranks, costs, losses, totals = [], [], [], []
    for layer, spectrum in zip(instance.layers, instance.spectra, strict=True):
        tail = np.append(np.cumsum(spectrum[::-1])[::-1], 0.0)
        rank = offered_ranks(layer, multiple, form)
        step = layer.step - (rank if form == "pivoted" else 0)
        ranks.append(np.append(rank, -1))
        costs.append(np.append(rank * step, layer.dense))
        losses.append(np.append(tail[rank], 0.0))
        totals.append(float(tail[0]))
    shares = [loss / total for loss, total in zip(losses, totals, strict=True)]
    for objective in objectives:
        layerwise = objective == "layerwise"
        for keep in keeps:
            yield Case(
                instance,
                multiple,
                keep,
                objective,
                tuple(ranks),
                tuple(costs),
                tuple(shares if layerwise else losses),
                int(keep * instance.dense),
                float(len(totals)) if layerwise else float(np.sum(totals)),
            )
