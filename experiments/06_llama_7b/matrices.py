"""Llama-2-7B without Llama-2-7B: its shapes, random weights and statistics, and a block of it.

Everything is drawn from a generator seeded with the layer's name, so that it can be made again
instead of being kept. Weights are normal and rounded to bfloat16. Rows of the Fisher information
are lognormal, with a number of its own for each layer; moments are those of lognormally scaled
normal vectors, as many as the matrix's smaller side.
"""

import dataclasses
import hashlib
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rankopt.backends import find_backend
from rankopt.backends.statistics import Statistics
from rankopt.layers import Layer

T = TypeVar("T")
#: Examples that the statistics stand for.
UNITS = 32
#: Larger moments would need an SVD of the weight to be checked.
_CHECKED = 512
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model (Llama-2-7B if nothing is said), and what is asked of it."""

    blocks: int = 32
    hidden: int = 4096
    wide: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    tokens: int = 256
    keep: float = 0.8
    rank_multiple: int = 64
    layers_at_a_time: int = 2


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Kind of layer -> (out, in)."""
    square, up = (sizes.hidden, sizes.hidden), (sizes.wide, sizes.hidden)
    return {
        **{f"self_attn.{kind}": square for kind in _ATTENTION},
        "mlp.gate_proj": up,
        "mlp.up_proj": up,
        "mlp.down_proj": up[::-1],
    }


def layers_of(sizes: Sizes) -> tuple[Layer, ...]:
    """All planned layers, in the order of the model."""
    return tuple(
        Layer(
            name=f"model.layers.{block}.{kind}",
            out_features=out,
            in_features=into,
            kind=kind,
            itemsize=2,
            digest=hashlib.sha256(f"{block} {kind}".encode()).hexdigest()[:16],
        )
        for block in range(sizes.blocks)
        for kind, (out, into) in shapes_of(sizes).items()
    )


def _generator(name: str, what: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(f"{name} {what}".encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


def _shape(sizes: Sizes, name: str) -> tuple[int, int]:
    return shapes_of(sizes)[".".join(name.split(".")[-2:])]


def weight_of(sizes: Sizes, name: str) -> Tensor:
    """W, shape ``(out, in)``, bfloat16."""
    made = torch.randn(_shape(sizes, name), generator=_generator(name, "weight"))
    return made.mul_(0.02).to(torch.bfloat16)


def layer_scale(sizes: Sizes, name: str) -> float:
    """A layer's own number."""
    return math.exp(float(torch.randn((), generator=_generator(name, "scale"))))


def row_sums(sizes: Sizes, name: str) -> npt.NDArray[np.float64]:
    """Raw row sums of the Fisher information, shape ``(in,)``."""
    draws = torch.randn(_shape(sizes, name)[1], generator=_generator(name, "rows"))
    rows: npt.NDArray[np.float64] = draws.double().exp().numpy()
    return rows * (UNITS * layer_scale(sizes, name))


def _moment(name: str, what: str, size: int) -> Tensor:
    generator = _generator(name, what)
    vectors = torch.randn(size, size, generator=generator)
    vectors *= torch.randn(size, generator=generator).mul_(0.5).exp_()
    return (vectors.T @ vectors).double()


def statistics_of(sizes: Sizes, backend: str, name: str) -> Statistics:
    """What the backend needs of a layer."""
    if backend == "fwsvd":
        return Statistics(UNITS, torch.from_numpy(row_sums(sizes, name)))
    small = min(_shape(sizes, name))
    gradient = _moment(name, "gradient", small) * (layer_scale(sizes, name) / small)
    return Statistics(
        UNITS,
        second_moment=_moment(name, "second", small),
        gradient_moment=gradient,
        positions=float(small),
    )


def can_check(backend: str, layer: Layer) -> bool:
    """Whether the error of factors is cheap to compute."""
    return backend == "fwsvd" or min(layer.out_features, layer.in_features) <= _CHECKED


def error(sizes: Sizes, backend: str, name: str, weight: Tensor, approximation: Tensor) -> float:
    """Weighted error of an approximation, from the definition where that is possible."""
    if backend == "fwsvd":
        squares = (weight.double() - approximation).square_().sum(0)
        return float(squares @ torch.from_numpy(row_sums(sizes, name))) / UNITS
    statistics = statistics_of(sizes, backend, name)
    return find_backend(backend).error(weight, approximation, statistics)


class Stopwatch:
    """Seconds spent in functions, by all threads together."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()

    def timed(self, function: Callable[[str], T]) -> Callable[[str], T]:
        """The function, watched."""

        def watched(name: str) -> T:
            started = time.perf_counter()
            made = function(name)
            with self._lock:
                self.seconds += time.perf_counter() - started
            return made

        return watched


def forget_peak() -> None:
    """Start again from what is used now, where the system can; else peaks are of the whole run."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """Largest resident memory since, in bytes."""
    import resource
    import sys

    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def collected(
    sizes: Sizes,
    stage: Callable[[dict[str, Any], str], AbstractContextManager[dict[str, Any]]],
) -> dict[str, Any]:
    """A window through one random block in bfloat16: rows of all layers, then moments in parts."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from rankopt.measure.accumulate import gather
    from rankopt.measure.estimators import Estimator
    from rankopt.measure.loss import ModelLoss
    from rankopt.model.selection import find_layers

    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.wide,
        num_hidden_layers=1,
        num_attention_heads=sizes.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    found: dict[str, Any] = {}
    with stage(found, "make the model"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, sizes.vocabulary, (1, sizes.tokens), generator=generator)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    objective = ModelLoss("causal-lm", Estimator())
    modules = find_layers(model).modules
    with stage(found, "rows of all layers"):
        _require_all(gather(model, modules, batches, objective, frozenset()).sums, modules)
    needs, part = frozenset({"second_moment", "gradient_moment"}), sizes.layers_at_a_time
    names = list(modules)
    with stage(found, f"and moments, {part} layers at a time"):
        for start in range(0, len(names), part):
            some = {name: modules[name] for name in names[start : start + part]}
            _require_all(gather(model, some, batches, objective, needs).sums, some)
    with stage(found, "and moments, all layers at once"):
        _require_all(gather(model, modules, batches, objective, needs).sums, modules)
    return {"settings": dataclasses.asdict(sizes), "stages": found}


def _require_all(sums: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
    for name in modules:
        assert float(sums[name].rows.sum()) > 0.0, f"{name}: no Fisher information"
