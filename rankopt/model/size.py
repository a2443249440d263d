"""Parameters and bytes of a model, dense or compressed."""

import dataclasses
from collections.abc import Iterable

from torch import nn

from rankopt.layers import Layer
from rankopt.model.lowrank import LowRank
from rankopt.model.matrices import matrices_of
from rankopt.model.rounding import Parts, holds_rounded, nbytes_of
from rankopt.model.weights import identities, numel_of


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Parameters and bytes as they are now.

    Attributes:
        planned: weights that a plan changed or could change.
        model: all parameters, tied ones once.
        model_bytes: the same in bytes; of rounded weights packed, with their scales.
    """

    planned: int
    model: int
    model_bytes: int


def model_size(model: nn.Module, layers: Iterable[Layer] | None = None) -> ModelSize:
    """Count parameters, of a dense or a compressed model.

    Args:
        model: not wrapped (see unwrapped).
        layers: what counts as planned; by default what find_layers finds if nothing is said, and
            all that is low rank or rounded.
    """
    owned = identities(model)
    unique = {identity: _parameter(model, *key) for key, identity in owned.items()}
    sizes = {identity: (numel_of(p), _nbytes(p)) for identity, p in unique.items()}
    members = None if layers is None else {name for layer in layers for name in layer.members}
    weights = [
        name
        for name, matrix in matrices_of(model).items()
        if (matrix.default if members is None else name in members)
    ]
    for name, module in model.named_modules():
        chosen = members is None or name in members
        if isinstance(module, LowRank) and chosen:
            weights += [f"{name}.down", f"{name}.up"]
        if isinstance(module, Parts):
            owned[name, "weight"] = id(module)
            sizes[id(module)] = (module.numel, module.nbytes)
        if chosen and holds_rounded(module):
            weights.append(name)
    planned = {owned[name, "weight"] for name in weights}
    return ModelSize(
        sum(sizes[identity][0] for identity in planned),
        sum(numel for numel, _ in sizes.values()),
        sum(nbytes for _, nbytes in sizes.values()),
    )


def _nbytes(parameter: nn.Parameter) -> int:
    return nbytes_of(parameter) if numel_of(parameter) else 0


def _parameter(model: nn.Module, module: str, name: str) -> nn.Parameter:
    return model.get_submodule(module).get_parameter(name)
