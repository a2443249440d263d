"""Taps: what a tensor and its gradient are in the backward pass; and what they say of each layer.

The gradient of a weight W, as autograd has it, is the sum of g x^T over all that is made of W. If
that over the inputs and output gradients that a layer's taps see is another, then W is used where
no hook sees it. A probe compares the two on one batch, a layer at a time, so that no more than one
layer's gradient is in memory.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rankopt.errors import DataError, ModelError
from rankopt.measure.layout import widened
from rankopt.model.matrices import is_output, is_subclass
from rankopt.model.offloaded import read_again
from rankopt.model.sharded import is_distributed
from rankopt.model.tasks import in_eval
from rankopt.model.weights import device_of, is_conv1d

Sink = Callable[[Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    """The identity; its backward hands a saved tensor and the gradient to a sink.

    The saved tensor lets activation checkpointing keep its saving; the anchor makes a graph
    although all weights are frozen. The tensor is passed on as one changed in place: what comes
    after may change it in place itself, as it may not change a view.
    """

    @staticmethod
    def forward(ctx: Any, passed: Tensor, saved: Tensor, anchor: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.sink = sink
        ctx.mark_dirty(passed)
        return passed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (saved,) = ctx.saved_tensors
        ctx.sink(saved, gradients[0])
        return gradients[0], None, None, None


def tap(passed: Tensor, saved: Tensor, sink: Sink) -> Tensor:
    """The tensor itself, which must be nobody else's; in backward the sink is given ``saved`` and
    the tensor's gradient.
    """
    anchor = torch.zeros((), device=passed.device, requires_grad=True)
    tapped: Tensor = _Tap.apply(passed, saved, anchor, sink)  # type: ignore[no-untyped-call]
    return tapped


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer was given: its first argument, or ``input`` by name."""
    return args[0] if args else kwargs[name_of_input(kwargs)]


def name_of_input(kwargs: Mapping[str, Any]) -> str:
    """The name of what a layer was given, where it was given by name."""
    return "input" if "input" in kwargs else next(iter(kwargs))


def largest_scale(fits: Callable[[float], bool]) -> float | None:
    """The largest power of two, of some, that fits: gradients in float16 vanish or overflow."""
    return next((2.0**power for power in range(15, -25, -4) if fits(2.0**power)), None)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode (no dropout), its weights without gradients; as it was afterwards."""
    # By module and name: offloading puts other objects in their place. What is not initialised yet
    # will be in the first forward pass.
    held = [
        (module, name, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not is_lazy(parameter)
    ]
    try:
        with in_eval(model):
            for module, name, _ in held:
                module.get_parameter(name).requires_grad_(False)
            yield
    finally:
        for module, name, required in held:
            module.get_parameter(name).requires_grad_(required)


def require_gradients(model: nn.Module, caller: str) -> None:
    """Refuse what has no gradients: ``torch.inference_mode``, and weights that were made in it.

    Args:
        model: whose weights.
        caller: what is to be called outside of it.

    Raises:
        ModelError: says which.
    """
    if torch.is_inference_mode_enabled():
        raise ModelError(
            f"torch.inference_mode is on, and there are no gradients in it: call {caller} outside "
            "of it (torch.no_grad does no harm)"
        )
    for name, parameter in model.named_parameters():
        if not is_lazy(parameter) and parameter.is_inference():
            raise ModelError(
                f"parameter {name} was made under torch.inference_mode, where nothing has a "
                "gradient: load the model outside of it"
            )


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[contextlib.ExitStack]:
    """Gradients on and autocast off, whatever the caller has switched; and what is added to it.

    Offloaded weights are not kept for the backward pass.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(read_again(model))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device_of(model).type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield stack


