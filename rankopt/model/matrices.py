"""The matrices of a model, and what keeps each from being planned.

int8, 4-bit and LoRA layers are subclasses of ``nn.Linear``, and so are layers that only write their
forward anew (Falcon's): a subclass is plain if it has no more than a weight and a bias of floats,
and its outputs are those of its base.

Blocks are below an ``nn.ModuleList``; and, in a model that has one with layers, below an
``nn.ModuleDict`` or ``nn.Sequential`` that repeats one module with layers inside it.

A weight that several modules share is one matrix. Factors cannot be shared by a head, V x d, and
an embedding, its transpose: the pair is planned, as one group, only if it may be untied.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from rankopt.layers import largest_rank
from rankopt.model.lowrank import LowRank
from rankopt.model.sharded import is_distributed
from rankopt.model.weights import (
    computed,
    device_of,
    identities,
    is_conv1d,
    overlapping,
    tensor_of,
    weight_of,
    weight_shape,
)

#: Why a layer that is planned by default is left alone in a selection.
NOT_SELECTED = "not selected"

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        embedding = isinstance(self.module, nn.Embedding)
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
    containers, overlaps = _containers(modules), overlapping(model)
    owned, owners = identities(model), dict[object, list[str]]()
    for (name, own), identity in owned.items():
        if own == "weight":
            owners.setdefault(identity, []).append(name)
    matrices: dict[str, Matrix] = {}
    has_blocks = False
    for name, module in _dense_modules(model):
        inside = any(parent in containers for parent in _parents(name))
        has_blocks |= inside and _is_linear(module)
        if isinstance(module, LowRank) or not _has_matrices(module):
            continue
        sharing = owners.get(owned.get((name, "weight")), [name])
        tied = tuple(sorted(set(sharing) - {name}))
        pair = _pair(sharing, modules)
        unsupported = _unsupported(module, len(pair) or 1)
        if unsupported is None and name in overlaps:
            unsupported = (
                f"its weight lies in the memory of that of {overlaps[name]}: clone one of the two"
            )
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
            default=not isinstance(x.module, nn.Embedding)
            and x.skip_reason(False) is None
            and (x.inside or not has_blocks),
        )
        for name, x in matrices.items()
    }


def _dense_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but the factors of low-rank ones and what computes a weight."""
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        computes = isinstance(module, parametrize.ParametrizationList)
        inside = f"{name}." if computes or isinstance(module, LowRank) else None
        if not computes:
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    """A layer of the kind that blocks are made of, dense or low rank."""
    low = isinstance(module, LowRank) and isinstance(module.down, nn.Linear)
    return low or isinstance(module, nn.Linear) or is_conv1d(module)


def _has_matrices(module: nn.Module) -> bool:
    """Whether it holds or computes any; nn.Linear and nn.Embedding do, whatever became of it."""
    if isinstance(module, nn.Linear | nn.Embedding) or parametrize.is_parametrized(module):
        return True
    return any(
        parameter.dim() >= 2
        for parameter in module.parameters(recurse=False)
        if not is_lazy(parameter)
    )


def _containers(modules: dict[str, nn.Module]) -> set[str]:
    """Names of what holds the blocks."""
    lists = {n for n, module in modules.items() if isinstance(module, nn.ModuleList)}
    if not any(_is_linear(each) for name in lists for each in modules[name].modules()):
        return lists
    return lists | {n for n, module in modules.items() if _repeats(module)}


def _repeats(container: nn.Module) -> bool:
    """Whether it is a dictionary or a row of modules, two of one make with layers inside."""
    if not isinstance(container, nn.ModuleDict | nn.Sequential):
        return False
    makes = set()
    for child in container.children():
        below = [(name, each) for name, each in _dense_modules(child) if name]
        if not any(_is_linear(each) for _, each in below):
            continue
        sizes = tuple(
            (name, getattr(each, "in_features", None), getattr(each, "out_features", None))
            for name, each in below
        )
        if (type(child), sizes) in makes:
            return True
        makes.add((type(child), sizes))
    return False


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _pair(names: Sequence[str], modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """(head, embedding) if the modules are one plain nn.Linear and one plain nn.Embedding."""
    ordered = sorted(names, key=lambda name: not isinstance(modules[name], nn.Linear))
    if len(ordered) != 2:
        return ()
    head, embedding = (modules[name] for name in ordered)
    kinds = isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)
    return tuple(ordered) if kinds and is_plain(head) and is_plain(embedding) else ()


