"""Models of which FSDP2 (``torch.distributed.fsdp.fully_shard``) keeps a part in each process.

Their weights are DTensors, but while a unit (a block, say) runs forward or backward: then all
processes have put theirs together. So every pass over the model needs all processes, in the same
order; and reading a weight does (``DTensor.full_tensor``). FSDP gives sharded modules classes of
its own, ``FSDPLlamaForCausalLM``, which are what tells them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.errors import ModelError


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor; told by name: torch may have been built without them."""
    return type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor"


def whole_of(tensor: Tensor) -> Tensor:
    """All of a DTensor, for which all processes must ask; any other tensor itself."""
    if not is_distributed(tensor):
        return tensor
    distributed: Any = tensor
    found: Tensor = distributed.full_tensor()
    return found


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has it in parts."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def has_shards(model: nn.Module) -> bool:
    """Whether any parameter is in parts."""
    return any(is_distributed(parameter) for parameter in model.parameters())


@contextmanager
def as_itself(model: nn.Module, processes: int) -> Iterator[bool]:
    """The modules of a sharded model under the classes that they had before; as it was afterwards.

    No weight wants a gradient inside, be it in parts or put together for a pass: FSDP would compute
    and average it.

    Args:
        model: any; nothing changes for one that is not sharded.
        processes: how many share the work.

    Yields:
        Whether it is sharded.

    Raises:
        ModelError: it is spread over other processes than these, or in float16.
    """
    if not has_shards(model):
        yield False
        return
    for name, parameter in model.named_parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        if mesh is not None and mesh.size() != processes:
            raise ModelError(
                f"parameter {name} is sharded over {mesh.size()} of {processes} processes: shard "
                "the model over all of them"
            )
        if parameter.dtype == torch.float16:
            raise ModelError(
                f"parameter {name} is in float16, where each process tries for itself how often "
                "it must run: shard the model in bfloat16 or float32"
            )
    units: dict[Any, Any] = {x: type(x) for x in model.modules() if is_sharded(x)}
    for unit in units:
        # After a forward pass alone the outermost one is whole still.
        unit.reshard()
    parts = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    #: Whole parameters that have been seen, and where.
    seen: dict[nn.Parameter, tuple[nn.Module, str]] = {}

    def freeze(module: nn.Module, _: Any) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_distributed(parameter):
                seen[parameter] = module, name
                parameter.requires_grad_(False)

    with ExitStack() as stack:
        for module in model.modules():
            if module._parameters:
                stack.enter_context(module.register_forward_pre_hook(freeze))
        try:
            for parameter, _ in parts:
                parameter.requires_grad_(False)
            for unit, kind in units.items():
                # (FSDPModule, the class that it had)
                unit.__class__ = kind.__bases__[1]
            yield True
        finally:
            for unit, kind in units.items():
                unit.__class__ = kind
                unit.reshard()
            for parameter, wanted in parts:
                parameter.requires_grad_(wanted)
            for parameter, (module, name) in seen.items():
                parameter.requires_grad_(module.get_parameter(name).requires_grad)
