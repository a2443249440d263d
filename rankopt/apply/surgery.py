"""Low-rank and rounded layers in the place of dense ones, and dense ones in theirs again."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rankopt.layers import Bits, Form
from rankopt.model.lowrank import LowRank
from rankopt.model.pivoted import kind_of
from rankopt.model.rounding import Parts, packed, plain
from rankopt.model.weights import is_conv1d, tensor_of, weight_of, weight_shape


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


def merged_weight(module: nn.Module, dense: nn.Module) -> Tensor:
    """The product of factors, or rounded values, as a dense module in their place keeps them."""
    held: Any = module.weight
    weight = plain(held.detach())
    return weight.T.contiguous() if is_conv1d(dense) else weight


def empty_in_place_of(
    dense: nn.Module, rank: int | None, form: Form, bits: Bits | None
) -> nn.Module:
    """The module for a dense one's place, without values, of its dtype and on its device.

    Args:
        dense: nn.Linear, Conv1D or nn.Embedding.
        rank: of a low-rank module; None of a dense one, which is rounded.
        form: how a low rank is kept.
        bits: what its weights are rounded to, and stand as their parts for; or None.
    """
    out_features, in_features = weight_shape(dense)
    weight = dense.get_parameter("weight")
    embeds, biased = isinstance(dense, nn.Embedding), getattr(dense, "bias", None) is not None
    if rank is None:
        assert bits is not None
        return Parts(out_features, in_features, bits, biased, weight.device, weight.dtype)
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    kind: Any = kind_of(embeds, (out_features, in_features), form)
    own = dense.padding_idx if embeds else biased
    low: LowRank = kind(in_features, out_features, rank, own, **options)
    if bits is not None:
        for factor in ("down", "up"):
            setattr(low, factor, Parts.of(getattr(low, factor), bits))
    return low


def round_factors(low: LowRank, bits: Bits) -> None:
    """Round the factors of a layer that is not an embedding's, in place."""
    for factor in (low.down, low.up):
        factor.weight = packed(factor.weight, bits)


def rounded_linear(dense: nn.Module, bits: Bits) -> nn.Linear:
    """A rounded layer for the place of a dense one, with its bias; of Conv1D it is the transpose.

    Args:
        dense: nn.Linear or Conv1D, whose weight may be offloaded.
        bits: 8 or 4.
    """
    out_features, in_features = weight_shape(dense)
    bias: Any = dense.bias
    if bias is not None and bias.is_meta:
        bias = tensor_of(dense, "bias")
    found = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    found.weight = packed(weight_of(dense), bits)
    if bias is not None:
        found.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return found.train(dense.training)


def put_dense(module: nn.Module, empty: nn.Module) -> nn.Module:
    """The values of a low-rank or rounded module in the dense one that the architecture has.

    Args:
        module: as it is.
        empty: to become its equal.
    """
    empty.weight = nn.Parameter(merged_weight(module, empty))
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is not None:
        # A copy: a dense model that ties no more would not save a bias that is another's too.
        empty.bias = nn.Parameter(bias.detach().clone())
    return empty.train(module.training)


def replace(model: nn.Module, new: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put modules in the place of others, under every name that those have; returns the others."""
    old = {name: model.get_submodule(name) for name in new}
    instead = {id(module): new[name] for name, module in old.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in instead:
            model.set_submodule(name, instead[id(module)])
    return old
