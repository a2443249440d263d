"""Weights that accelerate keeps in memory or in files, off the device that computes.

They are on the meta device, but in the forward pass of their own module, for which a hook of the
module's puts the true ones there. Autograd keeps what its backward pass will need, these weights
too: after a forward pass the whole model would be in memory. So it is given their names instead,
and reads them again.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def offload_hook(module: nn.Module) -> Any:
    """The hook of accelerate's that keeps a module's weights while they are on the meta device."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "weights_map", None) is not None:
            return each
    return None


def files_of_weights(model: nn.Module) -> dict[str, dict[str, str]]:
    """The table from which accelerate reads weights on disk, which may be changed.

    Returns:
        Name -> ``safetensors_file``, ``weight_name`` in it, and ``dtype`` to be read as; empty
        where none is on disk.
    """
    for module in model.modules():
        hook = offload_hook(module)
        index = None if hook is None else getattr(hook.weights_map, "dataset", hook.weights_map)
        found: dict[str, dict[str, str]] | None = getattr(index, "index", None)
        if found:
            return found
    return {}


@contextmanager
def read_again(model: nn.Module) -> Iterator[None]:
    """Backward passes inside read offloaded weights anew; nothing changes for other models."""
    hooks = {module: offload_hook(module) for module in model.modules()}
    hooks = {module: hook for module, hook in hooks.items() if hook is not None}
    if not hooks:
        yield
        return
    running: list[nn.Module] = []

    def pack(tensor: Tensor) -> Any:
        for module in reversed(running if tensor.layout is torch.strided else ()):
            for name, own in module._parameters.items():
                if own is None or own.is_meta or own.dtype != tensor.dtype:
                    continue
                if own.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                    place = tensor.storage_offset() - own.storage_offset()
                    return hooks[module], name, tensor.size(), tensor.stride(), place
        return tensor, tensor._version

    def unpack(packed: Any) -> Tensor:
        if len(packed) == 2:
            tensor, version = packed
            if tensor._version != version:
                # What autograd itself says, which knows nothing of tensors that it was handed.
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    "inplace operation"
                )
            kept: Tensor = tensor
            return kept
        hook, name, size, stride, place = packed
        whole: Tensor = hook.weights_map[name].detach().to(hook.execution_device)
        return whole.as_strided(size, stride, whole.storage_offset() + place)

    with ExitStack() as stack:
        for module in hooks:
            stack.enter_context(
                module.register_forward_pre_hook(lambda module, _: running.append(module))
            )
            stack.enter_context(
                module.register_forward_hook(lambda *_: _drop(running), always_call=True)
            )
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        yield


def _drop(running: list[nn.Module]) -> None:
    if running:
        running.pop()
