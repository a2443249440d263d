"""Parameters and bytes of a model, dense or compressed."""

import dataclasses
from collections.abc import Iterable

from torch import nn

from rankopt.layers import Layer
from rankopt.model.lowrank import LowRank
from rankopt.model.matrices import matrices_of
from rankopt.model.weights import identities, numel_of


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Parameters and bytes as they are now.

    Attributes:
        planned: weights that a plan changed or could change.
        model: all parameters, tied ones once.
        model_bytes: the same in bytes.
    """

    planned: int
    model: int
    model_bytes: int


def model_size(model: nn.Module, layers: Iterable[Layer] | None = None) -> ModelSize:
    """Count parameters, of a dense or a compressed model.

    Args:
        model: not wrapped (see unwrapped).
        layers: what counts as planned; by default what find_layers finds if nothing is said, and
            all that is low rank.
    """
    owned = identities(model)
    unique = {identity: _parameter(model, *key) for key, identity in owned.items()}
    members = None if layers is None else {name for layer in layers for name in layer.members}
    weights = [
        name
        for name, matrix in matrices_of(model).items()
        if (matrix.default if members is None else name in members)
    ]
    for name, module in model.named_modules():
        if isinstance(module, LowRank) and (members is None or name in members):
            weights += [f"{name}.down", f"{name}.up"]
    planned = {owned[name, "weight"] for name in weights}
    return ModelSize(
        sum(unique[identity].numel() for identity in planned),
        sum(numel_of(p) for p in unique.values()),
        sum(numel_of(p) * p.element_size() for p in unique.values() if numel_of(p)),
    )


def _parameter(model: nn.Module, module: str, name: str) -> nn.Parameter:
    return model.get_submodule(module).get_parameter(name)
