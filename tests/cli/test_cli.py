"""The command line, from a model and a text to a smaller model and its loss; and every mistake."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankopt import Plan, Profile, cli, make_plan
from tests import tiny
from tests.synthetic import synthetic_profile

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]
COMMANDS = (
    *("profile", "plan", "compare", "apply", "refine", "evaluate", "report", "demo"),
    *("export", "import", "doctor", "schema"),
)


def exit_code(patch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Of ``rankopt ARGUMENTS`` in this process."""
    patch.setattr(sys, "argv", ["rankopt", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """``rankopt ARGUMENTS`` in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = exit_code(monkeypatch, *arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return call


def done(result: tuple[int, str, str]) -> str:
    """What a command that succeeded printed."""
    code, out, err = result
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, texts, and what the commands before have made of them."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.saved(tiny.llama(max_position_embeddings=128), folder / "model")
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(tiny.WORDS), (2, 300), generator=generator).tolist()
    for name, numbers in zip(("train.txt", "heldout.txt"), picked, strict=True):
        (folder / name).write_text(tiny.text(numbers), encoding="utf-8")
    tiny.saved(tiny.bert(), folder / "bert")
    pairs = zip(tiny.WORDS, tiny.WORDS[::-1], strict=True)
    rows = [f"{a} {b}\t{n % 2}" for n, (a, b) in enumerate(pairs)]
    (folder / "labelled.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def profile_file(files: Path) -> Path:
    """A profile of the model, made by the command line."""
    path = files / "made.safetensors"
    data = ("--data", files / "train.txt", "--max-length", 16)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        assert exit_code(patch, "profile", files / "model", *data, "-o", path) == 0
    return path


def test_whole_job_from_model_to_reloaded_loss(
    run: Run, files: Path, tmp_path: Path, profile_file: Path
) -> None:
    model, heldout, plan = files / "model", files / "heldout.txt", tmp_path / "plan.json"
    printed = done(run("plan", profile_file, "--keep", 0.7, "-o", plan))
    made = make_plan(Profile.load(profile_file), keep=0.7)
    assert Plan.load(plan) == made
    assert printed == f"{made}\n"

    smaller = tmp_path / "smaller"
    arguments = ("apply", model, plan, "--profile", profile_file, "-o", smaller)
    assert str(made) in done(run(*arguments))
    assert Plan.load(smaller / "rankopt_plan.json") == made
    card = (smaller / "README.md").read_text(encoding="utf-8")
    assert f"budget {made.budget.parameters:,}\n" in card and "**closed form**" in card
    typed = shlex.join(["rankopt", *map(str, arguments)])
    assert f"```bash\n{typed}\n```\n" in card

    data = ("--data", heldout, "--max-length", 16, "--json")
    dense, low = (json.loads(done(run("evaluate", m, *data))) for m in (model, smaller))
    assert dense["model_parameters"] == made.size.model_dense
    assert low["model_parameters"] == made.size.model
    assert low["planned_parameters"] == made.size.planned
    assert low["targets"] == dense["targets"] == 300 // 16 * 15

    compared = json.loads(
        done(run("compare", profile_file, "--keep", 0.7, "--model", model, *data[:-1],
                 "--strategy", "uniform", "exact", "--json"))
    )  # fmt: skip
    assert compared["dense"]["loss"] == pytest.approx(dense["loss"], rel=1e-6)
    losses = {row["strategy"]: row["loss"] for row in compared["rows"]}
    assert losses["exact"] == pytest.approx(low["loss"], rel=1e-5)
    assert losses["uniform"] != losses["exact"]

    table = done(run("evaluate", smaller, *data[:-1]))
    assert f"{low['loss']:.6f}" in table and f"{made.size.model:,}" in table
    beside = json.loads(done(run("evaluate", smaller, *data, "--dense", model)))
    assert beside["loss"] == low["loss"] and beside["metrics"]["divergence"] > 0
    assert beside["divergence of python-help"] > 0
    same = json.loads(done(run("evaluate", model, *data, "--dense", model)))
    assert same["metrics"]["divergence"] == pytest.approx(0, abs=1e-12)


def test_profile_prints_what_it_measured_and_json_agrees(run: Run, files: Path) -> None:
    path = files / "again.safetensors"
    arguments = ("profile", files / "model", "--data", files / "train.txt", "--max-length", 16)
    more = ("--examples", 6, "--backend", "fwsvd", "--backend", "svd", "--no-bases", "-o", path)
    info = json.loads(done(run(*arguments, *more, "--json")))
    read = Profile.load(path)
    assert info == json.loads(read.info.model_dump_json())
    assert read.backends == ("fwsvd", "svd")
    assert (info["examples"], info["targets"]) == (6, 6 * 15)
    assert not read.kept("svd", read.info.layers[0].name)
    printed = done(run(*arguments, *more, "--force"))
    assert f"{read.info.planned_parameters:,} of {read.info.model_parameters:,}" in printed
    assert Profile.load(path).digest() == read.digest()
    assert "scales: kronecker (nats per example (Kronecker-factored estimate)), nats" in printed
    own = json.loads(done(run(*arguments, *more, "--force", "--no-moments", "--json")))
    assert [scale["name"] for scale in own["backends"][1]["scales"]] == ["frobenius"]


def test_plan_without_output_is_printed_as_the_file_would_be(run: Run, profile_file: Path) -> None:
    printed = done(run("plan", profile_file, "--keep-total", 0.8, "--solver", "knapsack", "--json",
                       "--rank-multiple", 2, "--time-limit", 5))  # fmt: skip
    made = make_plan(Profile.load(profile_file), keep_total=0.8, solver="knapsack", rank_multiple=2)
    assert Plan.from_json(printed) == made
    share = done(run("plan", profile_file, "--solver", "threshold", "--share", 0.9, "--json"))
    assert Plan.from_json(share).retained_worst >= 0.9


@pytest.mark.parametrize(
    "order",
    [
        ("PROFILE", "--keep", "0.9", "0.6", "--strategy", "uniform", "greedy/maxmin"),
        ("--strategy", "uniform", "greedy/maxmin", "--keep", "0.9", "0.6", "PROFILE"),
        ("--keep", "0.9", "--keep", "0.6", "PROFILE", "--strategy", "uniform", "greedy/maxmin"),
        ("--strategy", "uniform", "--strategy", "greedy/maxmin", "PROFILE", "--keep", "0.9", "0.6"),
        ("--strategy", "uniform", "greedy/maxmin", "PROFILE", "--keep", "0.9", "0.6"),
    ],
)
def test_several_values_after_one_option_in_any_order(
    run: Run, tmp_path: Path, order: tuple[str, ...]
) -> None:
    profile = synthetic_profile()
    profile.save(tmp_path / "p.safetensors")
    arguments = [str(tmp_path / "p.safetensors") if x == "PROFILE" else x for x in order]
    rows = json.loads(done(run("compare", *arguments, "--json")))["rows"]
    found = [(row["keep"], row["solver"], row["objective"]) for row in rows]
    strategies = [("uniform", "total"), ("greedy", "maxmin")]
    assert found == [(keep, *which) for keep in (0.9, 0.6) for which in strategies]
    for row in rows:
        objective: Any = row["objective"]
        plan = make_plan(profile, keep=row["keep"], solver=row["solver"], objective=objective)
        assert row["parameters"] == plan.size.planned
        assert row["retained_total"] == plan.retained_total
        assert row["kept"] == plan.size.planned / plan.size.planned_dense
    table = done(run("compare", *arguments))
    for row in rows:
        (line,) = [
            x for x in table.splitlines() if row["strategy"] in x and f"{row['parameters']:,}" in x
        ]
        assert f"{row['retained_total']:.2%}" in line and f"{row['keep']:g}" in line


def test_classifier_on_labelled_rows(run: Run, files: Path, tmp_path: Path) -> None:
    model, data = files / "bert", ("--data", files / "labelled.tsv")
    done(run("profile", model, *data, "-o", tmp_path / "p"))
    done(run("plan", tmp_path / "p", "--keep", 0.6, "-o", tmp_path / "plan.json"))
    done(run("apply", model, tmp_path / "plan.json", "--profile", tmp_path / "p",
             "-o", tmp_path / "small"))  # fmt: skip
    found = json.loads(done(run("evaluate", tmp_path / "small", *data, "--json")))
    assert (found["task"], found["examples"]) == ("sequence-classification", len(tiny.WORDS))
    assert set(found["metrics"]) == {"accuracy", "f1", "matthews"}
    plan = Plan.load(tmp_path / "plan.json")
    assert found["model_parameters"] == plan.size.model < plan.size.model_dense


def test_a_window_is_never_longer_than_the_model(run: Run, files: Path) -> None:
    ended = run("evaluate", files / "model", "--data", files / "heldout.txt", "--json")
    assert json.loads(done(ended))["targets"] == 300 // 128 * 127


def test_demo_with_another_model_reuses_its_profile(run: Run, files: Path, tmp_path: Path) -> None:
    arguments = ("demo", "--model", files / "model", "--output", tmp_path / "demo", "--calibration",
                 4, "--held-out", 2, "--max-length", 16, "--keep", 0.9, 0.7)  # fmt: skip
    printed = done(run(*arguments))
    made = tmp_path / "demo"
    results = json.loads((made / "results.json").read_text(encoding="utf-8"))
    assert {row["keep"] for row in results["rows"]} == {0.9, 0.7}
    assert f"{results['reloaded']['loss']:.4f}" in printed
    # The demo refines and saves the last row, which is of the default.
    best = results["rows"][-1]
    assert (best["solver"], best["keep"], best["backend"], best["form"]) == (
        "exact", 0.7, "kronecker", "pivoted"
    )  # fmt: skip
    assert best["model_parameters"] == results["reloaded"]["model_parameters"]
    assert results["refined"]["after"] <= results["refined"]["before"]
    assert f"closed form     loss {best['loss']:.4f}" in printed
    assert results["reloaded"]["loss"] == pytest.approx(best["loss"], rel=0.05)
    assert Plan.load(made / "plan.json").size.model == results["reloaded"]["model_parameters"]
    before = (made / "profile.safetensors").stat().st_mtime_ns
    again = json.loads(done(run(*arguments, "--json")))
    assert (made / "profile.safetensors").stat().st_mtime_ns == before
    assert again["reloaded"] == results["reloaded"]


def everything(folder: Path) -> dict[str, int]:
    """Every file below the folder, with the time it was last written."""
    return {str(x.relative_to(folder)): x.stat().st_mtime_ns for x in folder.rglob("*")}


MISTAKES: dict[str, tuple[str, str, int]] = {
    "unknown solver": ("plan {p} --keep 0.5 --solver magic -o {new}", "known: uniform,", 2),
    "unknown strategy": ("compare {p} --keep 0.5 --strategy magic", "known: uniform,", 2),
    "unknown objective": ("compare {p} --keep 0.5 --strategy greedy/x", "known: total,", 2),
    "no budget": ("plan {p} -o {new}", "a budget is needed", 2),
    "two budgets": ("plan {p} --keep 0.5 --max-params 9 -o {new}", "give one budget", 2),
    "infeasible budget": ("plan {p} --keep 0.001 -o {new}", "smallest reachable", 3),
    "infeasible comparison": ("compare {p} --keep 0.001", "smallest reachable", 3),
    "infeasible share": ("plan {p} --keep .1 --solver threshold --share 1 -o {new}", "takes", 3),
    "time limit for greedy": (
        "plan {p} --keep 0.5 --solver greedy --time-limit 3 -o {new}",
        "--time-limit",
        2,
    ),
    "search without a model": ("plan {p} --keep 0.5 --solver search -o {new}", "--model and", 2),
    "model without a search": ("plan {p} --keep 0.5 --model {f}/model -o {new}", "search", 2),
    "floor of nothing": ("plan {p} --keep 0.5 --min-retained much -o {new}", "or best", 2),
    "floor above one": ("plan {p} --keep 0.5 --min-retained 2 -o {new}", "between 0 and 1", 2),
    "floor for uniform": (
        "plan {p} --keep 0.5 --solver uniform --min-retained .5 -o {new}",
        "for solvers",
        2,
    ),
    "pin of nothing": ("plan {p} --keep 0.5 --pin *nowhere*=2 -o {new}", "names no planned", 2),
    "pin without a rank": ("plan {p} --keep 0.5 --pin *q_proj -o {new}", "GLOB=RANK", 2),
    "pin too large": ("plan {p} --keep 0.5 --pin *=9999 -o {new}", "pin '*': layer", 2),
    "pins over the budget": ("plan {p} --keep .5 --pin *=dense", "pinned layers is", 3),
    "floor too high": ("plan {p} --keep 0.3 --min-retained .999 -o {new}", "smallest reachable", 3),
    "own solver missing": ("plan {p} --keep 0.5 --solver no.such:thing -o {new}", "cannot load", 2),
    "time limit of nothing": ("plan {p} --keep .5 --solver knapsack --time-limit 0", "positive", 2),
    "missing profile": ("plan {f}/none --keep 0.5 -o {new}", "make one with `rankopt profile`", 2),
    "truncated profile": ("plan {f}/truncated --keep 0.5 -o {new}", "truncated", 2),
    "text as profile": ("compare {f}/train.txt --keep 0.5", "not a profile", 2),
    "plan exists": ("plan {p} --keep 0.5 -o {p}", "--force", 2),
    "plan is a folder": ("plan {p} --keep 0.5 --force -o {f}/model", "is a folder", 2),
    "plan into no folder": ("plan {p} --keep 0.5 -o {f}/none/plan", "does not exist", 2),
    "profile exists": ("profile {m} --data {t} -o {p}", "--force", 2),
    "missing data": ("profile {m} --data {f}/none.txt -o {new}", "no data file", 2),
    "missing column": ("profile {f}/bert --data {f}/wrong.tsv -o {new}", "it has: a, b", 2),
    "missing label": ("profile {f}/bert --data {f}/nolabel.tsv -o {new}", "it has: text, b", 2),
    "label out of range": ("profile {f}/bert --data {f}/seven.tsv -o {new}", "7", 2),
    "unknown backend": ("profile {m} --data {t} --backend magic -o {new}", "known", 2),
    "too little text": ("evaluate {m} --data {f}/short.txt", "less than one window", 2),
    "no model": ("profile {f}/nomodel --data {t} -o {new}", "no config.json", 2),
    "no such model": ("evaluate {f}/nosuch --data {t}", "cannot load the model", 2),
    "too long": ("evaluate {m} --data {t} --max-length 129", "at most 128 tokens", 2),
    "another dense": ("evaluate {m} --data {t} --no-also --dense {f}/bert", "its task is", 2),
    "no dense model": ("evaluate {m} --data {t} --dense {f}/nosuch", "cannot load the model", 2),
    "unknown dtype": ("evaluate {m} --data {t} --dtype int3", "auto, float32", 2),
    "model without data": ("compare {p} --keep 0.5 --model {m}", "both --model and --data", 2),
    "data without model": ("compare {p} --keep 0.5 --data {t}", "both --model and --data", 2),
    "model folder taken": ("apply {m} {plan} --profile {p} -o {f}/bert", "--force", 2),
    "missing plan": ("apply {m} {f}/none --profile {p} -o {new}", "make one with", 2),
    "profile as plan": ("apply {m} {p} --profile {p} -o {new}", "not text", 2),
    "other model": ("apply {f}/bert {plan} --profile {p} -o {new}", "model", 2),
    "other weights": ("apply {f}/other {plan} --profile {p} -o {new}", "other weights", 2),
    "other profile": ("apply {m} {plan} --profile {f}/synthetic -o {new}", "another profile", 2),
}


@pytest.fixture(scope="module")
def spoilt(files: Path, profile_file: Path) -> Path:
    """The folder of files, with all that can be wrong in it."""
    whole = profile_file.read_bytes()
    (files / "truncated").write_bytes(whole[: len(whole) // 2])
    (files / "wrong.tsv").write_text("a\tb\n1\t2\n")
    (files / "nolabel.tsv").write_text("text\tb\n1\t2\n")
    (files / "seven.tsv").write_text("text\tlabel\ncat\t0\ndog\t7\n")
    (files / "short.txt").write_text("the cat")
    (files / "nomodel").mkdir()
    synthetic_profile().save(files / "synthetic")
    make_plan(Profile.load(profile_file), keep=0.7).save(files / "fine.json")
    other = tiny.llama(max_position_embeddings=256)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(files / "other")
    tiny.tokenizer(files / "other")
    return files


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_an_exit_code_and_writes_nothing(
    run: Run, spoilt: Path, profile_file: Path, mistake: str
) -> None:
    command, wanted, code = MISTAKES[mistake]
    filled = command.format(
        f=spoilt,
        p=profile_file,
        m=spoilt / "model",
        t=spoilt / "train.txt",
        plan=spoilt / "fine.json",
        new=spoilt / "new",
    )
    before = everything(spoilt)
    got, out, err = run(*filled.split())
    assert (got, out) == (code, ""), err
    (line,) = err.splitlines()
    assert line.startswith("error: ") and wanted in line
    assert everything(spoilt) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples(run: Run, command: str) -> None:
    printed = done(run(command, "--help"))
    assert "Examples:" in printed and f"rankopt {command}" in printed
    assert command in done(run("--help"))


@pytest.mark.parametrize("arguments", [("plan",), ("plan", "p", "--keep", "much"), ("nosuch",)])
def test_wrong_usage_is_exit_code_two_without_a_traceback(
    run: Run, arguments: tuple[str, ...]
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err and "Traceback" not in err


@pytest.mark.slow
def test_mistake_found_after_loading_a_model_is_one_line_in_a_process_of_its_own(
    spoilt: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rankopt", "evaluate", "model", "--data", "short.txt"],
        cwd=spoilt,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'solvers'}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: short.txt: the text has 2 tokens, less than one window of 128: give more text, or "
        "a smaller --max-length\n"
    )


def test_module_runs_as_a_program_and_planning_needs_no_torch(tmp_path: Path) -> None:
    synthetic_profile().save(tmp_path / "p.safetensors")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    done = subprocess.run(
        [sys.executable, "-m", "rankopt", "compare", "p.safetensors", "--keep", "0.01"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'solvers'}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: --keep 0.01 allows") and done.stderr.count("\n") == 1


def test_search_measures_resumes_and_writes_its_plan(
    run: Run, files: Path, profile_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    plan_file = tmp_path / "plan.json"
    arguments = ("plan", profile_file, "--keep", 0.6, "--solver", "search", "--model",
                 files / "model", "--data", files / "heldout.txt", "--max-length", 16,
                 "--examples", 4, "-o", plan_file)  # fmt: skip
    code, _, err = run(*arguments, "--trials", 9)
    assert code == 0, err
    assert "less than the best of the other plans" in err
    assert Plan.load(plan_file).solver == "search"
    assert (tmp_path / "plan.json.journal").exists()
    code, _, err = run(*arguments, "--force", "--trials", 11)
    assert code == 0, err
    assert "11 trials" in err
