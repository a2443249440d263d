"""From a checkpoint of Llama-2-7B's size to a smaller one, in a third of the memory that it takes.

    python experiments/17_large_model/run.py --folder DIR    13.5 GB in, 10.9 GB out; an hour
    python experiments/17_large_model/run.py --quick         tiny shapes

The command line does all of it: profile, plan, apply, each a process of its own. DIR keeps the
checkpoint and what was made; a run that was stopped goes on with its next stage. Needs
rankopt[torch] and accelerate.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from checkpoint import Sizes, Stored, write_checkpoint, write_text
from torch import Tensor

from rankopt import Plan, Profile
from rankopt.files import whole_file
from rankopt.model.loading import hide_bars, load_model

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from published import provenance, publish  # noqa: E402 (beside the folders of the experiments)

LIMIT = 8 * 10**9
QUICK = Sizes(
    blocks=4,
    hidden=64,
    wide=172,
    heads=4,
    vocabulary=256,
    windows=2,
    tokens=16,
    rank_multiple=4,
    killed_after=10,
)
KEEP = 0.8
STAGES = ("profile", "plan, proven", "plan", "apply, killed", "apply")


def command(
    arguments: Sequence[str], folder: Path, log: str, kill_at: int | None = None
) -> dict[str, Any]:
    """Run ``rankopt`` in a folder: seconds, and peak memory of the process.

    Args:
        arguments: of the command line.
        folder: it is run there.
        log: file for what it says.
        kill_at: kill it as soon as so many pieces of ``smaller.partial`` are written.
    """
    started = time.perf_counter()
    with open(folder / log, "w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "rankopt", *arguments], cwd=folder, stdout=said, stderr=said
        )
        try:
            while kill_at is not None and process.poll() is None:
                if pieces(folder) >= kill_at:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.005)
            # The kernel's own count of the process, which has no children.
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        text = (folder / log).read_text(encoding="utf-8")
        raise SystemExit(f"rankopt {arguments[0]} ended with {process.returncode}:\n{text[-3000:]}")
    found = {
        "command": " ".join(["rankopt", *arguments]),
        "seconds": time.perf_counter() - started,
        "peak_bytes": used.ru_maxrss * 1024,
    }
    print(f"{log}: {found['seconds']:.1f} s, {found['peak_bytes'] / 1e9:.2f} GB", flush=True)
    return found


def pieces(folder: Path) -> int:
    """Pieces that are written whole in ``smaller.partial``."""
    journal = folder / "smaller.partial" / "rankopt_partial.jsonl"
    return journal.read_text(encoding="utf-8").count("\n") if journal.is_file() else 0


def experiment(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Checkpoint, profile, plan, apply (killed once), and a block that is read again."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "stages.json"
    stages: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}

    def note(name: str, entry: dict[str, Any]) -> None:
        stages[name] = entry
        with whole_file(kept) as temporary:
            temporary.write_text(json.dumps(stages), encoding="utf-8")

    if "checkpoint" not in stages:
        started = time.perf_counter()
        # Elsewhere: Linux counts what a process had held before it became another (exec).
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            size = other.submit(write_checkpoint, sizes, folder / "dense").result()
        write_text(sizes, folder / "text.txt")
        note("checkpoint", {"bytes": size, "seconds": time.perf_counter() - started})
    if "profile" not in stages:
        asked = f"profile dense --data text.txt --examples {sizes.windows} --batch-size 1"
        asked += f" --max-length {sizes.tokens} --backend fwsvd --no-moments --form pairs"
        # The vectors are 8 GiB; without them apply would take as long as this.
        asked += f" --dtype auto --device-map disk --workers {os.cpu_count()} --bases"
        asked += " -o profile.safetensors"
        note("profile", command(asked.split(), folder, "profile.log"))
    planned = f"plan profile.safetensors --keep {KEEP} --rank-multiple {sizes.rank_multiple}"
    if "plan, proven" not in stages:
        asked = f"{planned} -o best.json"
        note("plan, proven", command(asked.split(), folder, "best.log"))
    if "plan" not in stages:
        # Every planned matrix is to be factorised; where the rank is best left dense tells nothing.
        asked = f"{planned} --solver uniform -o plan.json"
        note("plan", command(asked.split(), folder, "plan.log"))
    apply = ["apply", "dense", "plan.json", "--profile", "profile.safetensors", "-o", "smaller"]
    if "apply, killed" not in stages:
        entry = command(apply, folder, "killed.log", kill_at=sizes.killed_after)
        note("apply, killed", entry | {"pieces": pieces(folder)})
    if "apply" not in stages:
        note("apply", command(apply, folder, "apply.log"))
    started = time.perf_counter()
    block = compared(sizes, folder)
    size = sum(path.stat().st_size for path in (folder / "smaller").glob("*.safetensors"))
    plan = Plan.load(folder / "plan.json")
    return {
        "settings": {
            **dataclasses.asdict(sizes),
            "threads": torch.get_num_threads(),
        },
        "stages": stages,
        "block": block | {"seconds": time.perf_counter() - started},
        "smaller_bytes": size,
        "went_on_after": went_on_after(folder / "apply.log"),
        "plan": {
            "layers": len(plan.layers),
            "low_rank": sum(rank is not None for rank in plan.ranks.values()),
            "planned": plan.size.planned,
            "budget": plan.budget.parameters,
            "parameters": plan.size.model,
            "dense": plan.size.model_dense,
        },
    }


def went_on_after(log: Path) -> int:
    """Pieces that the second ``apply`` found whole, by its own word."""
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith("going on after "):
            return int(line.split()[3])
    return 0


@torch.no_grad()
def compared(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """The smaller folder against the checkpoint, the plan and the profile.

    The first block is loaded by ``from_pretrained`` from either folder. Its low-rank layers'
    errors, by the definition, are held against what the plan counted on; all that is not planned
    must be the checkpoint's to the bit.
    """
    plan = Plan.load(folder / "plan.json")
    profile = Profile.load(folder / "profile.safetensors")
    dense, smaller = Stored(folder / "dense"), Stored(folder / "smaller")
    low = {name for name, rank in plan.ranks.items() if rank is not None}
    factors = {f"{n}.{part}.weight" for n in low for part in ("down", "up")}
    guards = {f"{n}.weight" for n in low}
    assert smaller.names() == dense.names() | factors, "a tensor is lost, or there is one too many"
    untouched = dense.names() - guards
    for name in sorted(untouched):
        assert torch.equal(dense[name], smaller[name]), name
    count = sum(smaller[name].numel() for name in untouched | factors)
    assert count == plan.size.model, f"{count} parameters, {plan.size.model} planned"
    errors = {}
    for name in sorted(n for n in low if n.startswith("model.layers.0.")):
        rank = plan.ranks[name]
        wanted = float(profile.curves["fwsvd"][name].losses[rank])
        rows = torch.from_numpy(profile.fisher_rows[name]) / profile.units
        weight = dense[f"{name}.weight"].double()
        product = smaller[f"{name}.up.weight"].double() @ smaller[f"{name}.down.weight"].double()
        error = float(((weight - product).square().sum(0) * rows).sum())
        errors[name] = abs(error - wanted) / float(profile.curves["fwsvd"][name].losses[0])
    # As a user loads them; weights stay in their files until the block runs.
    first = [load_model(str(folder / each), "auto", "disk") for each in ("smaller", "dense")]
    states = torch.randn(1, sizes.tokens, sizes.hidden, generator=torch.Generator().manual_seed(1))
    outputs = [_block_of(model, states.bfloat16()) for model in first]
    merged = _merged(first[1], smaller, low, states.bfloat16())
    return {
        "untouched": len(untouched),
        "largest_error": max(errors.values(), default=0.0),
        "to_dense": _apart(outputs[0], outputs[1]),
        "to_product": _apart(outputs[0], merged),
    }


def _block_of(model: Any, states: Tensor) -> Tensor:
    """What the first block makes of hidden states."""
    inner = model.model
    places = torch.arange(states.shape[1])[None]
    turns = inner.rotary_emb(states, places)
    found = inner.layers[0](states, position_embeddings=turns, position_ids=places)
    made: Tensor = found[0] if isinstance(found, tuple) else found
    return made


def _merged(dense: Any, smaller: Stored, low: set[str], states: Tensor) -> Tensor:
    """The same of the dense block with products of factors for weights."""
    for name in (n for n in low if n.startswith("model.layers.0.")):
        product = smaller[f"{name}.up.weight"].float() @ smaller[f"{name}.down.weight"].float()
        hook = dense.get_submodule(name)._hf_hook
        hook.weights_map = {"weight": product.bfloat16()}
    return _block_of(dense, states)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def check(sizes: Sizes, found: dict[str, Any]) -> None:
    """Within the memory and the budget; the files are the plan's."""
    stages, plan, block = found["stages"], found["plan"], found["block"]
    for name in STAGES:
        assert stages[name]["peak_bytes"] < LIMIT, f"{name}: {stages[name]['peak_bytes']} bytes"
    assert plan["planned"] <= plan["budget"], plan
    assert plan["low_rank"] == plan["layers"] == 7 * sizes.blocks, plan
    assert found["went_on_after"] >= sizes.killed_after, "the second run began anew"
    # bfloat16 keeps eight bits of each factor.
    assert block["largest_error"] < 1e-3, block
    assert block["to_product"] < 0.02, block


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    stages, plan, block = found["stages"], found["plan"], found["block"]
    size = stages["checkpoint"]["bytes"]
    lines = [
        f"A checkpoint of {size / 1e9:.2f} GB in bfloat16; {plan['low_rank']} of its matrices "
        f"planned and made low rank: {plan['parameters']:,} of {plan['dense']:,} parameters, "
        f"{found['smaller_bytes'] / 1e9:.2f} GB; {found['settings']['threads']} thread.",
        "",
        "| stage | seconds | peak memory, GB | of the checkpoint |",
        "|---|---|---|---|",
    ]
    for name in STAGES:
        entry = stages[name]
        peak = entry["peak_bytes"]
        what = "apply, gone on with" if name == "apply" else name
        lines.append(f"| {what} | {entry['seconds']:,.0f} | {peak / 1e9:.2f} | {peak / size:.2f} |")
    lines += [
        "",
        f"The second `apply` found {found['went_on_after']} pieces whole. {block['untouched']} "
        "tensors are the checkpoint's to the bit. In the first block the factors' errors are those "
        f"of the plan to {block['largest_error']:.1e} of the whole loss; its output is within "
        f"{block['to_product']:.1e} of that of a dense block with the factors' products, and "
        f"{block['to_dense']:.2f} from the checkpoint's (relative norms, random hidden states).",
        "",
        "Commands:",
        "",
        *(f"    {stages[name]['command']}" for name in STAGES if name != "apply, killed"),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="kept; 35 GB free")
    given = parser.parse_args()
    sizes = QUICK if given.quick else Sizes()
    hide_bars()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        how = provenance(HERE, "accelerate", folder=folder)
        found = experiment(sizes, folder)
    print(table(found))
    if not given.quick:
        publish(HERE, how, found, table(found))
    check(sizes, found)
    print("ok")


if __name__ == "__main__":
    main()