def is_plain(module: nn.Module) -> bool:
    """Whether a layer is an nn.Linear, Conv1D or nn.Embedding, or a subclass that computes as one.

    A subclass is tried on a few inputs.
    """
    if not is_subclass(module):
        return True
    held = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    if held or not isinstance(module, nn.Linear | nn.Embedding) or computed(module) is not None:
        return False
    if weight_of(module).is_meta:
        # Not loaded: its values are seen when they are.
        return True
    in_features = weight_shape(module)[1]
    device, dtype = device_of(module), weight_of(module).dtype
    x = torch.arange(3 * in_features, device=device).cos().reshape(1, 3, in_features).to(dtype)
    if isinstance(module, nn.Embedding):
        # Not in order, as positions are.
        x = torch.arange(min(in_features, 3), device=device).flip(0)[None]
    training, module.training = module.training, False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            made = module.forward(x)
    except Exception:
        # A forward of somebody's own, which may want more than an input.
        return False
    finally:
        module.training = training
    return is_output(module, x, made)


def is_subclass(module: nn.Module) -> bool:
    """Whether a layer's class is none of those whose mathematics are known."""
    return type(module) not in (nn.Linear, nn.Embedding) and not is_conv1d(module)


@torch.no_grad()
def is_output(module: nn.Module, x: Tensor, made: object) -> bool:
    """Whether an output is, to rounding, that of a plain layer of the module's weight and bias."""
    weight, bias = weight_of(module), tensor_of(module, "bias")
    if isinstance(module, nn.Embedding):
        wanted = weight.T[x]
    else:
        wanted = linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    if not isinstance(made, Tensor) or made.shape != wanted.shape:
        return False
    low = max(torch.finfo(t.dtype).eps for t in (made, wanted))
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    return torch.allclose(
        made.double(), wanted.double(), rtol=32 * low, atol=32 * low * size, equal_nan=True
    )


def _unsupported(module: nn.Module, members: int) -> str | None:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution"
    kind = type(module).__name__
    base = "nn.Embedding" if isinstance(module, nn.Embedding) else "nn.Linear"
    if not isinstance(module, nn.Linear | nn.Embedding) and not is_conv1d(module):
        experts = "expert" in kind.lower() or "moe" in kind.lower()
        own = module.parameters(recurse=False)
        if experts and any(p.dim() == 3 and p.shape[0] > 1 for p in own):
            return "fused expert weights (E x out x in): not covered"
        return f"its matrices are {kind}'s own, not those of an nn.Linear: not covered"
    why = computed(module) or _unreadable(module.get_parameter("weight"))
    if why is not None:
        return why
    if getattr(module, "max_norm", None) is not None:
        return "it renormalises its rows as they are used (max_norm)"
    if not is_plain(module):
        return f"{kind} is a subclass of {base} that computes something else, or with more weights"
    out_features, in_features = weight_shape(module)
    if not out_features or not in_features or largest_rank(out_features, in_features, members) < 1:
        return f"no rank of a {out_features} x {in_features} matrix saves any"
    return None


def _unreadable(weight: nn.Parameter) -> str | None:
    """Why a weight is no matrix of plain floats, or None."""
    kind, data = type(weight).__name__, type(weight.data).__name__
    if is_distributed(weight):
        kind = data = "Tensor"
    if data != "Tensor" or kind not in ("Parameter", "Tensor"):
        held = data if data != "Tensor" else kind
        return f"its weight is a {held} of {weight.dtype}, not plain floats: dequantise it first"
    if weight.is_complex():
        return f"its weight is complex ({weight.dtype}): not covered"
    if weight.dtype not in _FLOATS:
        return f"its weight is of {weight.dtype}, not plain floats: dequantise it first"
    if weight.layout is not torch.strided:
        return f"its weight is sparse ({weight.layout}): make it dense first, weight.to_dense()"
    if weight.dim() != 2:
        return f"its weight is of shape {tuple(weight.shape)}, not a matrix"
    return None
