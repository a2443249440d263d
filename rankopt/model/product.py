"""The product of two factors, multiplied when a value is asked for and not before.

Models look at a layer's ``weight`` in every pass to learn its dtype or device (T5 does so three
times a block). A ``Product`` knows those without a multiplication; an operation that needs numbers
forms them once. To autograd it is an operation with the factors as its inputs.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of two matrices, formed at its first use.

    Where operations are recorded rather than done (torch.compile, export, tracing, fake tensors,
    transforms of torch.func), it is the multiplication itself: what is not used is dropped there.
    """
    plain = all(type(factor) in (Tensor, nn.Parameter) for factor in (left, right))
    recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if not plain or recorded or torch._C._are_functorch_transforms_active():
        return left @ right
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        formed: Tensor = _Multiplication.apply(left, right)  # type: ignore[no-untyped-call]
        return formed
    return Product(left, right)


class Product(Tensor):
    """A matrix that is kept as its factors until an operation reads it.

    Args:
        left: shape ``(m, r)``.
        right: shape ``(r, n)``, of the same dtype and device.
    """

    _left: Tensor
    _right: Tensor
    _formed: Tensor | None

    @staticmethod
    def __new__(cls, left: Tensor, right: Tensor) -> "Product":
        """Without memory for the matrix."""
        made: Product = Tensor._make_wrapper_subclass(
            cls, (left.shape[0], right.shape[1]), dtype=left.dtype, device=left.device
        )
        made._left, made._right, made._formed = left, right, None
        return made

    def formed(self) -> Tensor:
        """The matrix as a plain tensor, without gradients; what is changed in place stays so."""
        if self._formed is None:
            self._formed = self._left.detach() @ self._right.detach()
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


class _Multiplication(torch.autograd.Function):
    """Y = L R: dL = dY Rᵀ, dR = Lᵀ dY."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.save_for_forward(left, right)
        return Product(left, right)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        grad, (of_left, of_right) = grads[0], ctx.needs_input_grad
        return (
            grad @ right.T if of_left else None,
            left.T @ grad if of_right else None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        left, right = ctx.saved_tensors
        of_left, of_right = tangents
        terms = [] if of_left is None else [of_left @ right]
        return sum(terms if of_right is None else [*terms, left @ of_right])
