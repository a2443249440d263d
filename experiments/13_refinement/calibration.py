"""What both baselines need: layers, prepared batches, moments without padding, and surgery."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.apply.surgery import low_rank, replace
from rankopt.errors import ModelError
from rankopt.layers import Form
from rankopt.measure.layout import Layout
from rankopt.measure.loss import ModelLoss
from rankopt.measure.padding import frames_of, masks_of
from rankopt.measure.taps import input_of
from rankopt.model.tasks import Batch, positions_of, task_of
from rankopt.model.weights import device_of, is_conv1d

#: Share of the mean diagonal of a moment that is added to its diagonal.
RIDGE = 1e-6

#: ``up`` (out, r) and ``down`` (r, in).
Factors = tuple[Tensor, Tensor]


def linear(model: nn.Module, name: str) -> nn.Module:
    """A layer by name.

    Raises:
        ModelError: it is none of nn.Linear or Conv1D.
    """
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        raise ModelError(f"layer {name} is a {type(module).__name__}, no dense nn.Linear or Conv1D")
    return module


def prepared(model: nn.Module, batches: Sequence[Any]) -> tuple[str, list[Batch]]:
    """The task, and batches on the device with labels where padding is left out.

    Raises:
        ModelError: an encoder-decoder, which has two masks.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder: not covered")
    loss = ModelLoss(task_of(model)).settled(model, batches[0])
    device = device_of(model)
    return loss.task, [loss.ready(batch, device, number) for number, batch in enumerate(batches)]


def layout_of(model: nn.Module, task: str, ready: Batch) -> Layout:
    """Which positions of a prepared batch are padding."""
    masks = masks_of(model, task, ready)
    frames = frames_of(model, masks[0])
    return Layout.of(len(ready["labels"]), positions_of(ready), masks, frames=frames)


def positions(x: Tensor, layout: Layout) -> Tensor:
    """Inputs at what is no padding, ``(positions, in)``; float64, as small directions need it."""
    flat = x.detach().double().reshape(-1, x.shape[-1])
    mask = layout.mask_for(x.shape[:-1])
    return flat if mask is None else flat[mask.reshape(-1)]


def ridge_of(moment: Tensor, ridge: float) -> Tensor:
    """What is added to a moment: a share of its mean diagonal, times the identity."""
    return ridge * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)


def root_of(name: str, moment: Tensor, ridge: float) -> Tensor:
    """Lower triangular R with R R^T = the moment and its ridge."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(moment + ridge_of(moment, ridge))
    if failed:
        raise ModelError(
            f"layer {name}: its input moment is singular at ridge {ridge:g}: raise the ridge, or "
            "leave the layer out if it is given nothing but zeros"
        )
    return root


@contextlib.contextmanager
def watched(
    modules: Mapping[str, nn.Module], look: Callable[[str, Tensor], object]
) -> Iterator[None]:
    """What each of some modules is given is looked at, by name."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            look(name, input_of(args, kwargs))

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(hook_of(name), with_kwargs=True))
        yield


def put(model: nn.Module, factors: Mapping[str, Factors | None], form: Form) -> None:
    """Replace dense layers by low-rank ones of these factors, in place; None stays dense.

    Raises:
        ModelError: a layer is none of nn.Linear or Conv1D.
    """
    made: dict[str, nn.Module] = {}
    for name, each in factors.items():
        if each is not None:
            module = linear(model, name)
            up, down = each
            made[name] = low_rank(module, down, up, getattr(module, "bias", None), form)
    replace(model, made)
