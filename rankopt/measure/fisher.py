"""Fisher information of one weight from its layer's inputs and output gradients, and its sums.

For a linear layer y = x W^T + b and unit n (an example), with inputs X_n (T, in) and gradients of
the unit's loss with respect to the outputs G_n (T, out), the gradient of the weight is
dW_n = G_n^T X_n. The Fisher information of weight (o, i), summed over units, is

    elements_oi = sum_n (dW_n)_oi^2,   rows_i = sum_o elements_oi,   columns_o = sum_i elements_oi.

The gradient is squared per unit, *then* summed: the square of a batch gradient is another
quantity. A *row* is an input feature, as in Hsu et al. (ICLR 2022), where y = xW. Rows and columns
need no weight gradient:

    rows_i    = sum_n sum_t X_n[t, i] (G_n G_n^T X_n)[t, i]
    columns_o = sum_n sum_t G_n[t, o] (X_n X_n^T G_n)[t, o]

This Gram form costs 2 T^2 (in + out) operations each and is taken when that is less than the
2 T in out of forming dW_n, which serves both.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rankopt.backends.gram import SymmetricSum, symmetric_numel


@dataclasses.dataclass(frozen=True)
class SquaredGradients:
    """What one batch adds, float64.

    Attributes:
        rows: shape ``(in,)``.
        columns: shape ``(out,)``, or None if they were not asked for.
        elements: shape ``(out, in)``, in the precision of the inputs, or None.
    """

    rows: Tensor
    columns: Tensor | None = None
    elements: Tensor | None = None


def squared_gradients(
    x: Tensor, g: Tensor, *, columns: bool = False, elements: bool = False
) -> SquaredGradients:
    """Squared gradients of a linear layer's weight, summed over units.

    Args:
        x: inputs, shape ``(B, T, in)``, float32 or float64.
        g: gradients of each unit's loss with respect to the outputs, shape ``(B, T, out)``.
        columns: also sum over input features.
        elements: also for each weight.
    """
    if elements:
        return _elementwise(x, g)
    tokens, n_in, n_out = x.shape[1], x.shape[2], g.shape[2]
    gram_work = 2 * tokens**2 * (n_in + n_out) * (2 if columns else 1)
    direct_work = 2 * tokens * n_in * n_out + 24 * n_in * n_out
    if 1.1 * gram_work < direct_work:
        return SquaredGradients(_gram_form(x, g), _gram_form(g, x) if columns else None)
    return _direct_form(x, g, columns)


# Within a unit sums stay in the precision of the inputs, which torch adds up in cascades; a float64
# sum would first copy all it adds.


def _gram_form(a: Tensor, b: Tensor) -> Tensor:
    """sum_n sum_t a[t, i] (b b^T a)[t, i], shape ``(features of a,)``, float64."""
    products = torch.bmm(torch.bmm(b, b.mT), a).mul_(a)
    return products.sum(1).sum(0, dtype=torch.float64).clamp_min_(0.0)


def _direct_form(x: Tensor, g: Tensor, columns: bool) -> SquaredGradients:
    n_in, n_out = x.shape[2], g.shape[2]
    rows = torch.zeros(n_in, dtype=torch.float64, device=x.device)
    summed = torch.zeros(n_out, dtype=torch.float64, device=x.device) if columns else None
    gradient = x.new_empty(n_in, n_out)
    for inputs, outputs in zip(x, g, strict=True):
        torch.mm(inputs.T, outputs, out=gradient)
        if summed is None:
            rows += torch.linalg.vector_norm(gradient, dim=1).square_()
        else:
            gradient.square_()
            rows += gradient.sum(1)
            summed += gradient.sum(0)
    return SquaredGradients(rows, summed)


def _elementwise(x: Tensor, g: Tensor) -> SquaredGradients:
    gradient = x.new_empty(g.shape[2], x.shape[2])
    squares = torch.zeros_like(gradient)
    for inputs, outputs in zip(x, g, strict=True):
        torch.mm(outputs.T, inputs, out=gradient)
        squares.addcmul_(gradient, gradient)
    return SquaredGradients(squares.sum(0).double(), squares.sum(1).double(), squares)


def squared_gradients_of_embedding(
    ids: Tensor, g: Tensor, vocabulary: int, *, elements: bool = False
) -> SquaredGradients:
    """The same for an embedding: a linear layer whose inputs are one-hot, never formed.

    Args:
        ids: shape ``(B, T)``.
        g: gradients with respect to the outputs, shape ``(B, T, out)``.
        vocabulary: in.
        elements: also for each weight.
    """
    n_out = g.shape[2]
    rows = torch.zeros(vocabulary, dtype=torch.float64, device=g.device)
    columns = torch.zeros(n_out, dtype=torch.float64, device=g.device)
    whole = g.new_zeros(n_out, vocabulary) if elements else None
    for words, outputs in zip(ids, g, strict=True):
        seen, place = words.unique(return_inverse=True)
        squares = outputs.new_zeros(len(seen), n_out).index_add_(0, place, outputs).square_()
        rows[seen] += squares.sum(1, dtype=torch.float64)
        columns += squares.sum(0, dtype=torch.float64)
        if whole is not None:
            whole[:, seen] += squares.T
    return SquaredGradients(rows, columns, whole)


def as_inputs(ids: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Ids as one-hot inputs, shape ``(..., in)``: for embeddings with few rows."""
    return one_hot(ids, vocabulary).to(dtype)


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


