"""Low-rank layers in the place of dense ones."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rankopt.layers import Form
from rankopt.model.lowrank import LowRank, LowRankEmbedding, LowRankLinear
from rankopt.model.pivoted import PivotedColumns, PivotedEmbedding, PivotedRows
from rankopt.model.weights import is_conv1d


def kind_of(dense_is_embedding: bool, shape: tuple[int, int], form: Form) -> type[LowRank]:
    """The class of low-rank layers for W ``(out, in)`` in normal form."""
    if form == "pairs":
        return LowRankEmbedding if dense_is_embedding else LowRankLinear
    if dense_is_embedding:
        return PivotedEmbedding
    return PivotedColumns if shape[1] <= shape[0] else PivotedRows


def low_rank(
    dense: nn.Module,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    form: Form = "pairs",
) -> LowRank:
    """The low-rank module to stand in the place of a dense one.

    Args:
        dense: nn.Linear, Conv1D or nn.Embedding; mode and trainability are taken over from it.
        down: shape ``(rank, in)``, in normal form; the layer has the dense one's dtype.
        up: shape ``(out, rank)``.
        bias: of the dense module.
        form: how it is kept.
    """
    embeds = isinstance(dense, nn.Embedding)
    kind: Any = kind_of(embeds, (len(up), down.shape[1]), form)
    low: LowRank = kind.from_factors(down, up, dense.padding_idx if embeds else bias)
    weight = dense.get_parameter("weight")
    for factor in (low.down, low.up):
        own = factor.weight.detach().to(weight.dtype).contiguous()
        factor.weight = nn.Parameter(own, requires_grad=weight.requires_grad)
    low.train(dense.training)
    return low


def merged_weight(low: LowRank, dense: nn.Module) -> Tensor:
    """The product of the factors, as a dense module in their place keeps its weight."""
    weight = low.weight.detach()
    return weight.T.contiguous() if is_conv1d(dense) else weight


def replace(model: nn.Module, new: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put modules in the place of others, under every name that those have; returns the others."""
    old = {name: model.get_submodule(name) for name in new}
    instead = {id(module): new[name] for name, module in old.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in instead:
            model.set_submodule(name, instead[id(module)])
    return old
