"""Hooks that collect the statistics of layers while a model runs forward and backward.

A forward hook wraps each layer's output in a tap: the identity, whose backward hands the input and
the output gradient over. Weights are frozen, so autograd computes gradients of activations only,
and nothing replaces a module's ``forward``, so offloading, compilation and checkpointing go on.

Five statistics, raw sums over everything seen (see fisher for the first three):

    rows, columns, elements   squared gradients of units
    second_moment             sum over positions of a a^T, a = x if in <= out, else y = W x
    gradient_moment           sum over positions of a a^T, a = dL/dy if out <= in, else dL/dx

The moments are those of the smaller side: with C = sum x x^T, sum y y^T is W C W^T, which is all
that a decomposition needs, and likewise W^T (sum g g^T) W = sum gx gx^T. Positions of padding are
left out of the second moment; their output gradients are zero where a mask keeps others from
looking at them. Layers that are given the same tensor (queries, keys, values) share its moment.

A layer used several times in one forward pass (ALBERT) is one weight: its uses are concatenated
along T before squaring.

Gradients in float16 vanish below 6e-8. There the loss is back-propagated times the largest power of
two that lets none of them overflow, which is found anew for each batch, and taken out again where
gradients are in float32: exactly.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from rankopt.backends.statistics import STATISTICS
from rankopt.errors import ModelError, NotFiniteError
from rankopt.measure.fisher import (
    Banks,
    SquaredGradients,
    Sums,
    as_inputs,
    squared_gradients,
    squared_gradients_of_embedding,
)
from rankopt.measure.layout import Frames, Layout, Use, flattened, widened
from rankopt.measure.taps import Hooked, input_of, largest_scale, name_of_input, tap
from rankopt.model.weights import tensor_of, weight_of, weight_shape


class Collector(Hooked):
    """Collects statistics of layers while used as a context manager.

    In the context the model is in eval mode (no dropout) and its weights are frozen; both are
    restored on exit. For each batch: ``begin``, the forward pass, then ``backward`` with the *sum*
    of the units' losses; ``backward`` several times on one graph adds each up.

    Args:
        model: whose layers they are.
        modules: layer name -> plain nn.Linear, Conv1D or nn.Embedding.
        needs: statistics beyond the rows, which are always collected.
        weights: layer name -> W in normal form, where moments are of another than it computes with.
        halves: add up batches of even and of odd numbers apart (see Banks.turn).

    Attributes:
        banks: what has been added up.
        totals: sum of rows that the last batch added, shape ``(layers,)``, float64.
        sides: which mask a use of a layer goes by; None before that was looked for.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        needs: Collection[str] = (),
        weights: Mapping[str, Tensor] | None = None,
        *,
        halves: bool = False,
    ) -> None:
        assert set(needs) <= set(STATISTICS)
        super().__init__(model, modules)
        self._weights = weights or {}
        self.needs = frozenset(needs)
        shapes = {name: weight_shape(module) for name, module in self.modules.items()}
        self.banks = Banks(shapes, self.needs, 2 if halves else 1)
        self.totals = torch.zeros(len(self.modules), dtype=torch.float64)
        self.sides: dict[Use, int] | None = None
        self._traced = bool(self.needs & {"second_moment", "gradient_moment"})
        self._shapes = shapes
        self._totals: dict[str, Tensor] = {}
        self._uses: dict[str, int] = {}
        self._pending: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._layout = Layout.of(0, 0)
        self._recent: tuple[Tensor | None, int, str] = (None, 0, "")
        self._given: dict[str, Tensor] = {}
        self._active = self._in_backward = False
        own = [module.get_parameter("weight") for module in self.modules.values()]
        self._half = any(weight.dtype == torch.float16 for weight in own)
        self._scale, self._trying, self._overflown = 1.0, False, ""

    def __enter__(self) -> Self:
        super().__enter__()
        for name, module in self.modules.items():
            n_out, n_in = self._shapes[name]
            multiplied = _is_embedding(module) or name in self._weights
            if "gradient_moment" in self.needs and n_in < n_out and not multiplied:
                before = module.register_forward_pre_hook(self._input_hook(name), with_kwargs=True)
                self._stack.enter_context(before)
        return self

    def begin(
        self,
        examples: int,
        tokens: int,
        masks: Collection[Tensor | None] = (),
        frames: Frames | None = None,
    ) -> None:
        """Announce a batch.

        Args:
            examples: sequences in it.
            tokens: positions of each, to recognise inputs of shape ``(examples * tokens, in)``.
            masks: shape ``(examples, positions)``, False at padding; inputs of that shape are
                masked in second moments.
            frames: see Layout.
        """
        self._layout = Layout.of(examples, tokens, masks, self.sides, frames)
        self._totals = {}
        self._uses.clear()
        self._pending.clear()
        self._recent = (None, 0, "")
        self._active = True

    def expect(self, examples: int, tokens: int) -> None:
        """Correct what ``begin`` announced, before ``backward``."""
        self._layout = dataclasses.replace(self._layout, examples=examples, tokens=tokens)

    def backward(self, loss: Tensor, *, again: bool = False) -> None:
        """Back-propagate the sum of the units' losses and add up.

        Args:
            loss: scalar.
            again: another call on the same graph follows.

        Raises:
            NotFiniteError: the loss or a gradient is not finite, naming the layer.
        """
        if bool(loss.detach().isnan()):
            raise NotFiniteError("the loss is NaN")
        self._recent = (None, 0, "")
        self._in_backward = True
        try:
            if self._half:
                self._scale = self._largest_scale(loss)
                loss.backward(torch.full_like(loss, self._scale), retain_graph=again)  # type: ignore[no-untyped-call]
            else:
                loss.backward(retain_graph=again)  # type: ignore[no-untyped-call]
        finally:
            self._in_backward = False
            self._active = again
        for name in list(self._pending):
            # Uses of which some did not reach the loss.
            self._flush(name)
        zero = torch.zeros((), dtype=torch.float64)
        totals = [self._totals.get(name, zero) for name in self.modules]
        self.totals = torch.stack([total.cpu() for total in totals])
        finite = torch.isfinite(self.totals)
        if self._traced:
            traces = [self.sums[n].traces.sum() if n in self.sums else zero for n in self.modules]
            finite &= torch.isfinite(torch.stack([trace.cpu() for trace in traces]))
        if not bool(finite.all()):
            name = list(self.modules)[int((~finite).nonzero()[0])]
            raise NotFiniteError(f"layer {name}: inputs or gradients are NaN or infinite")

    def _largest_scale(self, loss: Tensor) -> float:
        """Times which no gradient overflows."""

        def fits(scale: float) -> bool:
            self._trying, self._overflown = True, ""
            try:
                loss.backward(torch.full_like(loss, scale), retain_graph=True)  # type: ignore[no-untyped-call]
            finally:
                self._trying = False
            return not self._overflown

        found = largest_scale(fits)
        if found is None:
            raise NotFiniteError(
                f"layer {self._overflown}: gradients overflow float16; load the model in bfloat16 "
                "or float32"
            )
        return found

    def _tried(self, name: str, gradient: Tensor) -> bool:
        """Whether this backward pass only looks for overflow."""
        if self._trying and not bool(gradient.isfinite().all()):
            self._overflown = name
        return self._trying

    def _forward_hook(self, name: str) -> Callable[..., Tensor]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            if not self._active:
                # A forward pass that was not announced: somebody checks the loss.
                return output
            passed = input_of(args, kwargs)
            given, x = self._given.pop(name, passed), passed.detach()
            if not self._in_backward:
                # Checkpointing runs a layer again in backward: still one use.
                self._uses[name] = self._uses.get(name, 0) + 1
                if self._traced:
                    with torch.no_grad():
                        self._add_second_moment(name, module, given, output)
            if not torch.is_grad_enabled():
                return output
            return tap(output, x, lambda x, g: self._record(name, x, g))

        return hook

    def _input_hook(self, name: str) -> Callable[..., Any]:
        """Taps the input of a layer with in < out, to see the input gradient autograd computes."""

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if not self._active or not torch.is_grad_enabled():
                return None
            key = None if args else name_of_input(kwargs)
            # Taps are new tensors: who shares an input is seen before.
            passed = self._given[name] = args[0] if key is None else kwargs[key]

            def sink(_: Tensor, gradient: Tensor) -> None:
                if self._tried(name, gradient):
                    return
                moment = self._of(name, gradient.device).gradient
                assert moment is not None
                moment.add(self._unscaled(flattened(gradient)))

            tapped = tap(passed.clone(), passed.new_zeros(()), sink)
            return ((tapped, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: tapped})

        return hook

    @property
    def sums(self) -> dict[str, Sums]:
        """Layer name -> what has been added up, in the bank that is added to."""
        return self.banks.sums

    @property
    def owners(self) -> dict[str, str]:
        """Layer name -> the layer that holds its second moment, itself or another."""
        return self.banks.owners

    def _of(self, name: str, device: torch.device) -> Sums:
        return self.banks.of(name, device)

    def _add_second_moment(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        n_out, n_in = self._shapes[name]
        of_inputs, embedding = n_in <= n_out, _is_embedding(module)
        owner = self.owners.get(name)
        if of_inputs and not embedding and (x is self._recent[0] and x._version == self._recent[1]):
            found = self._recent[2]
        else:
            found = name
            if of_inputs and not embedding:
                self._recent = (x, x._version, name)
        if owner is None:
            owner = self.owners[name] = found
        elif owner != name and found != owner:
            raise ModelError(
                f"layer {name} was given the same input as {owner} in earlier batches, but not in "
                "this one: its second moment is lost; exclude one of the two"
            )
        sums = self._of(name, output.device)
        if owner != name:
            shared = self._of(owner, output.device)
            assert shared.second is None or self.sums[owner] is shared
        inputs = x if not embedding else None
        use = (name, self._uses[name])
        mask = self._layout.mask_for((x if embedding else x[..., 0]).shape, use)
        if inputs is None:
            positions = int(mask.sum()) if mask is not None else x.numel()
            sums.traces[0] += positions
            sums.traces[1] += positions
        else:
            flat = flattened(inputs)
            if mask is not None:
                flat = flat[mask.reshape(-1)]
            sums.traces[0] += len(flat)
            sums.traces[1] += _energy(flat)
        if sums.second is None:
            return
        if of_inputs:
            if inputs is None:
                flat = flattened(as_inputs(x, n_in, output.dtype))
                flat = flat if mask is None else flat[mask.reshape(-1)]
            sums.second.add(flat)
        else:
            bias, other = tensor_of(module, "bias"), self._weights.get(name)
            if other is not None or (bias is not None and output.dtype.itemsize < 4):
                # Beside a large bias, half the bits leave nothing of W x.
                made = flattened(x) @ widened(weight_of(module) if other is None else other).T
            elif bias is None:
                made = flattened(output)
            else:
                made = flattened(output) - bias
            sums.second.add(made if mask is None else made[mask.reshape(-1)])

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient if self._scale == 1.0 else gradient / self._scale

    def _record(self, name: str, x: Tensor, g: Tensor) -> None:
        if self._tried(name, g):
            return
        pending = self._pending.setdefault(name, [])
        embedding = _is_embedding(self.modules[name])
        inputs = self._by_example(name, x.unsqueeze(-1)).squeeze(-1) if embedding else x
        if not embedding:
            inputs = self._by_example(name, widened(x))
        outputs = self._by_example(name, self._unscaled(widened(g)))
        pending.append((inputs, outputs))
        if self._traced:
            self._add_gradient_moment(name, pending[-1][1], embedding)
        if len(pending) == self._uses[name]:
            self._flush(name)

    def _by_example(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            # An expert without tokens.
            return tensor.reshape(self._layout.examples, 0, tensor.shape[-1])
        return self._layout.by_example(name, tensor)

    def _add_gradient_moment(self, name: str, g: Tensor, embedding: bool) -> None:
        sums = self._of(name, g.device)
        flat = g.reshape(-1, g.shape[-1])
        sums.traces[2] += _energy(flat)
        if sums.gradient is None:
            return
        n_out, n_in = self._shapes[name]
        if n_out <= n_in:
            sums.gradient.add(flat)
        elif embedding or name in self._weights:
            weight = self._weights.get(name, weight_of(self.modules[name]))
            sums.gradient.add(flat @ weight.to(flat.dtype))

    def _flush(self, name: str) -> None:
        pending = self._pending.pop(name)
        if len(pending) == 1:
            x, g = pending[0]
        else:
            x, g = (torch.cat(parts, dim=1) for parts in zip(*pending, strict=True))
        self._add(name, self._squared(name, x, g))

    def _squared(self, name: str, x: Tensor, g: Tensor) -> SquaredGradients:
        elements = "elements" in self.needs
        if _is_embedding(self.modules[name]):
            return squared_gradients_of_embedding(x, g, self._shapes[name][1], elements=elements)
        return squared_gradients(x, g, columns="columns" in self.needs, elements=elements)

    def _add(self, name: str, found: SquaredGradients) -> None:
        sums = self._of(name, found.rows.device)
        sums.rows += found.rows
        sums.seen += 1
        if sums.columns is not None:
            assert found.columns is not None
            sums.columns += found.columns
        if sums.elements is not None:
            assert found.elements is not None
            sums.elements += found.elements
        total = found.rows.sum()
        self._totals[name] = self._totals[name] + total if name in self._totals else total


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _energy(tensor: Tensor) -> Tensor:
    """Sum of squares, shape ``(positions, features)``; float32 over millions is off by 1e-4."""
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=1)
    return norms.square_().sum(dtype=torch.float64)
