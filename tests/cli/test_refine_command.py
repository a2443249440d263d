"""``rankopt refine``: from a smaller model to a better one, labelled; and its mistakes."""

import json
import os
from pathlib import Path

import pytest

from rankopt import Plan, Profile, make_plan
from rankopt.model.loading import load_model
from rankopt.refinement.fit import Fit
from tests import tiny
from tests.cli.test_cli import Run, done
from tests.cli.test_cli import files as files
from tests.cli.test_cli import run as run


@pytest.fixture
def smaller(files: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compressed model, which has much to learn, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    how = ("--backend", "fwsvd", "--form", "pairs", "--max-length", 16, "-o", "p.st")
    done(run("profile", files / "model", "--data", files / "train.txt", *how))
    make_plan(Profile.load("p.st"), keep=0.6).save("plan.json")
    done(run("apply", files / "model", "plan.json", "--profile", "p.st", "-o", "smaller"))
    Path("p.st").unlink()
    return tmp_path


def arguments(files: Path, *more: object) -> list[object]:
    data = ("--data", files / "train.txt", "--max-length", 16, "--batch-size", 2)
    return ["refine", "smaller", "--dense", files / "model", *data, "-o", "refined",
            "--learning-rate", 3e-3, "--passes", 3, *more]  # fmt: skip


@pytest.mark.parametrize("method", ["distill", "blocks"])
def test_a_smaller_model_becomes_better_and_says_so(
    run: Run, files: Path, smaller: Path, method: str
) -> None:
    found = json.loads(done(run(*arguments(files, "--method", method, "--json"))))
    assert found["after"] < found["before"] and found["method"] == method
    # 300 words are 18 windows, 9 batches; the eighth batch is held out.
    assert (found["targets"], found["held_out"]) == (16 * 15, 2 * 15)
    assert sorted(os.listdir()) == ["plan.json", "refined", "smaller"]
    assert Plan.load("refined/rankopt_plan.json") == Plan.load("plan.json")
    card = Path("refined/README.md").read_text(encoding="utf-8")
    assert f"**refined on 240 tokens ({method})**" in card and "```bash\nrankopt refine " in card
    for when in ("before", "after"):
        measured = f"`loss against the dense model on 30 held-out tokens, {when}`"
        assert f"- {measured}: {found[when]:.6g}\n" in card
    data = ("--data", files / "train.txt", "--max-length", 16)
    code, out, err = run("evaluate", "refined", *data)
    assert code == 0 and f"refined: refined on 240 tokens ({method})\n" in err and out
    code, out, err = run("evaluate", "smaller", *data, "--json")
    assert code == 0 and "refined on" not in err and "refined" not in json.loads(out)
    again = json.loads(done(run("evaluate", "refined", *data, "--json")))
    (label,) = again["refined"]
    assert label["targets"] == 240 and label["method"] == method


def test_it_ends_with_losses_and_targets(run: Run, files: Path, smaller: Path) -> None:
    code, out, err = run(*arguments(files))
    assert code == 0, err
    first, second = out.splitlines()
    assert first.startswith("held-out loss against the dense model ") and " -> " in first
    assert second == "refined on 240 tokens (distill, 24 steps)"
    assert err == "model written to refined, refined on 240 tokens (distill)\n"


def test_the_same_command_goes_on(
    run: Run, files: Path, smaller: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(files, "--checkpoint-every", 2)
    done(run(*command, "--force"))
    wanted = load_model("refined").state_dict()
    take, calls = Fit._take, []

    def fails(self: Fit, number: int) -> None:
        calls.append(number)
        take(self, number)
        if len(calls) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_take", fails)
        assert run(*command, "--force")[0] == 130
    assert (smaller / "refined.partial").is_file()
    code, _, err = run(*command, "--seed", 5, "--force")
    assert (code, err.count("\n")) == (2, 1) and "another seed" in err
    code, _, err = run(*command, "--force")
    assert code == 0 and "going on after 6 steps" in err
    found = load_model("refined").state_dict()
    assert all(found[name].equal(value) for name, value in wanted.items())
    assert not (smaller / "refined.partial").exists()


def test_mistakes_are_one_line(run: Run, files: Path, smaller: Path) -> None:
    tiny.llama(vocab_size=70).save_pretrained(smaller / "other")
    (smaller / "letter.partial").write_text("Dear diary")
    command = arguments(files)
    for more, named in (
        (("--dense", "other"), "embed_tokens.weight is 70 x 24, not 64 x 24"),
        (("--dense", "nowhere/at/all"), "nowhere/at/all"),
        (("--method", "magic"), "unknown method 'magic'; known: distill, blocks"),
        (("--passes", 0), "--passes must be at least 1"),
        (("--examples", 2), "one batch was given"),
        (("-o", "smaller"), "smaller is read"),
        (("-o", "letter"), "letter.partial exists and is no such file of rankopt"),
        (("-o", "no/where"), "the folder no does not exist"),
    ):
        code, out, err = run(*command, *more)
        assert (code, out) == (2, ""), named
        assert err.startswith("error: ") and err.count("\n") == 1 and named in err
    code, _, err = run("refine", files / "model", *command[2:])
    assert code == 2 and "nothing to refine: apply a plan first" in err
    assert not (smaller / "refined").exists()
