"""What a backend may know about one layer."""

import dataclasses

from torch import Tensor

from rankopt.errors import ProfileError

#: Everything that can be collected; see collector.
STATISTICS = ("rows", "columns", "elements", "second_moment", "gradient_moment")
#: Those that fit in any profile; what a backend derives from them alone can be derived again.
VECTORS = frozenset({"rows", "columns"})


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Raw sums of one layer with weight W (out, in); K = min(out, in). Float64.

    Attributes:
        units: how many units (examples, or tokens) were seen; sums divided by it are means.
        rows: Fisher information summed over outputs, shape ``(in,)``.
        columns: Fisher information summed over inputs, shape ``(out,)``.
        elements: Fisher information of each weight, shape ``(out, in)``.
        second_moment: sum of x x^T if in <= out, else of y y^T with y = W x; shape ``(K, K)``.
        gradient_moment: sum of g g^T if out <= in, else of gx gx^T with gx = W^T g; ``(K, K)``.
        positions: how many x were summed.
        input_energy: sum of x^2 over positions and features.
        gradient_energy: sum of g^2 over positions and features.
    """

    units: float
    rows: Tensor | None = None
    columns: Tensor | None = None
    elements: Tensor | None = None
    second_moment: Tensor | None = None
    gradient_moment: Tensor | None = None
    positions: float = 0.0
    input_energy: float = 0.0
    gradient_energy: float = 0.0

    @property
    def has_moments(self) -> bool:
        """Whether both second moments were collected."""
        return self.second_moment is not None and self.gradient_moment is not None

    def need(self, name: str) -> Tensor:
        """A statistic by name.

        Raises:
            ProfileError: it was not collected.
        """
        found = getattr(self, name)
        if found is None:
            raise ProfileError(f"the statistic {name!r} was not collected: profile again")
        assert isinstance(found, Tensor)
        return found


def together(this: Statistics, other: Statistics) -> Statistics:
    """Of all data, from those of its two parts."""

    def added(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
        return None if mine is None or theirs is None else mine + theirs

    return Statistics(
        units=this.units + other.units,
        rows=added(this.rows, other.rows),
        columns=added(this.columns, other.columns),
        elements=added(this.elements, other.elements),
        second_moment=added(this.second_moment, other.second_moment),
        gradient_moment=added(this.gradient_moment, other.gradient_moment),
        positions=this.positions + other.positions,
        input_energy=this.input_energy + other.input_energy,
        gradient_energy=this.gradient_energy + other.gradient_energy,
    )
