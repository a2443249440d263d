"""What the library says of its parameters is said of options; what cannot be is said early."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from rankopt.cli.command import in_options
from rankopt.errors import ModelError
from rankopt.model.loading import load_model, require_model
from tests.cli.test_cli import Run, files, profile_file, run

__all__ = ["files", "profile_file", "run"]
OPTIONS = {
    "as_json": "--json",
    "batch_size": "--batch-size",
    "data": "--data",
    "draws": "--draws",
    "examples": "--examples",
    "keep": "--keep",
    "keep_total": "--keep-total",
    "max_length": "--max-length",
    "max_params": "--max-params",
    "min_retained": "--min-retained",
    "output": "--output",
    "untie": "--untie",
}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("keep_total is odd", "--keep-total is odd"),
        ("give max_params.", "give --max-params."),
        ("keep=0.5 allows 7 (keep 0.6)", "--keep 0.5 allows 7 (--keep 0.6)"),
        ("keep is a share, got 2", "--keep is a share, got 2"),
        ("draws must be at least 1", "--draws must be at least 1"),
        ("untie: none of a", "--untie: none of a"),
        ("a budget: keep, keep_total or max_params",
         "a budget: --keep, --keep-total or --max-params"),
        ("one budget, not keep and max_params", "one budget, not --keep and --max-params"),
        ("max_length must be 2, batch_size and examples 1",
         "--max-length must be 2, --batch-size and --examples 1"),
        ("(min_retained=0.5)", "(--min-retained 0.5)"),
        # The user's own, and plain words.
        ("no column 'max_length' in data", "no column 'max_length' in data"),
        ("/a/keep_total/b does not exist", "/a/keep_total/b does not exist"),
        ("no file at keep_total.json", "no file at keep_total.json"),
        ("./max_params is a folder", "./max_params is a folder"),
        ("what they measured is keep", "what they measured is keep"),
        ("examples of data and output", "examples of data and output"),
        ("my_keep_total_b", "my_keep_total_b"),
        ("pip install 'rankopt[search]'", "pip install 'rankopt[search]'"),
    ],
)  # fmt: skip
def test_keywords_become_options_where_they_are_keywords(said: str, wanted: str) -> None:
    assert in_options(said, OPTIONS) == wanted
    assert in_options(said, {}) == said
    assert in_options(wanted, OPTIONS) == wanted, "twice is once"


SEARCH = "--solver search --model {m} --data {t} --examples 2 --max-length 16 --trials 7"
SAID = {
    "no budget": ("plan {p}", "is needed: --keep, --keep-total, --max-params, --max-bytes"),
    "two budgets": ("plan {p} --keep .5 --max-params 9", "not --keep and --max-params"),
    "share of two": ("plan {p} --keep 2", "error: --keep is a share above 0"),
    "too small": ("plan {p} --keep-total .001", "error: --keep-total 0.001 allows"),
    "rank multiple": ("plan {p} --keep .5 --rank-multiple 0", "--rank-multiple"),
    "maxmin": (f"plan {{p}} --keep .6 {SEARCH} --objective maxmin", "total or layerwise, not max"),
    "window": ("evaluate {m} --data {t} --batch-size 0", "--batch-size"),
    "passes": (
        "profile {m} --data {t} -o {new} --until-stable --layers-at-a-time 3",
        "it does not go with --layers-at-a-time",
    ),
    "swapped": ("profile {t} --data {m} -o {new}", "that is a file; give a model folder or a hub"),
    "swapped in evaluate": ("evaluate {t} --data {m}", "train.txt': that is a file"),
    "swapped in compare": ("compare {p} --keep .5 --model {t} --data {m}", "that is a file"),
    "plan as model": ("apply {t} {p} --profile {p} -o {new}", "that is a file"),
    "mistyped folder": ("evaluate ./modell --data {t}", "this folder does not exist"),
    "mistyped name": ("evaluate modell --data {t}", "no folder of this name is here"),
    "own solver": (
        "plan {p} --keep .5 --solver rankopt_solvers.exact:solve_exact --time-limit 0",
        "--time-limit must",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_messages_speak_of_options(
    run: Run, files: Path, profile_file: Path, tmp_path: Path, case: str
) -> None:
    command, wanted = SAID[case]
    named = {"m": files / "model", "t": files / "train.txt", "p": profile_file}
    code, out, err = run(*command.format(new=tmp_path / "new", **named).split())
    assert code in (2, 3) and out == ""
    (line,) = err.splitlines()
    assert wanted in line
    assert not any(name in line for name in OPTIONS if "_" in name)


@pytest.mark.parametrize(
    ("arguments", "before"),
    [
        ("plan '' --keep 0.5", "rankopt plan"),
        ("profile {m} --data ''", "rankopt profile {m} --data"),
        ("profile {m} --data {t} -o ''", "rankopt profile {m} --data {t} -o"),
        ("compare {p} --keep 0.5 --strategy exact ''", "--keep 0.5 --strategy exact"),
    ],
)
def test_an_empty_value_is_no_path(
    run: Run, files: Path, profile_file: Path, arguments: str, before: str
) -> None:
    named = {"m": files / "model", "t": files / "train.txt", "p": profile_file}
    code, out, err = run(*shlex.split(arguments.format(**named)))
    assert (code, out) == (2, "")
    assert err.endswith(f"{before.format(**named)}' comes an empty value: is a variable not set?\n")


@pytest.mark.parametrize(("output", "said"), [(".", ". is a folder"), ("/", "cannot write /")])
def test_a_profile_is_no_folder(run: Run, files: Path, output: str, said: str) -> None:
    before = sorted(files.iterdir())
    code, out, err = run("profile", files / "model", "--data", files / "train.txt", "-o", output)
    assert (code, out) == (2, "") and err.startswith(f"error: {said}") and err.count("\n") == 1
    assert sorted(files.iterdir()) == before


def test_another_budget_in_the_same_journal_is_said_to_be_one(
    run: Run, files: Path, profile_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    named = {"m": files / "model", "t": files / "train.txt"}
    search = (*SEARCH.format(**named).split(), "-o", tmp_path / "s.json")
    assert run("plan", profile_file, "--keep", 0.6, *search)[0] == 0
    code, _, err = run("plan", profile_file, "--keep", 0.7, *search, "--force")
    assert code == 2
    assert err == (
        f"error: {tmp_path}/s.json.journal holds a search with another budget (--keep 0.6, now "
        "--keep 0.7): another --storage or -o starts a new one\n"
    )


def test_a_config_without_architectures_is_told_what_to_add(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(files / "model", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("architectures")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=r'no "architectures" entry.*\["LlamaForCausalLM"\]'):
        load_model(str(folder))
    (folder / "config.json").write_text('{"model_type": "vit_mae"}', encoding="utf-8")
    with pytest.raises(ModelError, match=r'"architectures": \["..."\]'):
        load_model(str(folder))


def test_hub_names_are_left_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "owner/name", "owner/name-1.5b"):
        require_model(name)
    for name in ("./gpt2", "../gpt2", "gpt2/", "a/b/c", "/gpt2", str(tmp_path / "none")):
        with pytest.raises(ModelError, match="this folder does not exist"):
            require_model(name)
