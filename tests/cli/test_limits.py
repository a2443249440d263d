"""Budgets of bytes, FLOPs and latency as they are typed."""

import json
from pathlib import Path

import pytest

from rankopt import Plan
from rankopt.cli.options import bytes_of, flops_of, microseconds_of
from rankopt.errors import OptionError
from tests.cli.test_cli import Run, done, run
from tests.synthetic import synthetic_profile

__all__ = ["run"]
TABLE = "kind,form,rank,microseconds\nproj,,dense,12.5\nproj,pairs,1,2\nproj,pairs,12,9.25\n"


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    synthetic_profile().save("p.safetensors")
    Path("t.csv").write_text(TABLE)
    return "p.safetensors"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1500", 1500),
        ("1.5kB", 1500),
        ("1.5 KB", 1500),
        ("200MB", 200_000_000),
        ("1_000MiB", 1_000 * 2**20),
        ("0.1GiB", 107_374_182),
        ("2e3", 2000),
        ("0.29MB", 290_000),
        ("7B", 7),
    ],
)
def test_bytes_are_decimal_or_binary_and_rounded_down(text: str, wanted: int) -> None:
    assert bytes_of(text) == wanted


def test_flops_and_times_have_multiples_of_their_own() -> None:
    assert (flops_of("1.5G"), flops_of("2k"), flops_of(None)) == (1_500_000_000, 2000, None)
    assert (microseconds_of("1.2ms"), microseconds_of("850"), microseconds_of("2s")) == (
        *(1200.0, 850.0),
        2e6,
    )
    assert microseconds_of(None) is None and bytes_of(None) is None


@pytest.mark.parametrize(
    "text", ["", "MB", "1.MB", "-5", "1e999", "nan", "1XB", "1kFLOP", "9" * 50]
)
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--max-bytes takes a number, or one with kB, kiB, MB"):
        bytes_of(text)


def test_a_plan_meets_all_that_is_typed_and_says_so(run: Run, profile: str) -> None:
    pytest.importorskip("cvxpy")
    asked = ("--keep", 0.7, "--max-bytes", "5kB", "--max-flops", "3.2k", "--max-latency", "0.03ms")
    printed = done(run("plan", profile, *asked, "--latency-table", "t.csv", "-o", "plan.json"))
    plan = Plan.load("plan.json")
    assert {limit.kind: limit.allowed for limit in plan.limits} == {
        "max_bytes": 5000,
        "max_flops": 3200,
        "max_latency": 30_000,
    }
    for limit in plan.limits:
        assert limit.text in printed
    assert json.loads(Path("plan.json").read_text())["limits"][2]["asked"] == 30.0


@pytest.mark.parametrize(
    ("arguments", "wanted", "code"),
    [
        ("--max-bytes 3", "--max-bytes allows the planned layers 3 bytes; the smallest", 3),
        ("--max-latency 7us --latency-table t.csv", "is 8.000;", 3),
        ("--max-latency 7us", "--max-latency and --latency-table belong together", 2),
        ("--max-latency 7 --latency-table no.csv", "no latency table at no.csv", 2),
        ("--max-bytes 5kB --solver uniform", "cannot meet --max-bytes: exact does", 2),
        ("--max-bytes 5kB --solver search --model m --data d", "one budget of parameters", 2),
        ("--max-latency 9 --latency-table t.csv -o t.csv --force", "t.csv", 2),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    run: Run, profile: str, arguments: str, wanted: str, code: int
) -> None:
    before = sorted(Path().iterdir())
    output = () if "-o" in arguments else ("-o", "new.json")
    got, out, err = run("plan", profile, *arguments.split(), *output)
    assert (got, out) == (code, ""), err
    (line,) = err.splitlines()
    assert line.startswith("error: ") and wanted in line
    assert sorted(Path().iterdir()) == before and Path("t.csv").read_text() == TABLE
