"""Several --data in one profile, and every measured loss beside one of another domain."""

import json
from pathlib import Path
from typing import Any

import pytest

from rankopt import Profile, evaluate
from rankopt.data import load_batches, python_help
from rankopt.data.domains import HELP_WINDOWS, PYTHON_HELP
from rankopt.evaluation.comparison import measure_comparison
from rankopt.plan.compare import Strategy
from rankopt.plan.compare import compare as compared
from tests import tiny
from tests.cli.test_cli import Run, done, files, profile_file, run

__all__ = ["files", "profile_file", "run"]


@pytest.fixture(autouse=True)
def short_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python with short help."""
    import pydoc_data.topics

    topics = {
        name: f"the cat likes {word} " * 90
        for name, word in zip("cab", tiny.WORDS[5:8], strict=True)
    }
    monkeypatch.setattr(pydoc_data.topics, "topics", topics)


def test_a_profile_of_two_files(run: Run, files: Path, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "a small red dog " * 60}))
    path = tmp_path / "p.st"
    # The model may stand behind any of them.
    given = ("--data", files / "train.txt", "--data", tmp_path / "b.jsonl", "--text-column", "text",
             "--text-column", "body", "--weight", 3, 1, "--examples", 16, "--max-length", 16,
             "-o", path, "--data", files / "heldout.txt", "--weight", 4, "--text-column", "",
             files / "model")  # fmt: skip
    code, out, err = run("profile", *given)
    assert code == 0, err
    sources = Profile.load(path).info.sources or ()
    assert [(Path(x.name).name, x.weight, x.examples) for x in sources] == [
        ("train.txt", 3.0, 6), ("b.jsonl", 1.0, 2), ("heldout.txt", 4.0, 8),
    ]  # fmt: skip
    assert f"  data        6 of {files / 'train.txt'} (weight 3), 2 of " in out
    assert f"data: 6 of {files / 'train.txt'}, 2 of {tmp_path / 'b.jsonl'}, 8 of " in err
    printed = done(run("plan", path, "--keep", 0.7, "--json"))
    assert json.loads(printed)["profile_digest"] == Profile.load(path).digest()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--weight 2", "--weight belongs to several --data"),
        ("--data {h} --weight 1 2 3", "3 weights for 2 sources"),
        ("--data {h} --weight 1 --weight -1", "--weight -1: a weight is a number above 0"),
        ("--data {h} --weight nan 1", "--weight nan: a weight is a number above 0"),
        ("--data {h} --weight 0 1", "--weight 0: a weight is a number above 0"),
        ("--data {t}", "train.txt is given twice: give it once"),
        ("--text-column a b", "Got unexpected extra argument"),
        ("--text-column a --text-column b", "--text-column is given 2 times for 1 sources"),
        ("--data {h} --split train --split ''", "train.txt is a file and has no split 'train'"),
    ],
)
def test_mistakes_of_a_mixture_are_named(
    run: Run, files: Path, tmp_path: Path, more: str, said: str
) -> None:
    names = {"t": files / "train.txt", "h": files / "heldout.txt"}
    given = [part.format(**names).replace("''", "") for part in more.split()]
    arguments = ("--data", files / "train.txt", "-o", tmp_path / "p.st", *given)
    code, _, err = run("profile", files / "model", *arguments)
    assert code == 2 and said in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_evaluate_measures_python_help_beside(run: Run, files: Path) -> None:
    given = ("evaluate", files / "model", "--data", files / "heldout.txt", "--max-length", 16)
    code, out, err = run(*given, "--json")
    assert code == 0 and f"{PYTHON_HELP}: {HELP_WINDOWS} windows of 16 tokens, Python 3." in err
    found = json.loads(out)
    tokenizer = tiny.tokenizer()
    model = tiny.llama(max_position_embeddings=128)
    alone = evaluate(model, python_help(tokenizer, 16))
    assert found["loss of python-help"] == pytest.approx(alone.loss, rel=1e-5)
    assert found["targets of python-help"] == alone.targets == HELP_WINDOWS * 15
    plain = json.loads(done(run(*given, "--json", "--no-also")))
    assert not any("python-help" in name for name in plain)
    assert plain == {name: found[name] for name in plain}
    table = done(run(*given))
    assert f"{alone.loss:.6f}" in table and "loss of python-help" in table
    assert "targets of python-help" in table and "perplexity of" not in table


def test_also_files_take_its_place_and_have_their_own_columns(
    run: Run, files: Path, tmp_path: Path
) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "a small red dog " * 60}))
    given = ("evaluate", "--data", files / "heldout.txt", "--also", tmp_path / "b.jsonl",
             "--text-column", "", "--text-column", "body", "--max-length", 16, files / "model",
             "--json")  # fmt: skip
    found = json.loads(done(run(*given)))
    assert {name for name in found if " of " in name} == {
        "loss of b.jsonl", "perplexity of b.jsonl", "targets of b.jsonl",
    }  # fmt: skip
    assert found["targets of b.jsonl"] == 240 // 16 * 15
    both = json.loads(done(run(*given, "--also", "python-help")))
    assert both["loss of b.jsonl"] == found["loss of b.jsonl"] and "loss of python-help" in both
    for more, said in (
        (("--no-also",), "--no-also does not go with --also"),
        (("--data", files / "train.txt"), "--data is given 2 times"),
    ):
        code, _, err = run(*given, *more)
        assert code == 2 and said in err


def test_compare_shows_both_losses(run: Run, files: Path, profile_file: Path) -> None:
    given = ("compare", profile_file, "--keep", 0.7, "--strategy", "uniform", "exact",
             "--model", files / "model", "--data", files / "heldout.txt", "--max-length", 16,
             "--also", files / "train.txt")  # fmt: skip
    found = json.loads(done(run(*given, "--json")))
    name = "loss of train.txt"
    profile, model = Profile.load(profile_file), tiny.llama(max_position_embeddings=128)
    batches, other = (
        load_batches(str(files / each), tiny.tokenizer(), "causal-lm", max_length=16)
        for each in ("heldout.txt", "train.txt")
    )
    rows = list(compared(profile, [0.7], [Strategy("uniform"), Strategy("exact")]))
    measured = measure_comparison(model, profile, rows, batches, also={"x": other})
    also = measured.dense.also["x"].loss
    assert found["dense"][name] == pytest.approx(also, rel=1e-5)
    assert also == pytest.approx(evaluate(model, other).loss, rel=1e-6)
    swapped = measure_comparison(model, profile, rows, other)
    for row, here, there in zip(found["rows"], measured.plans, swapped.plans, strict=True):
        assert here.measured is not None and there.measured is not None
        assert row["loss"] == pytest.approx(here.measured.loss, rel=1e-5)
        assert row[name] == pytest.approx(there.measured.loss, rel=1e-5)
    table = done(run(*given))
    assert name in table and f"{also:.4f}" in table


def test_classifiers_have_no_other_domain_unless_it_is_given(run: Run, files: Path) -> None:
    given = ("evaluate", files / "bert", "--data", files / "labelled.tsv")
    found = json.loads(done(run(*given, "--json")))
    assert not any(" of " in name for name in found)
    found = json.loads(done(run(*given, "--also", files / "labelled.tsv", "--json")))
    assert found["accuracy of labelled.tsv"] == found["metrics"]["accuracy"]
    code, _, err = run(*given, "--also", "python-help")
    assert code == 2 and "python-help: it has no labels" in err


def test_a_python_without_help_says_so(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pydoc_data.topics

    given: tuple[Any, ...] = ("evaluate", files / "model", "--data", files / "heldout.txt")
    given = (*given, "--max-length", 16, "--json")
    monkeypatch.setattr(pydoc_data.topics, "topics", ["other"])
    code, out, err = run(*given)
    assert code == 0 and "loss of python-help" not in json.loads(out)
    (line,) = [line for line in err.splitlines() if "python-help" in line]
    assert line.startswith("python-help is left out: this Python has its help texts")
    code, _, err = run(*given, "--also", "python-help")
    assert code == 2 and "python-help: this Python has" in err


def test_search_measures_a_mixture(
    run: Run, files: Path, profile_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    given = ("plan", profile_file, "--keep", 0.7, "--solver", "search", "--trials", 8, "--model",
             files / "model", "--data", files / "heldout.txt", "--data", files / "train.txt",
             "--weight", 1, 2, "--examples", 9, "--max-length", 16,
             "-o", tmp_path / "p.json")  # fmt: skip
    code, _, err = run(*given)
    assert code == 0 and f"data: 3 of {files / 'heldout.txt'}, 6 of {files / 'train.txt'}" in err
