"""Modules as they are met: their weight in normal form, wherever it is kept, and who shares it.

accelerate's offloading puts weights on the meta device and keeps the true ones in a hook of the
module; torch.compile and data parallelism wrap the model in one of their own.
"""

import os

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from rankopt.errors import ModelError, require_a
from rankopt.model.offloaded import offload_hook
from rankopt.model.sharded import has_shards, whole_of


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def weight_of(module: nn.Module) -> Tensor:
    """W in normal form, shape ``(out, in)``, detached; a view of the module's own.

    Of offloaded modules it is a copy on the device that the module computes on.
    """
    weight = tensor_of(module, "weight")
    assert weight is not None
    return weight.T if _transposed(module) else weight


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A module's own parameter, detached, wherever accelerate keeps it; None if it has none.

    Of a sharded one all processes must ask.
    """
    parameter: Tensor | None = getattr(module, name, None)
    if parameter is None or not parameter.is_meta:
        return None if parameter is None else whole_of(parameter.detach())
    hook = offload_hook(module)
    if hook is None:
        return parameter.detach()
    stored: Tensor = hook.weights_map[name]
    return stored.detach().to(hook.execution_device)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs belong; of offloaded models where they compute."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    hooks = (offload_hook(module) for module in model.modules())
    return next((torch.device(x.execution_device) for x in hooks if x), torch.device("cpu"))


def unwrapped(model: nn.Module, *, sharded: bool = False) -> nn.Module:
    """The model itself, out of ``torch.compile`` and DistributedDataParallel, however nested.

    DDP only averages gradients of weights, and those are never computed here.

    Args:
        model: maybe wrapped.
        sharded: take a model of which FSDP2 keeps a part here.

    Raises:
        ModelError: no module; DataParallel and FSDP, whose modules are not the model's own; and a
            sharded model, if those are not taken.
    """
    require_a(nn.Module, model, ModelError, "load it with transformers' from_pretrained")
    inner = model
    while True:
        if isinstance(inner, nn.DataParallel):
            raise ModelError("DataParallel replicas race in hooks: profile model.module")
        if any(_is_flat(module) for module in inner.modules()):
            raise ModelError(
                "FullyShardedDataParallel keeps a part of all weights in one row: shard the model "
                "with torch.distributed.fsdp.fully_shard instead, or profile it before"
            )
        if not sharded and has_shards(inner):
            raise ModelError(
                "FSDP keeps only a part of each weight here: take the model before it is sharded "
                "(one that is too large for a device: with accelerate's cpu_offload or "
                "device_map); profile_model alone takes it sharded"
            )
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner.get_submodule("_orig_mod")
        else:
            return inner


def computed(module: nn.Module) -> str | None:
    """Why a weight or bias is no parameter that a layer holds, with the remedy; None if it is."""
    held, buffers = module._parameters, module._buffers
    for own in ("weight", "bias"):
        parameter = held.get(own)
        if parametrize.is_parametrized(module, own):
            how, remedy = "parametrize", f"parametrize.remove_parametrizations(module, {own!r})"
        elif f"{own}_mask" in buffers:
            how, remedy = "prune", f"prune.remove(module, {own!r})"
        elif f"{own}_g" in held:
            how, remedy = "weight_norm", f"remove_weight_norm(module, {own!r})"
        elif f"{own}_orig" in held:
            how, remedy = "spectral_norm", f"remove_spectral_norm(module, {own!r})"
        elif own not in held or isinstance(getattr(type(module), own, None), property):
            if own == "weight" or getattr(module, own, None) is not None:
                return f"its {own} is no parameter of its own: make it an nn.Parameter first"
            continue
        elif parameter is None and own == "weight":
            return "it has no weight"
        elif parameter is not None and is_lazy(parameter):
            return "its weights are not initialised: run the model on a batch first"
        else:
            continue
        return f"its {own} is computed (torch.nn.utils.{how}): {remedy} first"
    return None


def embedding_of(model: nn.Module, side: str = "input") -> nn.Module | None:
    """What looks tokens up, or what scores them; None if a model has none, or does not say.

    Args:
        model: of transformers, or anybody's.
        side: ``input`` or ``output``.
    """
    try:
        found: nn.Module | None = getattr(model, f"get_{side}_embeddings")()
    except (AttributeError, NotImplementedError):
        # transformers' way to say that there is none; of a user's class, the method may be missing.
        return None
    return found


def numel_of(parameter: nn.Parameter) -> int:
    """Of a parameter; 0 of one that is not initialised."""
    return 0 if is_lazy(parameter) else parameter.numel()


def overlapping(model: nn.Module) -> dict[str, str]:
    """Module -> another, where parameters that are not one lie in the same memory."""
    spans = []
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            plain = type(parameter.data) is Tensor and not is_lazy(parameter)
            if not plain or parameter.is_meta or parameter.layout is not torch.strided:
                continue
            if parameter.dim() >= 2 and parameter.numel():
                steps = zip(parameter.shape, parameter.stride(), strict=True)
                reach = 1 + sum((size - 1) * step for size, step in steps)
                start = parameter.data_ptr()
                end = start + reach * parameter.element_size()
                spans.append((str(parameter.device), start, end, id(parameter), name))
    found: dict[str, str] = {}
    last = ("", 0, 0, 0, "")
    for span in sorted(spans):
        if span[0] == last[0] and span[1] < last[2] and span[3] != last[3]:
            found.setdefault(span[4], last[4])
            found.setdefault(last[4], span[4])
        last = span if span[0] != last[0] else max(last, span, key=lambda each: each[2])
    return found


def memory_for(model: nn.Module) -> int | None:
    """Bytes on the model's device; None for several devices, or where it cannot be told."""
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop()
    if devices:
        return None
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _is_flat(module: nn.Module) -> bool:
    """Whether the first FSDP has it in parts; told by name: it may be missing."""
    return any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of W in normal form, without reading it."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if _transposed(module) else (rows, columns)


def shown_shape(shape: tuple[int, ...] | None) -> str:
    """``576 x 1536``; None is of what is missing."""
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a number"


def _transposed(module: nn.Module) -> bool:
    return is_conv1d(module) or isinstance(module, nn.Embedding)


def identities(model: nn.Module) -> dict[tuple[str, str], object]:
    """(module, parameter) -> what is equal for tied ones.

    accelerate unties the meta tensors that it puts in the place of what it offloads; transformers
    remembers.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[tuple[str, str], object] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{own}" if name else own
            found[name, own] = ties.get(full, full) if parameter.is_meta else id(parameter)
    return found