#: Of the names of each bank's sums in a file.
_PREFIXES = ("", "odd.")


class Banks:
    """The sums of all layers; those of batches of even and of odd numbers apart, if there are two.

    Args:
        shapes: layer name -> (out, in).
        needs: statistics beyond the rows.
        count: 1, or 2.

    Attributes:
        owners: layer name -> the layer that holds its second moment, itself or another.
        sums: layer name -> sums, in the bank that is added to.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], needs: Collection[str], count: int
    ) -> None:
        self.owners: dict[str, str] = {}
        self._shapes, self._needs = shapes, needs
        self._all: list[dict[str, Sums]] = [{} for _ in range(count)]
        self.sums = self._all[0]

    def turn(self, number: int) -> None:
        """Choose the bank of a batch, by its number."""
        self.sums = self._all[number % len(self._all)]

    def of(self, name: str, device: torch.device) -> Sums:
        """Of one layer, in the bank that is added to; zeros at first."""
        if name not in self.sums:
            own = self.owners.setdefault(name, name) == name
            self.sums[name] = Sums.zeros(self._shapes[name], self._needs, device, own=own)
        return self.sums[name]

    def complete(self) -> list[dict[str, Sums]]:
        """Of each bank, in the order of the layers; zeros for those without any."""
        found = []
        for half in range(len(self._all)):
            self.turn(half)
            known = next((x.rows.device for x in self.sums.values()), torch.device("cpu"))
            found.append({name: self.of(name, known) for name in self._shapes})
        return found

    def found(self) -> list[dict[str, Sums]]:
        """Of each bank; where there are two, both have the same layers."""
        return self._all if len(self._all) == 1 else self.complete()

    def counts(self) -> list[dict[str, int]]:
        """Of each bank: layer name -> batches in which it took part."""
        return [{name: sums.seen for name, sums in bank.items()} for bank in self._all]

    def tensors(self) -> dict[str, Tensor]:
        """``NAME/KIND`` as in ``Sums.tensors``, of the second bank ``NAME/odd.KIND``; views."""
        return {
            f"{name}/{prefix}{kind}": tensor
            for prefix, bank in zip(_PREFIXES, self._all, strict=False)
            for name, sums in bank.items()
            for kind, tensor in sums.tensors().items()
        }

    def restore(
        self,
        tensors: Mapping[str, Tensor],
        owners: Mapping[str, str],
        counts: Sequence[Mapping[str, int]],
        device_of: Callable[[str], torch.device],
    ) -> None:
        """Take over sums.

        Args:
            tensors: see tensors.
            owners: see Banks.
            counts: see counts.
            device_of: layer name -> where it is summed.

        Raises:
            ValueError: they are not those of these layers.
        """
        named = {name for each in counts for name in each}
        if not {*owners, *owners.values(), *named} <= set(self._shapes):
            raise ValueError("its layers are not those of the model")
        if any(counts[len(self._all) :]):
            raise ValueError("it has two halves of the data apart, for cross_fit")
        self.owners = dict(owners)
        for half, prefix in enumerate(_PREFIXES[: len(self._all)]):
            self.turn(half)
            for name, batches in counts[half].items():
                sums = self.of(name, device_of(name))
                sums.seen = batches
                for kind, tensor in sums.tensors().items():
                    key = f"{name}/{prefix}{kind}"
                    found = tensors.get(key)
                    if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
                        raise ValueError(f"{key} is not there, or of another shape")
                    tensor.copy_(found)


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
