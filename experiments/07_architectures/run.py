"""Architectures: every class of transformers with a head, tiny, all the way from profile to reload.

    python experiments/07_architectures/run.py          all of them; rankopt[all]
    python experiments/07_architectures/run.py --quick  a dozen
    python experiments/07_architectures/run.py --only 'Qwen*' 'Bert*'

Each class is walked in a process that others share, from a seed of its own (tests/sweep says how).
Outcomes are kept in --folder as they come, and the same command goes on after an interruption. One
that does not end within --limit seconds, or takes its process with it, is an outcome too.

Writes results.json and table.md beside this file (not with --quick or --only).
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from published import provenance, publish  # noqa: E402 (beside the folders of the experiments)

ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "solvers")]

#: One for each kind of head and of layer.
QUICK = (
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "MixtralForCausalLM",
    "MambaForCausalLM",
    "BertForMaskedLM",
    "AlbertForSequenceClassification",
    "XLNetForSequenceClassification",
    "DebertaV2ForTokenClassification",
    "ViTForImageClassification",
    "SwinForImageClassification",
    "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
)
#: Classes that one process walks, and the bytes that it may hold.
CLASSES, MEMORY = 60, 6 * 2**30
OUTCOMES = ("ok", "refused", "left out", "FAULT")


def child() -> None:
    """Names of classes come in, outcomes go out, one a line."""
    import resource

    from tests.sweep.heads import heads
    from tests.sweep.walk import walk

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    known, out = heads(), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a model prints is no outcome.
    for line in sys.stdin:
        found = walk(line.strip(), known[line.strip()])
        print(json.dumps(dataclasses.asdict(found)), file=out, flush=True)


class Process:
    """One that walks classes; started when it is needed, ended when it has walked enough."""

    def __init__(self, limit: float) -> None:
        self.limit, self.walked = limit, 0
        self.running: subprocess.Popen[str] | None = None

    def walk(self, architecture: str) -> dict[str, Any]:
        """The outcome, whatever becomes of the process."""
        if self.running is None or self.walked >= CLASSES:
            self.end()
            command = [sys.executable, str(Path(__file__).resolve()), "--child"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self.running = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        assert self.running.stdin and self.running.stdout
        process, self.walked = self.running, self.walked + 1
        overdue = threading.Event()
        timer = threading.Timer(self.limit, lambda: (overdue.set(), process.kill()))
        timer.start()
        try:
            print(architecture, file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        code = process.wait()
        self.end()
        reason = f"no end within {self.limit:g} s" if overdue.is_set() else f"died with code {code}"
        return {"architecture": architecture, "outcome": "FAULT", "reason": reason}

    def end(self) -> None:
        """Let go of the process."""
        if self.running is not None:
            self.running.kill()
            self.running.communicate()
        self.running, self.walked = None, 0


def outcomes(names: Sequence[str], workers: int, limit: float) -> Iterator[dict[str, Any]]:
    """Of all names, as they come."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)

    def work() -> None:
        process = Process(limit)
        try:
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                done.put(process.walk(name))
        finally:
            process.end()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for _ in names:
        yield done.get()
    for thread in threads:
        thread.join()


def experiment(
    known: Mapping[str, str], names: Sequence[str], folder: Path, workers: int, limit: float
) -> dict[str, Any]:
    """What came of every class; those in the folder are not walked again."""
    kept = folder / "outcomes.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    found = {each["architecture"]: each for each in map(json.loads, lines)}
    missing = [name for name in names if name not in found]
    with kept.open("a", encoding="utf-8") as file:
        for number, one in enumerate(outcomes(missing, workers, limit), 1):
            found[one["architecture"]] = one = {"head": known[one["architecture"]], **one}
            print(json.dumps(one), file=file, flush=True)
            print(f"{number}/{len(missing)} {said(one)}", flush=True)
    return {
        "settings": {"seed": 0},
        "outcomes": dict(Counter(found[name]["outcome"] for name in names)),
        "architectures": {name: found[name] for name in names},
    }


def said(one: Mapping[str, Any]) -> str:
    """One outcome in a line."""
    why = f" at {one.get('stage')}: {one['reason']}" if one["reason"] else ""
    advice = f" ({one['remedy']})" if one.get("remedy") else ""
    return f"{one['outcome']} {one['architecture']}{why}{advice}"


def table(found: Mapping[str, Any]) -> str:
    """Counts by head, and whatever is not ok with its reason, as markdown."""
    every = list(found["architectures"].values())
    lines = [f"| transformers' list | {' | '.join(OUTCOMES)} |", f"|---|{'---|' * len(OUTCOMES)}"]
    for head in [*dict.fromkeys(one["head"] for one in every), None]:
        counts = Counter(one["outcome"] for one in every if head in (one["head"], None))
        title = head or "all"
        lines.append(f"| {title} | {' | '.join(str(counts[each]) for each in OUTCOMES)} |")
    walked = [one for one in every if one["outcome"] == "ok"]
    lines += [
        "",
        f"Of {len(walked)} that are ok, {sum(bool(one['remedy']) for one in walked)} after what an "
        f"error of rankopt's advised; {sum(one['layers'] for one in walked)} layers planned, the "
        f"largest error of a layer's rows {max((one['rows'] for one in walked), default=0.0):.1e}.",
    ]
    advised = Counter(one["remedy"].partition(":")[0] for one in walked if one["remedy"])
    lines += [f"- {remedy}: {count}" for remedy, count in advised.most_common()]
    for outcome in OUTCOMES[1:]:
        chosen = [one for one in every if one["outcome"] == outcome]
        if chosen:
            lines += ["", f"**{outcome}**", "", "| class | at | reason |", "|---|---|---|"]
        for one in chosen:
            reason = one["reason"].replace("|", "\\|")
            lines.append(f"| {one['architecture']} | {one.get('stage', '')} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", help="patterns of class names")
    parser.add_argument("--folder", type=Path, help="keep outcomes there, and go on from them")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for one class")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child()
        return
    from tests.sweep.heads import heads

    known = heads()
    patterns = QUICK if given.quick else given.only or ["*"]
    names = [name for name in known if any(fnmatch.fnmatchcase(name, each) for each in patterns)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        how = provenance(HERE, folder=folder)
        found = experiment(known, names, folder, given.workers, given.limit)
    if not (given.quick or given.only):
        publish(HERE, how, found, table(found))
    print(found["outcomes"])
    wrong = [said(one) for one in found["architectures"].values() if one["outcome"] == "FAULT"]
    assert not wrong, wrong
    assert not given.quick or found["outcomes"] == {"ok": len(QUICK)}
    print("ok")


if __name__ == "__main__":
    main()
