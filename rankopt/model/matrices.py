"""The matrices of a model, and what keeps each from being planned.

Types are compared exactly, because int8, 4-bit and LoRA layers are subclasses of ``nn.Linear``.

A weight that several modules share is one matrix. Factors cannot be shared by a head, V x d, and
an embedding, its transpose: the pair is planned, as one group, only if it may be untied.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from rankopt.layers import largest_rank
from rankopt.model.lowrank import LowRank, LowRankEmbedding
from rankopt.model.weights import identities, is_conv1d, weight_shape

#: Why a layer that is planned by default is left alone in a selection.
NOT_SELECTED = "not selected"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A module with matrices.

    Attributes:
        module: the module.
        inside: whether it is inside the transformer blocks.
        tied: other modules with the same weight.
        pair: if the weight is that of a head and an embedding and of nothing else: those two.
        unsupported: why it cannot be planned.
        default: whether it is planned if nothing is said: plain matrices inside the blocks; all
            plain ones if the model has no blocks.
    """

    module: nn.Module
    inside: bool
    tied: tuple[str, ...]
    pair: tuple[str, ...] = ()
    unsupported: str | None = None
    default: bool = False

    def skip_reason(self, untie: bool) -> str | None:
        """Why it is skipped although it was asked for, or None."""
        if self.unsupported is not None or not self.tied or (self.pair and untie):
            return self.unsupported
        reason = f"its weight is tied to {', '.join(self.tied)}"
        if self.pair:
            return f"{reason}: pass untie=True (--untie) to give each its own factors"
        return reason

    def reason(self) -> str:
        """Why it is skipped by default, or in a selection."""
        if self.unsupported is not None:
            return self.unsupported
        embedding = type(self.module) is nn.Embedding
        if self.inside:
            return self.skip_reason(False) or ("an embedding" if embedding else NOT_SELECTED)
        if self.default:
            return NOT_SELECTED
        kind = "embedding" if embedding else "head or projection"
        tied = f", tied to {', '.join(self.tied)}" if self.tied else ""
        return f"{kind} outside the transformer blocks{tied}"


def matrices_of(model: nn.Module) -> dict[str, Matrix]:
    """Modules with matrices, by name; but those that are low rank."""
    modules = dict(model.named_modules())
    lists = {n for n, module in modules.items() if isinstance(module, nn.ModuleList)}
    owned, owners = identities(model), dict[object, list[str]]()
    for (name, own), identity in owned.items():
        if own == "weight":
            owners.setdefault(identity, []).append(name)
    matrices: dict[str, Matrix] = {}
    has_blocks = False
    for name, module in _dense_modules(model):
        inside = any(parent in lists for parent in _parents(name))
        linear = isinstance(module, nn.Linear | LowRank) or is_conv1d(module)
        has_blocks |= inside and linear and not isinstance(module, LowRankEmbedding)
        parameters = list(module.parameters(recurse=False))
        if not any(parameter.dim() >= 2 for parameter in parameters):
            continue
        sharing = owners.get(owned.get((name, "weight")), [name])
        tied = tuple(sorted(set(sharing) - {name}))
        pair = _pair(sharing, modules)
        unsupported = _unsupported(module, inside, len(pair) or 1)
        if any(isinstance(modules[x], nn.MultiheadAttention) for x in (name, *_parents(name))):
            unsupported = (
                "nn.MultiheadAttention uses its weights where no hook sees it: not covered"
            )
        if not name:
            unsupported = "it is the whole model: put it into an nn.Sequential"
        matrices[name] = Matrix(module, inside, tied, pair, unsupported)
    return {
        name: dataclasses.replace(
            x,
            default=type(x.module) is not nn.Embedding
            and x.skip_reason(False) is None
            and (x.inside or not has_blocks),
        )
        for name, x in matrices.items()
    }


def _dense_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but the factors of low-rank ones."""
    inside = None
    for name, module in model.named_modules():
        if inside is None or not name.startswith(inside):
            inside = f"{name}." if isinstance(module, LowRank) else None
            yield name, module


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _pair(names: Sequence[str], modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """(head, embedding) if the modules are one plain nn.Linear and one plain nn.Embedding."""
    ordered = sorted(names, key=lambda name: type(modules[name]) is not nn.Linear)
    types = [type(modules[name]) for name in ordered]
    return tuple(ordered) if types == [nn.Linear, nn.Embedding] else ()


def _unsupported(module: nn.Module, inside: bool, members: int) -> str | None:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution"
    if type(module) not in (nn.Linear, nn.Embedding) and not is_conv1d(module):
        own = module.parameters(recurse=False)
        if inside and any(p.dim() == 3 and p.shape[0] > 1 for p in own):
            return "fused expert weights (E x out x in): not covered"
        return "not a plain nn.Linear or Conv1D"
    weight = module.get_parameter("weight")
    if type(weight.data) is not Tensor or not weight.is_floating_point():
        return (
            f"its weight is a {type(weight.data).__name__} of {weight.dtype}, not plain floats: "
            "dequantise it first"
        )
    if getattr(module, "max_norm", None) is not None:
        return "it renormalises its rows as they are used (max_norm)"
    out_features, in_features = weight_shape(module)
    if largest_rank(out_features, in_features, members) < 1:
        return f"no rank of a {out_features} x {in_features} matrix saves any"
    return None