@contextlib.contextmanager
def copied_inputs(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Each is given a copy of its input, which later changes in place do not reach."""

    def copy(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (
            tuple(x.clone() if isinstance(x, Tensor) else x for x in args),
            {k: x.clone() if isinstance(x, Tensor) else x for k, x in kwargs.items()},
        )

    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(copy, with_kwargs=True))
        yield


@dataclasses.dataclass(frozen=True)
class Findings:
    """What one batch says of the layers.

    Attributes:
        refused: layer name -> why its weight is not what the taps say.
        silent: layer name -> why no gradient reached it; on another batch one may.
        copied: whether inputs are changed in place after a layer was given them.
    """

    refused: dict[str, str]
    silent: dict[str, str]
    copied: bool = False


class Hooked:
    """A context in which a model is frozen and every layer has a forward hook.

    Args:
        model: whose layers they are.
        modules: layer name -> plain nn.Linear, Conv1D or nn.Embedding.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.model, self.modules = model, dict(modules)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(frozen(self.model))
        for name, module in self.modules.items():
            hook = module.register_forward_hook(self._forward_hook(name), with_kwargs=True)
            self._stack.enter_context(hook)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _forward_hook(self, name: str) -> Callable[..., Any]:
        raise NotImplementedError


class Probe(Hooked):
    """Stands in the place of a Collector for one batch.

    Args:
        model: whose layers they are.
        modules: layer name -> plain nn.Linear, Conv1D or nn.Embedding.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(model, modules)
        self._refused: dict[str, str] = {}
        self._used, self._heard, self._reached = set[str](), set[str](), set[int]()
        self._made: dict[int, tuple[Tensor, float]] = {}
        self._examples = 1

    def __enter__(self) -> Self:
        super().__enter__()
        names: dict[nn.Parameter, list[str]] = {}
        for name, module in self.modules.items():
            weight = module.get_parameter("weight")
            # What is elsewhere for the most of the time gets no gradient to compare with.
            if not weight.is_meta and not is_distributed(weight):
                names.setdefault(weight, []).append(name)
        for weight, sharing in names.items():
            self._stack.callback(setattr, weight, "grad", weight.grad)
            weight.grad = None
            weight.requires_grad_(True)
            compare = self._comparison(sharing)
            handle = weight.register_post_accumulate_grad_hook(compare)  # type: ignore[no-untyped-call]
            self._stack.enter_context(handle)
        return self

    def begin(self, examples: int, *_: Any, **__: Any) -> None:
        """As a Collector."""
        self._examples = examples

    def expect(self, examples: int, *_: Any) -> None:
        """As a Collector."""
        self._examples = examples

    def backward(self, loss: Tensor, *, again: bool = False) -> None:
        """As a Collector.

        Raises:
            ModelError: the model makes no graph where it is not trained.
        """
        if not loss.requires_grad:
            kind = type(self.model).__name__
            raise ModelError(f"the loss of {kind} has no gradient in eval mode: not covered")
        loss.backward(retain_graph=again)  # type: ignore[no-untyped-call]

    def findings(self) -> Findings:
        """After a batch."""
        silent = {}
        for name, module in self.modules.items():
            if name in self._heard or name in self._refused:
                continue
            if id(module.get_parameter("weight")) in self._reached:
                self._refused[name] = "its weight is used outside its forward, where no hook is"
            elif name in self._used:
                silent[name] = "no gradient reached it: what it makes is detached, or not used"
            else:
                silent[name] = "no gradient reached it: the model did not use it"
        return Findings(self._refused, silent)

    def _forward_hook(self, name: str) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            x = input_of(args, kwargs).detach()
            self._used.add(name)
            if is_subclass(module) and not is_output(module, x, output):
                self._refused[name] = "what it made of the first batch is not what nn.Linear makes"
            if not torch.is_grad_enabled() or not isinstance(output, Tensor):
                return output
            return tap(output, x, lambda x, g: self._add(name, module, x, g))

        return hook

    def _add(self, name: str, module: nn.Module, x: Tensor, g: Tensor) -> None:
        self._heard.add(name)
        if self._examples > 1 and g.dim() != 2 and g.shape[:-1].numel() % self._examples:
            shape = tuple(x.shape)
            self._refused[name] = (
                f"not each example has an input {shape}: plan it with batch size 1"
            )
        weight = module.get_parameter("weight")
        if weight.is_meta or not weight.requires_grad:
            return
        flat = widened(g).reshape(-1, g.shape[-1])
        if isinstance(module, nn.Embedding):
            made = flat.new_zeros(weight.shape).index_add_(0, x.reshape(-1), flat)
            if module.padding_idx is not None:
                made[module.padding_idx] = 0.0
            size = float(flat.norm())
        else:
            inputs = widened(x).reshape(-1, x.shape[-1])
            made = inputs.T @ flat if is_conv1d(module) else flat.T @ inputs
            size = float(flat.norm() * inputs.norm())
        low = max(torch.finfo(t.dtype).eps for t in (g, weight))
        before, slack = self._made.get(id(weight), (0.0, 0.0))
        self._made[id(weight)] = (made + before, slack + 4.0 * max(low, 1e-4) * size)

    def _comparison(self, names: list[str]) -> Callable[[Tensor], None]:
        def compare(weight: Tensor) -> None:
            self._reached.add(id(weight))
            assert weight.grad is not None
            true = widened(weight.grad.to_dense())
            weight.grad = None
            made, slack = self._made.pop(id(weight), (torch.zeros_like(true), 0.0))
            apart, size = float((true - made).norm()), float(true.norm())
            # What float16 is too coarse for is rounded away in the one, but not in the other.
            limits = torch.finfo(weight.dtype)
            slack += limits.tiny * limits.eps * weight.numel() ** 0.5
            if apart > 0.01 * size + slack:
                why = "its weight is used outside its forward too, or a hook changes its output"
                for name in self._heard.intersection(names):
                    self._refused.setdefault(name, why)

        return compare


def probe(
    model: nn.Module, modules: Mapping[str, nn.Module], run: Callable[[Any], object]
) -> Findings:
    """What a batch says of the layers.

    Args:
        model: unwrapped; left as it was.
        modules: layer name -> module.
        run: runs the batch forward and backward through what stands for a collector.

    Raises:
        ModelError: the model changes in place what its own backward pass needs.
        DataError: the batch was made under ``torch.inference_mode``.
    """
    try:
        with Probe(model, modules) as one:
            run(one)
        return one.findings()
    except RuntimeError as error:
        if "Inference tensors" in str(error):
            raise DataError(
                "a batch was made under torch.inference_mode, where nothing has a gradient: make "
                "the batches outside of it"
            ) from error
        if not _in_place(error):
            raise
    try:
        with copied_inputs(modules.values()), Probe(model, modules) as one:
            run(one)
        return dataclasses.replace(one.findings(), copied=True)
    except RuntimeError as error:
        if not _in_place(error):
            raise
        raise ModelError(
            f"{type(model).__name__} changes in place what its backward pass needs, which torch "
            f"cannot differentiate: write it out of place ({str(error).splitlines()[0][:200]})"
        ) from error


def _in_place(error: RuntimeError) -> bool:
    return "inplace" in str(error) or "in-place" in str(error)


def first_not_finite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """The first module that makes NaN or infinity in a forward pass, or None.

    Minus infinity is what masks are made of.
    """
    found: list[str] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if found or not isinstance(output, Tensor) or not output.is_floating_point():
                return
            if bool((output.isnan() | output.isposinf()).any()):
                found.append(name)

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if not any(module.children()):
                hooks.enter_context(module.register_forward_hook(hook_of(name)))
        with frozen(model), torch.no_grad():
            run()
    return found[0] if found else None
