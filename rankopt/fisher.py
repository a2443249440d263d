"""Exact per-example row Fisher, without forming a weight's gradient where it is not needed.

For a linear layer y = x W^T + b and example n, with inputs X_n (T, in) and gradients of the
example's loss with respect to the outputs G_n (T, out), the gradient of the weight is
dW_n = G_n^T X_n. The empirical Fisher information of input feature i, summed over its row of
weights (a column of W in our layout), is

    rows_i = sum_n sum_o (dW_n)_oi^2 = sum_n sum_t X_n[t, i] (G_n G_n^T X_n)[t, i].

The gradient is squared per example, *then* summed: the square of a batch gradient is another
quantity. The right-hand side needs only T x T matrices and is taken when it is cheaper.

Weights are frozen, so autograd computes gradients of activations only. A layer used several times
in one forward pass (ALBERT) is one weight: its uses are concatenated along T before squaring.
"""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.errors import ModelError

#: Bytes of weight gradients that may be alive at once.
_SCRATCH = 64 * 2**20


def summed_row_fisher(x: Tensor, g: Tensor) -> Tensor:
    """Row Fisher summed over examples.

    Args:
        x: inputs, shape ``(B, T, in)``, float32 or float64.
        g: gradients of each example's loss with respect to the outputs, shape ``(B, T, out)``.

    Returns:
        Shape ``(in,)``, float64, >= 0.
    """
    examples, tokens, n_in = x.shape
    n_out = g.shape[2]
    gram_work = 2 * tokens**2 * (n_in + n_out)
    direct_work = 2 * tokens * n_in * n_out + 24 * n_in * n_out
    if 1.25 * gram_work < direct_work:
        rows = torch.bmm(torch.bmm(g, g.mT), x).mul_(x).sum((0, 1), dtype=torch.float64)
        return rows.clamp_min_(0.0)
    rows = torch.zeros(n_in, dtype=torch.float64, device=x.device)
    chunk = max(1, _SCRATCH // (n_in * n_out * x.element_size()))
    for start in range(0, examples, chunk):
        part = slice(start, start + chunk)
        gradients = torch.bmm(x[part].mT, g[part])
        rows += gradients.square_().sum((0, 2), dtype=torch.float64)
    return rows


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward hands input and output gradient to a sink.

    The input is a saved tensor, so activation checkpointing keeps its saving; the anchor makes a
    graph although all weights are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, sink: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.sink(x, gradients[0])
        return gradients[0], None, None, None


class RowFisher:
    """Collects the row Fisher of layers while used as a context manager.

    In the context the model is in eval mode (no dropout) and its weights are frozen; both are
    restored on exit. Usage: set ``examples`` and ``tokens`` of the coming batch with ``begin``, run
    the forward pass, then ``backward`` with the *sum* of the examples' losses.

    Attributes:
        rows: layer name -> row Fisher summed over all examples so far, shape ``(in,)``, float64.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.model, self.layers = model, layers
        self.rows: dict[str, Tensor] = {}
        self._uses: dict[str, int] = {}
        self._pending: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._examples, self._tokens = 0, 0
        self._in_backward = False

    def __enter__(self) -> "RowFisher":
        self._modes = {module: module.training for module in self.model.modules()}
        self._required = {p: p.requires_grad for p in self.model.parameters()}
        self.model.eval().requires_grad_(False)
        self._hooks = [
            module.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, module in self.layers.items()
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, training in self._modes.items():
            module.training = training
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)

    def begin(self, examples: int, tokens: int) -> None:
        """Announce a batch of ``examples`` sequences of ``tokens`` positions."""
        self._examples, self._tokens = examples, tokens
        self._uses.clear()
        self._pending.clear()

    def backward(self, loss: Tensor) -> None:
        """Back-propagate the sum of the examples' losses and add up.

        Raises:
            ModelError: a gradient is not finite, naming the layer.
        """
        self._in_backward = True
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            self._in_backward = False
        for name in list(self._pending):
            # Uses of which some did not reach the loss.
            self._flush(name)
        for name, rows in self.rows.items():
            if not bool(torch.isfinite(rows).all()):
                raise ModelError(f"layer {name}: gradients of the last batch are NaN or infinite")

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            if not self._in_backward:
                # Checkpointing runs a layer again in backward: still one use.
                self._uses[name] = self._uses.get(name, 0) + 1
            if not torch.is_grad_enabled():
                return output
            anchor = torch.zeros((), device=output.device, requires_grad=True)
            tapped: Tensor = _Tap.apply(  # type: ignore[no-untyped-call]
                output, x.detach(), anchor, lambda x, g: self._record(name, x, g)
            )
            return tapped

        return hook

    def _record(self, name: str, x: Tensor, g: Tensor) -> None:
        pending = self._pending.setdefault(name, [])
        pending.append((self._by_example(name, x), self._by_example(name, g)))
        if len(pending) == self._uses[name]:
            self._flush(name)

    def _flush(self, name: str) -> None:
        pending = self._pending.pop(name)
        if len(pending) == 1:
            x, g = pending[0]
        else:
            x, g = (torch.cat(parts, dim=1) for parts in zip(*pending, strict=True))
        rows = summed_row_fisher(x, g)
        self.rows[name] = self.rows[name] + rows if name in self.rows else rows

    def _by_example(self, name: str, tensor: Tensor) -> Tensor:
        """Any layout to ``(B, T, features)``, in float32 or wider before anything is squared."""
        wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        examples, features = self._examples, wide.shape[-1]
        rows = wide.numel() // features
        if wide.dim() == 2 and rows not in (examples, examples * self._tokens) and examples > 1:
            raise ModelError(
                f"layer {name} sees {rows} rows for {examples} examples of {self._tokens} tokens: "
                "which example a row belongs to is lost (routed experts?); use batch size 1"
            )
        if rows % examples or (wide.dim() > 2 and wide.shape[0] % examples):
            raise ModelError(
                f"layer {name}: inputs of shape {tuple(wide.shape)} for {examples} examples; "
                "profile with batch size 1"
            )
        return wide.reshape(examples, -1, features)
