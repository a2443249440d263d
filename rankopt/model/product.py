"""The weight of a low-rank layer, formed when a value is asked for and not before.

Models look at a layer's ``weight`` in every pass to learn its dtype or device (T5 does so three
times a block). A ``Product`` knows those without a multiplication; an operation that needs numbers
forms them once. To autograd it is an operation with the factors as its inputs.

Two factors L and R are the matrix L R. With an order, of the columns of a pivoted matrix, they are
[L, L R] in that order (see pivoted); turned, its transpose.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def ordered(x: Tensor, index: Tensor) -> Tensor:
    """``x.index_select(-1, index)`` of a permutation, which takes CPUs several times as long.

    Args:
        x: shape ``(..., n)``.
        index: of each place where it comes from, int64 ``(n,)``.
    """
    return x.gather(-1, index.expand_as(x))


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """An order of columns.

    Attributes:
        index: a permutation: of each column the place that it comes from.
        sends: of each column the place that it goes to, instead.
    """

    index: Tensor
    sends: bool = False

    def of(self, columns: Tensor) -> Tensor:
        """Columns in this order."""
        return ordered(columns, self._places(self.sends))

    def undone(self, columns: Tensor) -> Tensor:
        """What was put in this order as it was before."""
        return ordered(columns, self._places(not self.sends))

    def _places(self, inverse: bool) -> Tensor:
        # The first versions of transformers 5 cast whole numbers, and ask for weights meanwhile.
        index = self.index.long()
        return index.argsort() if inverse else index


def product(
    left: Tensor, right: Tensor, order: Order | None = None, *, turned: bool = False
) -> Tensor:
    """``left @ right``, or ``[left, left @ right]`` in some order, formed at its first use.

    Where operations are recorded rather than done (torch.compile, export, tracing, fake tensors,
    transforms of torch.func), it is the multiplication itself: what is not used is dropped there.
    """
    plain = all(type(factor) in (Tensor, nn.Parameter) for factor in (left, right))
    recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if not plain or recorded or torch._C._are_functorch_transforms_active():
        return _formed(left, right, order, turned)
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        formed: Tensor = _Forming.apply(left, right, order, turned)  # type: ignore[no-untyped-call]
        return formed
    return Product(left, right, order, turned)


def _formed(left: Tensor, right: Tensor, order: Order | None, turned: bool) -> Tensor:
    whole = left @ right
    if order is not None:
        whole = order.of(torch.cat([left, whole], 1))
    return whole.T.contiguous() if turned else whole


class Product(Tensor):
    """A matrix that is kept as its factors until an operation reads it.

    Args:
        left: shape ``(m, r)``.
        right: shape ``(r, n)``, of the same dtype and device.
        order: of the columns of [left, left @ right]; or None.
        turned: whether the matrix is the transpose of that.
    """

    _parts: tuple[Tensor, Tensor, Order | None, bool]
    _formed: Tensor | None

    @staticmethod
    def __new__(
        cls, left: Tensor, right: Tensor, order: Order | None = None, turned: bool = False
    ) -> "Product":
        """Without memory for the matrix."""
        shape = (left.shape[0], right.shape[1] if order is None else len(order.index))
        made: Product = Tensor._make_wrapper_subclass(
            cls, shape[::-1] if turned else shape, dtype=left.dtype, device=left.device
        )
        made._parts, made._formed = (left.detach(), right.detach(), order, turned), None
        return made

    def formed(self) -> Tensor:
        """The matrix as a plain tensor, without gradients; what is changed in place stays so."""
        if self._formed is None:
            self._formed = _formed(*self._parts)
        return self._formed

    def tolist(self) -> Any:
        """As of any tensor; like those below it reads memory without being an operation."""
        return self.formed().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As of any tensor."""
        plain = self.detach() if force or not self.requires_grad else self.clone()
        return plain.numpy(force=force)

    def data_ptr(self) -> int:
        """As of any tensor."""
        return self.formed().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """As of any tensor."""
        return self.formed().untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.formed(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.formed().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    # Above autograd all goes its usual way; operations come here below it, to be done.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation with the matrix in its place."""
        args, kwargs = tree_map(_plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def _plain(value: Any) -> Any:
    return value.formed() if isinstance(value, Product) else value


class _Forming(torch.autograd.Function):
    """Y = L R: dL = dY Rᵀ, dR = Lᵀ dY. Y = [L, L R]: dL = dY_1 + dY_2 Rᵀ, dR = Lᵀ dY_2."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, order: Order | None, turned: bool) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.save_for_forward(left, right)
        ctx.order, ctx.turned = order, turned
        return Product(left, right, order, turned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        of_left, of_right = ctx.needs_input_grad[:2]
        rest, kept = grads[0].T if ctx.turned else grads[0], None
        if ctx.order is not None:
            kept, rest = ctx.order.undone(rest).tensor_split([len(right)], 1)
        grad = rest @ right.T if of_left else None
        if grad is not None and kept is not None:
            grad = kept + grad
        return grad, left.T @ rest if of_right else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        left, right = ctx.saved_tensors
        of_left, of_right = tangents[:2]
        terms = [] if of_left is None else [of_left @ right]
        moved = sum(terms if of_right is None else [*terms, left @ of_right])
        if ctx.order is not None:
            kept = torch.zeros_like(left) if of_left is None else of_left
            moved = ctx.order.of(torch.cat([kept, moved], 1))
        return moved.T if ctx.turned else moved
