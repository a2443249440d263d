"""Taps: what a tensor and its gradient are in the backward pass, without changing either."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Sink = Callable[[Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    """The identity; its backward hands a saved tensor and the gradient to a sink.

    The saved tensor lets activation checkpointing keep its saving; the anchor makes a graph
    although all weights are frozen.
    """

    @staticmethod
    def forward(ctx: Any, passed: Tensor, saved: Tensor, anchor: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.sink = sink
        return passed.view_as(passed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (saved,) = ctx.saved_tensors
        ctx.sink(saved, gradients[0])
        return gradients[0], None, None, None


def tap(passed: Tensor, saved: Tensor, sink: Sink) -> Tensor:
    """The tensor itself; in backward the sink is given ``saved`` and the tensor's gradient."""
    anchor = torch.zeros((), device=passed.device, requires_grad=True)
    tapped: Tensor = _Tap.apply(passed, saved, anchor, sink)  # type: ignore[no-untyped-call]
    return tapped
