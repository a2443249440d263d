"""Llama-2-7B's shapes from decomposition to factors, one matrix at a time, in 24 GB of memory.

    python experiments/06_llama_7b/run.py            a sample: each shape once a core
    python experiments/06_llama_7b/run.py --only fwsvd --all   all 224 matrices
    python experiments/06_llama_7b/run.py --quick    tiny shapes: does the line still hold?

Weights and statistics are random, made when they are asked for and let go. Needs rankopt[torch].
kronecker decomposes with moments on both sides; the collector is a pass over data through one
block. Writes results.json and table.md beside this file (not with --quick); --only replaces a part.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matrices
import numpy as np
import torch
from matrices import Sizes, Stopwatch
from tables import table

from rankopt.backends import find_backend
from rankopt.layers import Layer, fingerprint
from rankopt.measure.decompose import ScaledCurve, decompose_layers
from rankopt.plan.planner import make_plan
from rankopt.profile.info import BackendInfo, ProfileInfo, ScaleInfo
from rankopt.profile.profile import Profile
from rankopt.profile.spilled import SpilledArrays

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from published import provenance, publish  # noqa: E402 (beside the folders of the experiments)

PARTS = ("fwsvd", "kronecker", "collector")
LIMIT = 24 * 2**30
#: Matrices of each shape whose factors are held against their curve.
CHECKED = 2
QUICK = Sizes(blocks=3, hidden=64, wide=172, heads=4, vocabulary=96, tokens=16, rank_multiple=8)


@contextmanager
def stage(found: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Seconds and peak memory of what is inside, under its name."""
    matrices.forget_peak()
    entry: dict[str, Any] = {}
    started = time.perf_counter()
    yield entry
    entry["seconds"] = time.perf_counter() - started
    entry["peak_bytes"] = matrices.peak()
    found[name] = entry
    print(f"{name}: {entry['seconds']:.1f} s, {entry['peak_bytes'] / 2**30:.2f} GiB", flush=True)


def shape_of(layer: Layer) -> str:
    return f"{layer.out_features}x{layer.in_features}"


