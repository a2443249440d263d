"""Does a smaller model run faster: speed against the share of parameters, on CPU and GPU.

    python experiments/11_latency/run.py --folder latency-run    SmolLM2-135M; rankopt[demo]
    python experiments/11_latency/run.py --device cuda           on a GPU, beside the CPU's figures
    python experiments/11_latency/run.py --quick                 a tiny random model, no figure

Writes results.json and table.md beside this file (not with --quick), one row after the other;
--folder keeps them, too, and they are not measured again.
"""

import argparse
import copy
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import resumable  # noqa: E402 (beside the folders of the experiments)

FORMS = ("pairs", "pivoted")
KEEPS = (0.8, 0.5)
MULTIPLES = (1, 8, 16, 64)
#: Tokens of a round of decoding; then the cache is cut to what it was.
STEPS = 4


@dataclasses.dataclass(frozen=True)
class Load:
    """What a model is given.

    Attributes:
        name: ``prefill``, or ``decode``: one token after others, which are cached.
        batch: texts at a time.
        tokens: of each; of decode those that are cached.
    """

    name: str
    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.name} {self.batch} x {self.tokens}"


LOADS = (
    Load("prefill", 1, 512),
    Load("prefill", 32, 64),
    Load("decode", 1, 128),
    Load("decode", 32, 128),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A compressed model.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: of the weights.
        form: of the low ranks.
        keep: share of the planned parameters.
        multiple: ranks are multiples of it.
    """

    device: str
    dtype: str
    form: str
    keep: float
    multiple: int


def plans(model: Any, batch: Any) -> Callable[[Row], Any]:
    """Row -> the model that it is of; every layer has the same share, so that all are low rank."""
    from rankopt import apply_plan, make_plan, profile_model

    profile = profile_model(model, [batch], backends=("svd",), form="pivoted", moments=False)

    def compressed(row: Row) -> Any:
        form: Any = row.form
        plan = make_plan(
            profile, keep=row.keep, solver="uniform", rank_multiple=row.multiple, form=form
        )
        return apply_plan(copy.deepcopy(model), plan, profile), plan.size

    return compressed


def seconds(models: Sequence[Any], load: Load, rounds: int) -> list[float]:
    """Median time of each model under a load; they take turns."""
    import torch

    found: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        calls = [_call(model, load) for model in models]
        for _ in range(rounds + 1):
            for call, times in zip(calls, found, strict=True):
                times.append(call())
    return [statistics.median(times[1:]) for times in found]


def _call(model: Any, load: Load) -> Callable[[], float]:
    import torch

    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    ids = torch.ones(load.batch, load.tokens, dtype=torch.long, device=device)

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        # A busy machine takes the process's turns away, not its time.
        return time.perf_counter() if on_gpu else time.process_time()

    if load.name == "prefill":

        def prefill() -> float:
            start = clock()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            return clock() - start

        return prefill

    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def decode() -> float:
        start = clock()
        for _ in range(STEPS):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        spent = (clock() - start) / STEPS
        cache.crop(-STEPS)
        return spent

    return decode


def measure(
    dense: Any, compressed: Callable[[Row], Any], row: Row, loads: Sequence[Load], rounds: int
) -> dict[str, Any]:
    """Time of a row as a share of the dense model's."""
    import torch

    model, size = compressed(row)
    dtype = getattr(torch, row.dtype)
    pair = [each.to(row.device, dtype).eval() for each in (copy.deepcopy(dense), model)]
    found = {}
    for load in loads:
        of_dense, of_model = seconds(pair, load, rounds)
        found[str(load)] = {"dense": of_dense, "share": of_model / of_dense}
    gpu = {"gpu": torch.cuda.get_device_name()} if row.device == "cuda" else {}
    return {
        **gpu,
        "kept": size.planned / size.planned_dense,
        "of_the_model": size.model / size.model_dense,
        "loads": found,
    }


def table(found: Mapping[str, Any]) -> str:
    """Markdown: time as a share of the dense model's."""
    text: list[str] = []
    rows = found["rows"]
    for device, dtype in dict.fromkeys((row["device"], row["dtype"]) for row in rows):
        chosen = [row for row in rows if (row["device"], row["dtype"]) == (device, dtype)]
        loads = list(chosen[0]["loads"])
        text += [f"## {device}, {dtype}", ""]
        text += ["| form | kept | of the model | multiple | " + " | ".join(loads) + " |"]
        text += ["|---|---|---|---|" + "---|" * len(loads)]
        for row in chosen:
            cells = " | ".join(f"{row['loads'][load]['share']:.2f}" for load in loads)
            sizes = f"{row['kept']:.3f} | {row['of_the_model']:.3f}"
            text.append(f"| {row['form']} | {sizes} | {row['multiple']} | {cells} |")
        dense = ", ".join(f"{load} {1e3 * chosen[0]['loads'][load]['dense']:.1f}" for load in loads)
        text += ["", f"Dense, milliseconds a call: {dense}.", ""]
    return "\n".join(text)


def full(device: str, dtype: str, folder: Path) -> None:
    """SmolLM2-135M."""
    import torch

    from rankopt.demo import smollm2
    from rankopt.model.loading import load_model

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    dense = load_model(str(smollm2(folder / "model")), "float32").eval()
    ids = torch.arange(1, 65)[None]
    compressed = plans(dense, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    rows = [
        Row(device, dtype, form, keep, multiple)
        for multiple in MULTIPLES
        for keep in KEEPS
        for form in FORMS
    ]
    whole = functools.partial(measure, dense, compressed, loads=LOADS, rounds=5)
    resumable.measure_rows(HERE, folder, rows, dict, whole, table)


def quick() -> None:
    """The same lines on a tiny random model."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tests import tiny

    dense = tiny.llama(max_position_embeddings=64).eval()
    compressed = plans(dense, tiny.batches(dense, count=1)[0])
    loads = [Load("prefill", 2, 8), Load("decode", 2, 8)]
    rows = [Row("cpu", "float32", form, 0.7, multiple) for form in FORMS for multiple in (1, 2)]
    with tempfile.TemporaryDirectory() as temporary:
        found = resumable.measure_rows(
            Path(temporary),
            Path(temporary),
            rows,
            dict,
            lambda row: measure(dense, compressed, row, loads, 2),
            table,
        )
    for row in found["rows"]:
        assert row["kept"] <= 0.7 and all(x["share"] > 0 for x in row["loads"].values())


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the model and what is measured there")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if given.quick:
            quick()
        else:
            full(given.device, given.dtype, given.folder or Path(temporary))
    print("ok")


if __name__ == "__main__":
    main()
