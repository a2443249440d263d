"""What is added up for one layer while a model sees data."""

import dataclasses
import functools
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from rankopt.backends.gram import SymmetricSum, symmetric_numel


@dataclasses.dataclass
class Sums:
    """What has been added up for one layer; raw, float64.

    Attributes:
        rows: shape ``(in,)``.
        columns: shape ``(out,)``, if they are collected.
        elements: shape ``(out, in)``, if they are collected.
        second: the second moment, if it is collected and not another layer's.
        gradient: the gradient moment, if it is collected.
        traces: positions, sum of x^2, sum of g^2, shape ``(3,)``; zeros without moments.
        seen: batches in which the layer took part in the loss.
    """

    rows: Tensor
    columns: Tensor | None
    elements: Tensor | None
    second: SymmetricSum | None
    gradient: SymmetricSum | None
    traces: Tensor
    seen: int = 0

    @classmethod
    def zeros(
        cls, shape: tuple[int, int], needs: Collection[str], device: torch.device, *, own: bool
    ) -> "Sums":
        """Before anything was added.

        Args:
            shape: (out, in).
            needs: statistics beyond the rows.
            device: where they are summed.
            own: whether the second moment is this layer's own.
        """
        n_out, n_in = shape
        small, has = min(shape), needs.__contains__
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(
            zeros(n_in),
            zeros(n_out) if has("columns") else None,
            zeros(n_out, n_in) if has("elements") else None,
            SymmetricSum(small, device) if has("second_moment") and own else None,
            SymmetricSum(small, device) if has("gradient_moment") else None,
            zeros(3),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name; views, so that they can be reduced and restored in place."""
        found = {"rows": self.rows, "traces": self.traces}
        if self.columns is not None:
            found["columns"] = self.columns
        if self.elements is not None:
            found["elements"] = self.elements
        for name, moment in (("second", self.second), ("gradient", self.gradient)):
            if moment is not None:
                found |= {f"{name}.{k}": strip for k, strip in enumerate(moment.strips)}
        return found


def bytes_of_sums(shapes: Iterable[tuple[int, int]], needs: Collection[str]) -> int:
    """Memory that the sums of layers ``(out, in)`` take at most: shared moments count each time."""
    moments = len({"second_moment", "gradient_moment"} & set(needs))
    return 8 * sum(
        n_in
        + ("columns" in needs) * n_out
        + ("elements" in needs) * n_out * n_in
        + moments * symmetric_numel(min(n_out, n_in))
        for n_out, n_in in shapes
    )
