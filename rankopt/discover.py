"""Which matrices of a model are planned, and which are left alone and why.

Planned are plain ``nn.Linear`` and GPT-2's ``Conv1D`` inside the transformer blocks, that is below
an ``nn.ModuleList``: every transformers architecture keeps its repeated blocks in one. Types are
compared exactly, because int8, 4-bit and LoRA layers are subclasses of ``nn.Linear``.
"""

import dataclasses
import hashlib
import re

import torch
from torch import Tensor, nn

from rankopt.errors import ModelError
from rankopt.layers import Layer, LeftAlone
from rankopt.lowrank import LowRankLinear

_SAMPLE = 64


@dataclasses.dataclass(frozen=True)
class Found:
    """The planned layers of a model, their modules, and the rest.

    Attributes:
        layers: planned, in the order of ``named_modules``.
        modules: layer name -> module.
        left_alone: other modules with matrices.
    """

    layers: tuple[Layer, ...]
    modules: dict[str, nn.Module]
    left_alone: tuple[LeftAlone, ...]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def weight_of(module: nn.Module) -> Tensor:
    """W in normal form, shape ``(out, in)``, detached; a view of the module's own."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_conv1d(module) else weight


def find_layers(model: nn.Module) -> Found:
    """List what can be planned.

    Raises:
        ModelError: weights not loaded, not finite, a plan already applied, or nothing to plan.
    """
    structure = _Structure.of(model)
    layers: list[Layer] = []
    modules: dict[str, nn.Module] = {}
    left_alone: list[LeftAlone] = []
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            raise ModelError(f"layer {name} is low rank already: use the dense model")
        own = list(module.parameters(recurse=False))
        if not any(parameter.dim() >= 2 for parameter in own):
            continue
        reason = _reason(name, module, structure)
        if reason is None:
            layer = _describe(name, module)
            if layer.largest_rank > 0:
                layers.append(layer)
                modules[name] = module
                continue
            reason = f"no rank of a {layer.out_features} x {layer.in_features} matrix saves any"
        parameters = sum(parameter.numel() for parameter in own)
        left_alone.append(
            LeftAlone(name=name, module=type(module).__name__, parameters=parameters, reason=reason)
        )
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no plain nn.Linear or Conv1D inside an nn.ModuleList: "
            "nothing to plan"
        )
    return Found(tuple(layers), modules, tuple(left_alone))


@dataclasses.dataclass(frozen=True)
class _Structure:
    """Names of the ModuleLists, and for each parameter (by id) the modules that own it."""

    lists: set[str]
    owners: dict[int, list[str]]

    @classmethod
    def of(cls, model: nn.Module) -> "_Structure":
        lists, owners = set(), dict[int, list[str]]()
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList):
                lists.add(name)
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(name)
        return cls(lists, owners)


def _reason(name: str, module: nn.Module, structure: _Structure) -> str | None:
    parents = name.split(".")
    if not any(".".join(parents[:k]) in structure.lists for k in range(1, len(parents))):
        kind = "embedding" if isinstance(module, nn.Embedding) else "head or projection"
        owners = {n for p in module.parameters(recurse=False) for n in structure.owners[id(p)]}
        tied = ", ".join(sorted(owners - {name}))
        return f"{kind} outside the transformer blocks" + (f", tied to {tied}" if tied else "")
    if type(module) is not nn.Linear and not is_conv1d(module):
        return "not a plain nn.Linear or Conv1D"
    weight = module.get_parameter("weight")
    if weight.is_meta:
        raise ModelError(f"layer {name}: its weights are not loaded (meta device)")
    if type(weight.data) is not Tensor or not weight.is_floating_point():
        return f"its weight is a {type(weight.data).__name__} of {weight.dtype}, not plain floats"
    others = [other for other in structure.owners[id(weight)] if other != name]
    if others:
        return f"its weight is tied to {', '.join(others)}"
    return None


def _describe(name: str, module: nn.Module) -> Layer:
    weight = weight_of(module)
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"layer {name}: its weights hold NaN or infinite values")
    stride = max(weight.numel() // _SAMPLE, 1)
    sample = weight.reshape(-1)[::stride][:_SAMPLE].float().cpu().numpy()
    return Layer(
        name=name,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        kind=re.split(r"(?:^|\.)\d+\.", name)[-1],
        itemsize=weight.element_size(),
        digest=hashlib.sha256(sample.tobytes()).hexdigest()[:16],
    )


def fingerprint(architecture: str, layers: tuple[Layer, ...]) -> str:
    """sha256 over the architecture and the layers' names, shapes and weight samples."""
    digest = hashlib.sha256(architecture.encode())
    for x in layers:
        digest.update(f"\n{x.name} {x.out_features} {x.in_features} {x.digest}".encode())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Parameters and bytes as they are now.

    Attributes:
        planned: weights inside the transformer blocks that a plan changed or could change.
        model: all parameters, tied ones once.
        model_bytes: the same in bytes.
    """

    planned: int
    model: int
    model_bytes: int


def model_size(model: nn.Module) -> ModelSize:
    """Count parameters, of a dense or a compressed model."""
    structure, planned = _Structure.of(model), 0
    inside = ""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            inside = name + "."
            planned += module.down.weight.numel() + module.up.weight.numel()
        elif inside and name.startswith(inside):
            continue
        elif (type(module) is nn.Linear or is_conv1d(module)) and _reason(
            name, module, structure
        ) is None:
            rows, columns = module.get_parameter("weight").shape
            planned += rows * columns if min(rows, columns) > 1 else 0
    parameters = list(model.parameters())
    return ModelSize(
        planned,
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in parameters),
    )