def sample(layers: Sequence[Layer], each: int | None) -> dict[str, list[Layer]]:
    """Shape -> its layers, at most ``each``."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(shape_of(layer), []).append(layer)
    return {shape: some[:each] for shape, some in found.items()}


def decomposed(
    sizes: Sizes, backend: str, shapes: Mapping[str, list[Layer]], spilled: Any, workers: int
) -> tuple[dict[str, ScaledCurve], dict[str, Any]]:
    """Curves of the layers, and what each shape took."""
    curves: dict[str, ScaledCurve] = {}
    took: dict[str, Any] = {}
    for shape, some in shapes.items():
        watch = Stopwatch()
        started = time.perf_counter()
        curves |= decompose_layers(
            some,
            watch.timed(lambda name: matrices.weight_of(sizes, name)),
            watch.timed(lambda name: matrices.statistics_of(sizes, backend, name)),
            (backend,),
            store=spilled,
            workers=workers,
        )[backend]
        # Random matrices take time that real ones would not.
        busy = (time.perf_counter() - started) * min(workers, len(some)) - watch.seconds
        took[shape] = {"matrices": len(some), "worker_seconds": busy / len(some)}
        print(f"{shape}: {took[shape]['worker_seconds']:.1f} s of one worker", flush=True)
    return curves, took


def profile_of(
    sizes: Sizes,
    backend: str,
    layers: tuple[Layer, ...],
    curves: dict[str, ScaledCurve],
    spilled: Any,
) -> Profile:
    """All layers; one that was not decomposed has the curve of one that was, times a number."""
    measured = sample([layer for layer in layers if layer.name in curves], None)
    rows, scaled, factors = {}, {}, []
    for index, layer in enumerate(layers):
        alike = measured[shape_of(layer)]
        like = curves.get(layer.name)
        factor = 1.0
        if like is None:
            like = curves[alike[index % len(alike)].name]
            factor = matrices.layer_scale(sizes, layer.name)
        rows[layer.name] = matrices.row_sums(sizes, layer.name)
        scaled[layer.name] = dataclasses.replace(like.curve, losses=like.curve.losses * factor)
        factors.append(like.factors)
    found = find_backend(backend)
    planned = sum(layer.dense_cost for layer in layers)
    info = ProfileInfo(
        versions={name: version(name) for name in ("rankopt", "torch")},
        architecture="LlamaForCausalLM",
        fingerprint=fingerprint("LlamaForCausalLM", layers),
        task="causal-lm",
        examples=matrices.UNITS,
        targets=matrices.UNITS * (sizes.tokens - 1),
        units=float(matrices.UNITS),
        data_digest=hashlib.sha256(b"random").hexdigest(),
        model_parameters=planned + 2 * sizes.vocabulary * sizes.hidden,
        model_bytes=2 * (planned + 2 * sizes.vocabulary * sizes.hidden),
        layers=layers,
        left_alone=(),
        backends=(
            BackendInfo(
                name=backend,
                source=found.source,
                scales=tuple(
                    ScaleInfo(name=n, unit=s.unit, factors=tuple(each[n] for each in factors))
                    for n, s in found.scales.items()
                ),
            ),
        ),
    )
    return Profile(info, rows, {backend: scaled}, kept_arrays=spilled)


def factorised(
    sizes: Sizes, backend: str, profile: Profile, plan: Any, some: Sequence[Layer]
) -> dict[str, Any]:
    """Factors of planned ranks, one layer at a time; the error of some against their curves."""
    chosen = find_backend(backend)
    took: dict[str, Any] = {}
    errors, dense = [], 0
    for layer in some:
        rank = plan.ranks[layer.name]
        dense += rank is None
        rank = layer.largest_rank() if rank is None else rank
        weight = matrices.weight_of(sizes, layer.name)
        started = time.perf_counter()
        stored = profile.kept(backend, layer.name)
        kept = {kind: torch.from_numpy(np.array(array)) for kind, array in stored.items()}
        read = time.perf_counter()
        up, down = chosen.factors(weight, kept, rank)
        _ = up.to(weight.dtype), down.to(weight.dtype)
        entry = took.setdefault(shape_of(layer), {"matrices": 0, "read": 0.0, "factors": 0.0})
        entry["matrices"] += 1
        entry["read"] += read - started
        entry["factors"] += time.perf_counter() - read
        if entry["matrices"] <= CHECKED and matrices.can_check(backend, layer):
            error = matrices.error(sizes, backend, layer.name, weight, up @ down)
            losses = profile.curves[backend][layer.name].losses
            errors.append(abs(error - float(losses[rank])) / float(losses[0]))
    for entry in took.values():
        entry["read"] /= entry["matrices"]
        entry["factors"] /= entry["matrices"]
    return {"shapes": took, "planned_dense": dense, "largest_error": max(errors, default=None)}


def experiment(
    sizes: Sizes, backend: str, each: int | None, workers: int, folder: Path
) -> dict[str, Any]:
    """Decompose, save, load, plan, factorise."""
    layers = matrices.layers_of(sizes)
    shapes = sample(layers, each)
    counts = {shape: len(some) for shape, some in sample(layers, None).items()}
    some = [layer for group in shapes.values() for layer in group]
    found: dict[str, Any] = {
        "settings": {
            **dataclasses.asdict(sizes),
            "workers": workers,
            "threads": torch.get_num_threads(),
        },
        "layers": len(layers),
        "decomposed": len(some),
        "stages": {},
    }
    path = folder / f"{backend}.safetensors"
    stages = found["stages"]
    with SpilledArrays(folder) as spilled:
        with stage(stages, "decompose") as entry:
            curves, entry["shapes"] = decomposed(sizes, backend, shapes, spilled, workers)
            taken = {shape: entry["shapes"][shape]["worker_seconds"] for shape in shapes}
            entry["all_seconds"] = sum(counts[s] * taken[s] for s in shapes) / workers
        profile = profile_of(sizes, backend, layers, curves, spilled)
        with stage(stages, "save") as entry:
            profile.save(path)
            entry["bytes"] = path.stat().st_size
            entry["kept_bytes"] = sum(spilled[name].nbytes for name in spilled)
    with stage(stages, "load"):
        profile = Profile.load(path)
    with stage(stages, "plan") as entry:
        plan = make_plan(profile, keep=sizes.keep, rank_multiple=sizes.rank_multiple)
        entry |= {
            "options": sum(layer.ranks(sizes.rank_multiple).size for layer in layers),
            "gap": plan.certificate.gap,
            "status": plan.certificate.status,
            "parameters": plan.size.planned,
            "budget": plan.budget.parameters,
        }
    with stage(stages, "factors") as entry:
        entry |= factorised(sizes, backend, profile, plan, some)
        taken = {s: each["read"] + each["factors"] for s, each in entry["shapes"].items()}
        entry["all_seconds"] = sum(counts[s] * taken[s] for s in shapes)
    # What is kept of a matrix is proportional to its smaller side and its largest rank.
    shares = {x.name: x.largest_rank() * min(x.out_features, x.in_features) for x in layers}
    size, times = stages["save"], sum(shares.values()) / sum(shares[x.name] for x in some)
    size["all_bytes"] = round(size["bytes"] + size["kept_bytes"] * (times - 1))
    size["all_seconds"] = size["seconds"] * size["all_bytes"] / size["bytes"]
    return found


def check(found: Mapping[str, Any]) -> None:
    """Within the memory, within the budget, and curves that are those of the factors."""
    for name, each in found.items():
        for what, entry in each["stages"].items():
            assert entry["peak_bytes"] < LIMIT, f"{name}, {what}: {entry['peak_bytes']} bytes"
        if name == "collector":
            continue
        plan, factors = each["stages"]["plan"], each["stages"]["factors"]
        assert plan["parameters"] <= plan["budget"], f"{name}: over budget"
        assert plan["status"] == "optimal", f"{name}: {plan['status']}"
        error = factors["largest_error"]
        assert error is None or error < 1e-6, f"{name}: curve and factors differ by {error}"


def keep(found: Mapping[str, Any]) -> None:
    """Add to results.json and table.md."""
    path = HERE / "results.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    merged = {name: part for name, part in {**before, **found}.items() if name != "made"}
    publish(HERE, provenance(HERE), merged, table(merged), None if merged == found else before)


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=PARTS, action="append", help="may be repeated")
    parser.add_argument("--all", action="store_true", help="all matrices")
    parser.add_argument("--matrices", type=int, help="of each shape; by default the workers")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="for the profile; 20 GB free with --all")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {}
        if given.quick:
            for backend, each, workers in (("fwsvd", None, 1), ("kronecker", 2, 2)):
                found[backend] = experiment(QUICK, backend, each, workers, folder)
            found["collector"] = matrices.collected(QUICK, stage)
        else:
            each = None if given.all else given.matrices or given.workers
            for part in given.only or PARTS:
                if part == "collector":
                    found[part] = matrices.collected(Sizes(), stage)
                else:
                    found[part] = experiment(Sizes(), part, each, given.workers, folder)
                print(part, "is measured", flush=True)
    check(found)
    print(table(found))
    if not given.quick:
        keep(found)
    print("ok")


if __name__ == "__main__":
    main()
