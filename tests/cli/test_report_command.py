"""``rankopt report``: files in any order, a page, pictures, and every mistake."""

import json
from pathlib import Path

import pytest

from rankopt import make_plan
from tests.cli.test_cli import Run, done, everything, run
from tests.report import made

__all__ = ["run"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile, plans and results of it, and what belongs to something else."""
    profile = made.transformer(layers=8)
    profile.save(tmp_path / "p.st")
    for name, plan in made.plans(profile).items():
        plan.save(tmp_path / f"{name}.json")
    made.results(profile).save(tmp_path / "results.json")
    other = made.transformer(layers=12)
    make_plan(other, keep=0.7).save(tmp_path / "other.json")
    made.results(other).save(tmp_path / "others.json")
    (tmp_path / "notes.txt").write_text("a week of notes")
    (tmp_path / "page.html").write_text("<!doctype html>\n<html><body>a page of mine")
    (tmp_path / "sub").mkdir()
    made.plans(profile)["even"].save(tmp_path / "sub" / "best.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(path: Path) -> dict[str, object]:
    text = path.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    found: dict[str, object] = json.loads(text)
    return found


def test_plans_and_results_are_told_by_what_they_are(run: Run, folder: Path) -> None:
    against = "uniform"
    arguments = ("report", "p.st", "even.json", "results.json", "best.json", "-o", "r.html")
    assert done(run(*arguments, "--against", against, "--layer", "lm_head")) == ""
    found = content(folder / "r.html")
    plans = [plan["name"] for plan in found["plans"] if plan["given"]]  # type: ignore[attr-defined]
    assert plans == ["even", "best"]
    assert found["first"] == 7
    assert against in json.dumps(found["measured"])
    assert "r.html exists" in run(*arguments)[2]
    done(run("report", "p.st", "-o", "r.html", "--force"))
    assert content(folder / "r.html")["plans"] == []


def test_plans_of_one_name_are_told_apart(run: Run, folder: Path) -> None:
    done(run("report", "p.st", "best.json", "sub/best.json", "-o", "r.html"))
    plans = content(folder / "r.html")["plans"]
    assert [plan["name"] for plan in plans] == ["best.json", "sub/best.json"]  # type: ignore[attr-defined]


def test_pictures_without_a_page(run: Run, folder: Path) -> None:
    code, out, err = run("report", "p.st", "best.json", "--png", "figures")
    assert (code, out) == (0, "") and "ranks_1.png" in err
    assert {each.name for each in (folder / "figures").iterdir()} == {
        "frontier.png", "layer.png", "ranks_1.png", "rankopt_files.json"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("", "-o, a folder with --png, or both"),
        ("nosuch.json -o r.html", "no file at nosuch.json"),
        ("notes.txt -o r.html", "notes.txt is of no format of rankopt"),
        ("p.st -o r.html", "p.st is a rankopt-profile"),
        ("results.json results.json -o r.html", "a second file of results"),
        ("best.json best.json -o r.html", "is given twice"),
        ("other.json -o r.html", "other was made from another profile"),
        ("others.json -o r.html", "results are of another model"),
        ("best.json -o page.html --force", "no such file of rankopt"),
        ("best.json -o best.json --force", "best.json is read, too"),
        ("best.json -o p.st --force", "p.st is read, too"),
        ("best.json -o page.html", "--force"),
        ("best.json -o none/r.html", "does not exist"),
        ("best.json -o r.PDF", "the page is HTML, name it r.html; pictures"),
        ("best.json --png sub --force", "was not written by rankopt"),
        ("best.json --png . --force", "one of them is or lies in the other"),
        ("best.json -o r.html --layer magic", "no layer 'magic' is planned"),
        ("best.json -o r.html --against exact", "--against exact compares measured losses"),
        ("results.json -o r.html --against magic", "no strategy 'magic'"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    run: Run, folder: Path, arguments: str, wanted: str
) -> None:
    before = everything(folder)
    code, out, err = run("report", "p.st", *arguments.split())
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and wanted in line
    assert everything(folder) == before


def test_a_plan_in_the_place_of_the_profile_is_told(folder: Path, run: Run) -> None:
    code, out, err = run("report", folder / "best.json", folder / "p.st", "-o", folder / "r.html")
    assert (code, out) == (2, "") and "best.json is a rankopt-plan: name the profile first" in err
