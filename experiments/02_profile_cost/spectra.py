"""Spectra and factors: time against torch's SVD, accuracy against float64, a layer's latency."""

import copy
import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, ratio
from torch import Tensor, nn

from rankopt.backends import find_backend
from rankopt.backends.statistics import Statistics
from rankopt.layers import Layer, largest_rank
from rankopt.measure.decompose import decompose_layers
from rankopt.model.lowrank import LowRankLinear

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        shapes: (out, in) that are decomposed.
        rounds: of timing; of large matrices three.
        pool: how many matrices of which size are shared among workers.
        layers: (out, in) of timed layers.
        tokens: rows of their inputs.
        cache: bytes of weights that a timed layer rotates over, beyond the largest cache.
        real: whether SmolLM2's matrices are among those that accuracy is looked at on.
    """

    shapes: tuple[tuple[int, int], ...]
    rounds: int
    pool: tuple[int, int]
    layers: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    cache: int
    real: bool


FULL = Sizes(
    ((384, 384), (384, 1536), (576, 1536), (768, 768), (768, 3072), (3072, 768), (2048, 2048)),
    5,
    (8, 768),
    ((768, 768), (768, 3072), (3072, 768), (2048, 8192)),
    (1, 128, 512),
    96 * 2**20,
    True,
)  # fmt: skip
QUICK = Sizes(((48, 48), (40, 120), (120, 40)), 2, (3, 48), ((64, 64),), (128,), 2**16, False)
#: Of a timed layer in a run.
_CALLS = 24
SHARES = (0.25, 0.5, 0.75, 0.9)


def synthetic(n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
    """A matrix whose singular values fall by a power law, and row Fisher over five decades."""
    generator = torch.Generator().manual_seed(n_out + n_in)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    small = min(n_out, n_in)
    left, right = (torch.linalg.qr(normal(n, small)).Q for n in (n_out, n_in))
    fall = torch.arange(1, small + 1).float() ** -0.7
    rows = torch.exp(2.0 * normal(n_in)).double()
    return (left * fall) @ right.T, rows


def _statistics(rows: Tensor) -> Statistics:
    return Statistics(units=1.0, rows=rows)


def decompositions(sizes: Sizes) -> list[Row]:
    """Seconds of our spectrum and reusable factors, of applying them, and of torch's SVD."""
    backend = find_backend("fwsvd")
    found = []
    for shape in sizes.shapes:
        weight, rows = synthetic(*shape)
        root = rows.sqrt().float()
        most = largest_rank(*shape)
        statistics = _statistics(rows)
        kept = backend.decompose(weight, statistics, most).kept
        stored = {kind: array.float() for kind, array in kept.items()}
        seconds = interleaved(
            {
                "torch.linalg.svd": lambda w=weight, d=root: torch.linalg.svd(
                    w * d, full_matrices=False
                ),
                "decompose": lambda w=weight, s=statistics, r=most: backend.decompose(w, s, r),
                "factors": lambda w=weight, k=stored, r=most: backend.factors(w, k, r // 2),
            },
            min(sizes.rounds, 3) if min(shape) >= 2048 else sizes.rounds,
        )
        found.append(
            {
                "out": shape[0],
                "in": shape[1],
                "seconds": {name: min(times) for name, times in seconds.items()},
                "to_svd": ratio(seconds, "decompose", "torch.linalg.svd"),
                "apply": ratio(seconds, "factors", "decompose"),
            }
        )
    return found


def accuracy(sizes: Sizes) -> list[Row]:
    """Retained energy against a float64 SVD, and what factors stored in float32 lose."""
    backend = find_backend("fwsvd")
    matrices = {f"{n_out}x{n_in}": synthetic(n_out, n_in) for n_out, n_in in sizes.shapes}
    matrices = {name: pair for name, pair in matrices.items() if min(pair[0].shape) < 2048}
    if sizes.real:
        matrices |= real()
    found = []
    for name, (weight, rows) in matrices.items():
        wide, small = weight.double(), min(weight.shape)
        energies = torch.linalg.svdvals(wide * rows.sqrt()).square()
        retained = energies.cumsum(0) / energies.sum()
        made = backend.decompose(weight, _statistics(rows), small)
        ours = 1.0 - made.losses[1:] / made.losses[0]
        stored = {kind: array.float() for kind, array in made.kept.items()}
        excess = []
        for share in (0.25, 0.5, 0.9):
            rank = int(share * small)
            up, down = backend.factors(weight, stored, rank)
            error = float(((wide - up.double() @ down.double()).square() * rows).sum())
            excess.append(error / float(energies[rank:].sum()) - 1.0)
        found.append(
            {
                "matrix": name,
                "condition": float(energies[0] / energies[-1].clamp_min(1e-300)),
                "retained": float(((ours - retained).abs() / retained).max()),
                "excess": excess,
            }
        )
    return found


def real() -> dict[str, tuple[Tensor, Tensor]]:
    """Twelve matrices of SmolLM2-135M and their row Fisher on eight windows; none without it."""
    from models import summed_loss

    from rankopt.data.batches import text_batches
    from rankopt.demo import help_texts, smollm2
    from rankopt.errors import MissingExtraError
    from rankopt.measure.collector import Collector
    from rankopt.model.loading import load_model, load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        try:
            source = str(smollm2(Path(folder) / "model"))
        except MissingExtraError:
            return {}
        model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
    names = [f"model.layers.{k}.{kind}" for k in (1, 14, 28) for kind in kinds]
    modules = {name: model.get_submodule(name) for name in names}
    with torch.enable_grad(), Collector(model, modules) as collector:
        for batch in text_batches(help_texts()[0], tokenizer, 256, 4, 8):
            ids = batch["input_ids"]
            collector.begin(*ids.shape)
            collector.backward(summed_loss(model, ids, ids))
    return {
        name: (module.weight.detach(), collector.sums[name].rows)
        for name, module in modules.items()
    }


def workers(sizes: Sizes) -> Row:
    """Wall clock of decomposing several matrices with one and with two workers."""
    count, size = sizes.pool
    made = {f"layer.{k}": synthetic(size, size) for k in range(count)}
    layers = [
        Layer(name=name, out_features=size, in_features=size, kind="", itemsize=4, digest="")
        for name in made
    ]

    def run(threads: int) -> object:
        return decompose_layers(
            layers,
            lambda name: made[name][0],
            lambda name: _statistics(made[name][1]),
            ["fwsvd"],
            workers=threads,
            progress=False,
        )

    ways = {"one": lambda: run(1), "two": lambda: run(2)}
    seconds = interleaved(ways, sizes.rounds, time.perf_counter)
    return {"matrices": count, "size": size, "speedup": ratio(seconds, "one", "two")}


def latency(sizes: Sizes) -> list[Row]:
    """Time and parameters of a factorised layer, as parts of the dense one's."""
    found = []
    for n_out, n_in in sizes.layers:
        limit = n_out * n_in / (n_out + n_in)
        for tokens in sizes.tokens:
            x = torch.randn(tokens, n_in)
            ranks = {share: max(1, round(limit * share / 8) * 8) for share in SHARES}
            ways = {"dense": _rotating(nn.Linear(n_in, n_out), x, sizes.cache)}
            for share, rank in ranks.items():
                pair = LowRankLinear(n_in, n_out, rank, True)
                ways[str(share)] = _rotating(pair, x, sizes.cache)
            seconds = interleaved(ways, sizes.rounds)
            for share, rank in ranks.items():
                taken = ratio(seconds, str(share), "dense")
                found.append(
                    {
                        "out": n_out,
                        "in": n_in,
                        "tokens": tokens,
                        "rank": rank,
                        "parameters": rank / limit,
                        "time": taken,
                    }
                )
    return found


def _rotating(layer: nn.Module, x: Tensor, cache: int) -> Callable[[], None]:
    """A run over as many copies of a layer as do not fit in the cache."""
    size = sum(p.numel() * p.element_size() for p in layer.parameters())
    turns = itertools.cycle(
        [layer, *(copy.deepcopy(layer) for _ in range(math.ceil(cache / size)))]
    )

    def run() -> None:
        with torch.inference_mode():
            for _ in range(_CALLS):
                next(turns)(x)

    return run


def study(sizes: Sizes) -> Row:
    """All of it."""
    with torch.no_grad():
        return {
            "decompositions": decompositions(sizes),
            "accuracy": accuracy(sizes),
            "workers": workers(sizes),
            "latency": latency(sizes),
        }
