"""Pairs of factors against the pivoted form: measured loss at equal parameters, and latency.

    python experiments/12_forms/run.py                  both; SmolLM2-135M, rankopt[demo,data]
    python experiments/12_forms/run.py --only loss      one of: loss, latency
    python experiments/12_forms/run.py --quick          a tiny random model, without any figure

WikiText-2 comes through the datasets library, or from text files:

    python experiments/12_forms/run.py --calibration valid.txt --held-out test.txt

Writes results.json and table.md beside this file (not with --quick); what is not run again stays.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import wikitext  # noqa: E402 (beside the folders of the experiments)
from published import provenance, publish  # noqa: E402

KEEPS = (0.9, 0.8, 0.65, 0.5)
STRATEGIES = ("uniform@kronecker", "exact@kronecker", "exact@fwsvd")
FORMS = ("pairs", "pivoted")
#: (out, in): SmolLM2's and BERT-base's.
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (768, 768), (3072, 768), (768, 3072))
TOKENS = (1, 16, 128, 512)
SHARES = (0.8, 0.5)


def losses(
    model: Any, calibration: list[Any], held_out: list[Any], keeps: tuple[float, ...]
) -> dict[str, Any]:
    """One profile, a plan of it for each strategy, form and budget; applied and measured."""
    from rankopt.evaluation.evaluation import evaluate
    from rankopt.evaluation.plans import measure_rows
    from rankopt.measure.measure import profile_model
    from rankopt.plan.compare import Strategy, compare

    profile = profile_model(model, calibration, backends=("kronecker", "fwsvd"), form="pivoted")
    strategies = [Strategy.parse(text) for text in STRATEGIES]
    rows = []
    for form in FORMS:
        planned = list(compare(profile, keeps, strategies, form=form))
        for row, found in measure_rows(model, profile, planned, held_out):
            assert row.plan.form == form
            rows.append(
                {
                    "strategy": str(row.strategy),
                    "form": form,
                    "keep": row.keep,
                    "parameters": row.plan.size.planned,
                    "budget": row.plan.budget.parameters,
                    "gap": row.plan.certificate.gap,
                    "dense_layers": sum(rank is None for rank in row.plan.ranks.values()),
                    "loss": found.loss,
                }
            )
    return {
        "data_digest": profile.info.data_digest,
        "examples": profile.info.examples,
        "dense": evaluate(model, held_out).loss,
        "rows": rows,
    }


def latencies(
    shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    """Seconds of one layer on one thread: dense, and both forms with equal parameters.

    The three take turns; of each the median of its rounds.
    """
    import statistics
    import time

    import torch

    from rankopt.model.lowrank import LowRankLinear
    from rankopt.model.pivoted import kind_of

    torch.set_num_threads(1)
    found = []
    for out, into in shapes:
        for share in SHARES:
            most = share * out * into
            sides = out + into
            ranks = {
                "pairs": int(most / sides),
                "pivoted": int((sides - math.sqrt(sides * sides - 4 * most)) / 2),
            }
            layers: dict[str, Any] = {"dense": torch.nn.Linear(into, out)}
            layers["pairs"] = LowRankLinear(into, out, ranks["pairs"], True)
            pivoted: Any = kind_of(False, (out, into), "pivoted")
            layers["pivoted"] = pivoted(into, out, ranks["pivoted"], True)
            order = torch.randperm(len(layers["pivoted"].index))
            layers["pivoted"].index.copy_(order)
            for count in tokens:
                x = torch.randn(1, count, into)
                repeats = min(100, 20_000_000 // (out * into * count) + 1)
                seconds: dict[str, list[float]] = {name: [] for name in layers}
                with torch.inference_mode():
                    for _ in range(rounds + 1):
                        for name, layer in layers.items():
                            start = time.process_time()
                            for _ in range(repeats):
                                layer(x)
                            seconds[name].append((time.process_time() - start) / repeats)
                medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
                ratio = {name: medians[name] / medians["dense"] for name in FORMS}
                found.append(
                    {"out": out, "in": into, "share": share, "tokens": count, "ranks": ranks}
                    | {"dense_seconds": medians["dense"], "of_dense": ratio}
                )
    return found


def check(found: dict[str, Any], loosely: bool) -> None:
    """What holds for every model; and, unless loosely, that the pivoted form loses less."""
    loss = {(r["strategy"], r["form"], r["keep"]): r["loss"] for r in found["loss"]["rows"]}
    for row in found["loss"]["rows"]:
        assert row["parameters"] <= row["budget"] and math.isfinite(row["loss"]), row
    for strategy, form, keep in loss:
        if form == "pivoted" and not loosely:
            better = loss[strategy, "pivoted", keep] < loss[strategy, "pairs", keep]
            assert better, f"{strategy} at {keep}: pairs lose less"


def table(found: dict[str, Any]) -> str:
    """Markdown: losses, then ratios of time."""
    lines: list[str] = []
    if "loss" in found:
        part = found["loss"]
        keeps = sorted({row["keep"] for row in part["rows"]}, reverse=True)
        lines += [f"Dense: {part['dense']:.3f} nats per token. With keep:", ""]
        lines += ["| ranks | form | " + " | ".join(f"{k:g}" for k in keeps) + " |"]
        lines += ["|---|---|" + "---|" * len(keeps)]
        for strategy in STRATEGIES:
            for form in FORMS:
                of = {
                    row["keep"]: row["loss"]
                    for row in part["rows"]
                    if (row["strategy"], row["form"]) == (strategy, form)
                }
                cells = " | ".join(f"{of[keep]:.3f}" for keep in keeps)
                lines.append(f"| {strategy} | {form} | {cells} |")
    if "latency" in found:
        tokens = sorted({row["tokens"] for row in found["latency"]})
        lines += ["", "Time of one layer as a share of the dense one's, pairs / pivoted:", ""]
        head = " | ".join(f"{count} tokens" for count in tokens)
        lines += [
            f"| out x in | parameters | ranks | {head} |",
            "|---|---|---|" + "---|" * len(tokens),
        ]
        rows = {(r["out"], r["in"], r["share"], r["tokens"]): r for r in found["latency"]}
        for out, into, share in dict.fromkeys(key[:3] for key in rows):
            of = [rows[out, into, share, count] for count in tokens]
            cells = " | ".join(
                f"{r['of_dense']['pairs']:.2f} / {r['of_dense']['pivoted']:.2f}" for r in of
            )
            ranks = "{pairs} / {pivoted}".format(**of[0]["ranks"])
            lines.append(f"| {out} x {into} | {share:.0%} | {ranks} | {cells} |")
    return "\n".join(lines) + "\n"


def full(only: str | None, folder: Path, calibration: Path | None, held_out: Path | None) -> None:
    """SmolLM2 on WikiText-2: 32 windows of 256 tokens to calibrate, 16 to measure."""
    file = HERE / "results.json"
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    how, earlier = provenance(HERE, folder=folder), dict(found) if only else None
    if only in (None, "loss"):
        given = wikitext.protocol(folder, calibration, held_out)
        found["loss"] = losses(given.model, given.calibration, given.held_out, KEEPS)
        found["texts"] = given.texts
        check(found, loosely=False)
    if only in (None, "latency"):
        found["latency"] = latencies(SHAPES, TOKENS, 15)
    publish(HERE, how, found, table(found), earlier)
    print(table(found))


def quick() -> None:
    """The same lines on a tiny random model."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tests import tiny

    model = tiny.llama()
    batches = tiny.batches(model, count=4)
    found: dict[str, Any] = {"loss": losses(model, batches[:3], batches[3:], (0.7,))}
    check(found, loosely=True)
    found["latency"] = latencies(((24, 16), (16, 24)), (1, 8), 2)
    print(len(table(found).splitlines()), "lines")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["loss", "latency"])
    wikitext.run(
        parser,
        quick,
        lambda given, folder: full(given.only, folder, given.calibration, given.held_out),
    )


if __name__ == "__main__":
    main()
