"""What a layer may be: dense or a pair of factors, in 16, 8 or 4 bits; its bytes and its loss.

The loss of an option is measured on the weights that it has, after rounding them:

    1/2 tr(C_out (W - W') C_in (W - W')^T),

with both moments of the calibration rows: truncation and rounding together, in nats of a row. For a
pair W' is the product of the two rounded factors. The factors fit the rows that made them, and
rounding fits none: so what truncation loses is cross-fitted, as a profile does it. To the loss of a
rank is added what the pair of all rows lacks to

    1/2 own + 1/4 (pairs of one half of the rows on the other + the other way round).

Rounding is torchao's: 8 bits for each output row
(``Int8WeightOnlyConfig``), 4 bits for groups of 32 inputs (``IntxWeightOnlyConfig``), round to
nearest; 16 bits is bfloat16. torchao keeps 4 bits in bytes on a CPU; they are counted packed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

BITS = (16, 8, 4)
GROUP = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Option:
    """One way to keep a layer.

    Attributes:
        rank: of the pair, None if dense.
        bits: of every weight.
        bytes: of weights and scales.
        loss: in nats of a row.
    """

    rank: int | None
    bits: int
    bytes: int
    loss: float


def bytes_of(shape: tuple[int, int], bits: int) -> int:
    """Of one matrix ``(out, in)``: packed weights and scales, of 8 bits float32, of 4 bfloat16."""
    out, into = shape
    return out * into * bits // 8 + {16: 0, 8: 4 * out, 4: 2 * out * into // GROUP}[bits]


def rounded(weight: Any, bits: int) -> Any:
    """The weight after rounding, float32: what torchao's tensor dequantises to."""
    import torch
    from torch import nn

    kept = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    kept.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    quantise(kept, bits)
    found = kept.weight if bits == 16 else kept.weight.dequantize()
    return found.detach().float()


def quantise(module: Any, bits: int) -> None:
    """The linear layers of a module, in place, by torchao; of 16 bits nothing is to be done."""
    if bits == 16:
        return
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    if bits == 8:
        quantize_(module, Int8WeightOnlyConfig())
    elif bits == 4:
        quantize_(module, IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP)))


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Of one layer, means over rows of sums over positions; float64.

    Attributes:
        inputs: E[x x^T], shape ``(in, in)``.
        gradients: E[g g^T] positions, shape ``(out, out)``.
    """

    inputs: Any
    gradients: Any

    def loss(self, change: Any) -> float:
        """Of a change of the weight."""
        change = change.double()
        return 0.5 * float(((self.gradients @ change) * (change @ self.inputs)).sum())


def mean(halves: Sequence[Moments]) -> Moments:
    """Of all rows, from those of equal parts."""
    return Moments(
        sum(half.inputs for half in halves) / len(halves),
        sum(half.gradients for half in halves) / len(halves),
    )


def moments(model: Any, layers: Sequence[str], batches: Sequence[Any], damping: float) -> Any:
    """Of every layer: the expected Fisher information over the labels that the model states.

    Returns:
        Name -> Moments, damped by a share of their mean diagonals, as the backend kronecker does.
    """
    import torch

    modules = {name: model.get_submodule(name) for name in layers}
    inputs: dict[str, Any] = dict.fromkeys(layers, 0.0)
    gradients = dict(inputs)
    seen: dict[str, Any] = {}
    hooks = []
    for name, module in modules.items():

        def keep(module: Any, given: Any, output: Any, name: str = name) -> None:
            seen[name] = given[0].detach()
            output.register_hook(lambda g: add(name, g))

        hooks.append(module.register_forward_hook(keep))
    mask = torch.ones(0)
    weight = torch.ones(0)

    def add(name: str, g: Any) -> None:
        g = (g * weight[:, None, None])[mask].double()
        gradients[name] = gradients[name] + g.T @ g

    rows = positions = 0
    for batch in batches:
        mask = batch["attention_mask"].bool()
        given = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**given).logits
        stated = logits.detach().softmax(-1)
        for label in range(logits.shape[-1]):
            # Squares of the gradients of each label, weighted by its probability.
            weight = stated[:, label].sqrt()
            chosen = logits.log_softmax(-1)[:, label].sum()
            chosen.backward(retain_graph=label + 1 < logits.shape[-1])
        for name in layers:
            x = seen[name][mask].double()
            inputs[name] = inputs[name] + x.T @ x
        rows += len(mask)
        positions += int(mask.sum())
        model.zero_grad()
    for hook in hooks:
        hook.remove()

    def damped(moment: Any) -> Any:
        return moment + damping * moment.diagonal().mean() * torch.eye(len(moment)).double()

    return {
        name: Moments(damped(inputs[name] / positions), damped(gradients[name] / rows))
        for name in layers
    }


class Factored:
    """A weight and the best pairs of every rank under its moments."""

    def __init__(self, weight: Any, of: Moments, halves: Sequence[Moments] = ()) -> None:
        import torch

        self.weight, self.moments = weight.detach().float(), of
        self.halves = [Factored(weight, half) for half in halves]
        values, vectors = torch.linalg.eigh(of.gradients)
        left = values.clamp_min(0).sqrt()
        into, right = torch.linalg.eigh(of.inputs)
        root = into.clamp_min(0).sqrt()
        wide = left[:, None] * (vectors.T @ weight.double() @ right) * root
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
        # Half of the singular values on each side, so that neither is rounded more coarsely.
        self.up = (vectors / left) @ u * s.sqrt()
        self.down = s.sqrt()[:, None] * (v @ (right / root).T)

    def truncated(self, rank: int, on: Moments) -> float:
        """What the pair of a rank loses before rounding, under moments."""
        return on.loss(self.weight.double() - self.up[:, :rank] @ self.down[:rank])

    def optimism(self, rank: int) -> float:
        """What a pair loses more than on the rows that made it."""
        if not self.halves:
            return 0.0
        this, other = self.halves
        crossed = this.truncated(rank, other.moments) + other.truncated(rank, this.moments)
        return 0.25 * crossed - 0.5 * self.truncated(rank, self.moments)

    def pair(self, rank: int, bits: int) -> tuple[Any, Any]:
        """``up (out, rank)`` and ``down (rank, in)``, rounded."""
        return (
            rounded(self.up[:, :rank].float(), bits),
            rounded(self.down[:rank].float(), bits),
        )

    def options(self, ranks: Sequence[int], of_bits: Sequence[int] = BITS) -> list[Option]:
        """Dense and all ranks that are smaller, in some bits."""
        out, into = self.weight.shape
        found = []
        for bits in of_bits:
            dense = bytes_of((out, into), bits)
            lost = self.moments.loss(self.weight - rounded(self.weight, bits))
            found.append(Option(None, bits, dense, lost))
            for rank in ranks:
                size = bytes_of((out, rank), bits) + bytes_of((rank, into), bits)
                if size >= dense:
                    continue
                up, down = self.pair(rank, bits)
                lost = self.moments.loss(self.weight - up @ down) + self.optimism(rank)
                found.append(Option(rank, bits, size, max(lost, 0.0)))
        return found

    def product(self, option: Option) -> Any:
        """The weight that an option has."""
        if option.rank is None:
            return rounded(self.weight, option.bits)
        up, down = self.pair(option.rank, option.bits)
        return up @ down
