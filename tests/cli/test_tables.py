"""Comparisons in terminals of any width: fewer columns, but never a cut figure."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rankopt.cli import tables
from rankopt.cli.tables import comparison, print_comparison
from rankopt.plan.compare import ComparedPlan, Strategy, compare
from rankopt.results import Line, Measured, MeasuredPlan, lines_of, summarise
from tests.cli.terminal import ESCAPES, in_terminal, screen
from tests.results.test_summary import results
from tests.synthetic import synthetic_profile

COLUMNS = [
    "strategy", "backend", "keep", "parameters", "kept", "model", "MiB", "retained",
    "worst layer", "gap", "seconds", "predicted", "loss", "perplexity",
]  # fmt: skip


def measured(**metrics: float) -> Measured:
    return Measured(loss=3.5766, metrics=metrics or {"perplexity": 35.75}, examples=4, targets=60)


def lines(*strategies: str, found: Measured | None = None) -> list[Line]:
    wanted = [Strategy.parse(text) for text in strategies or ("uniform", "exact", "exact@svd")]
    profile = synthetic_profile()
    rows = compare(profile, [0.9, 0.5], wanted)
    return lines_of(profile.info.layers, [MeasuredPlan.of(row, found) for row in rows])


def cells(text: str) -> list[list[str]]:
    text = ESCAPES.sub("", text)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in found if not set("".join(row)) <= set("-:")]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Print a comparison as in a terminal of so many columns: stdout, stderr."""

    def shown(columns: int, *arguments: Any, **options: Any) -> tuple[str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout.isatty", lambda: True)
            print_comparison(*arguments, **options)
        found = capsys.readouterr()
        return found.out, found.err

    return shown


def test_every_width_shows_whole_figures_and_says_what_is_hidden(terminal: Any) -> None:
    arguments = lines(found=measured()), measured()
    whole = cells(terminal(400, *arguments)[0])
    assert whole[0] == COLUMNS
    before = len(COLUMNS) + 1
    for columns in (160, 120, 100, 80, 60, 40, 20):
        out, err = terminal(columns, *arguments)
        found = cells(out)
        kept = [COLUMNS.index(name) for name in found[0]]
        assert found == [[row[k] for k in kept] for row in whole], "whole, and in their order"
        assert "…" not in out and {"strategy", "keep", "loss"} <= set(found[0])
        hidden = [name for name in COLUMNS if name not in found[0]]
        assert err == (f"hidden to fit the terminal: {', '.join(hidden)}; --wide shows all\n"
                       if hidden else "")  # fmt: skip
        assert set(hidden) <= {*tables.EXPENDABLE, "perplexity"}
        if len(found[0]) > 3:
            assert max(map(len, ESCAPES.sub("", out).splitlines())) <= columns
        assert len(found[0]) <= before
        before = len(found[0])
    assert found[0] == ["strategy", "keep", "loss"]


@pytest.mark.slow
def test_the_least_important_columns_go_first(terminal: Any) -> None:
    pytest.importorskip("scipy")
    lines = summarise(results(keeps=(0.5,), predicted=0.5), "exact")
    lines.append(dataclasses.replace(lines[0], plans=of_another_backend(lines[0])))
    order = []
    for columns in range(250, 20, -3):
        _, err = terminal(columns, lines)
        hidden = err.removeprefix("hidden to fit the terminal: ").partition(";")[0].split(", ")
        order += [name for name in hidden if name and name not in order]
    assert order == [*tables.EXPENDABLE, "perplexity"]


def of_another_backend(line: Line) -> tuple[MeasuredPlan, ...]:
    return tuple(row.model_copy(update={"backend": "svd"}) for row in line.plans)


def test_figures_of_several_calibrations_and_paired_tests(terminal: Any) -> None:
    pytest.importorskip("scipy")
    lines = summarise(results(keeps=(0.5,)), "exact")
    header, *found = cells(terminal(400, lines)[0])
    shown = [dict(zip(header, row, strict=True)) for row in found]
    for line, row in zip(lines, shown, strict=True):
        assert row["+-"] == f"{line.half_width:.4f}" and row["loss"] == f"{line.loss:.4f}"
    against = lines[0].against
    assert against is not None
    assert (
        shown[0]["difference"] == f"{against.mean:+.4f} [{against.low:+.4f}, {against.high:+.4f}]"
    )
    assert shown[0]["p"] == f"{against.corrected:.1g}"
    assert (shown[1]["difference"], shown[1]["p"]) == ("", "")


def test_without_a_measured_loss_retained_stays(terminal: Any) -> None:
    out, _ = terminal(20, lines("uniform"))
    assert cells(out)[0] == ["strategy", "keep", "retained"]


def test_wide_and_a_pipe_have_every_column_as_ever(
    terminal: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = lines(found=measured()), measured()
    console = Console(width=200)
    with console.capture() as caught:
        console.print(comparison(*arguments))
    out, err = terminal(40, *arguments, wide=True)
    assert (cells(out), err) == (cells(caught.get()), "")
    print_comparison(*arguments)
    assert capsys.readouterr().out == caught.get()


def test_odd_and_very_long_names_are_printed_as_they_are(terminal: Any) -> None:
    name = "module:heart:" + "x" * 300 + "[/bold]"
    (one,) = compare(synthetic_profile(), [0.5], [Strategy("exact")])
    row = ComparedPlan(Strategy(name), 0.5, one.plan, 0.0)
    found = measured(**{"[red]" + "metric" * 50: 0.5})
    compared = lines_of(synthetic_profile().info.layers, [MeasuredPlan.of(row, found)])
    for columns in (40, 80, 400):
        out, _ = terminal(columns, compared)
        assert cells(out)[1][:2] == [name, "0.5"]


def test_compare_in_a_narrow_terminal_and_through_a_pipe(tmp_path: Path) -> None:
    synthetic_profile().save(tmp_path / "p.st")
    arguments = ("compare", "p.st", "--keep", "0.9", "--strategy", "exact")
    code, written = in_terminal(60, tmp_path, *arguments)
    shown = screen(written)
    assert code == 0 and "…" not in written
    assert max(len(line) for line in shown if line.startswith("|")) <= 60
    assert any("--wide shows all" in line for line in shown)
    code, written = in_terminal(60, tmp_path, *arguments, "--wide")
    assert code == 0 and "hidden" not in written
    assert all(
        name in written
        for name in COLUMNS
        if name not in ("backend", "predicted", "loss", "perplexity")
    )


@pytest.mark.parametrize(
    ("predicted", "shown"), [(0.03084, "+0.0308"), (2.345e-6, "+2.3e-06"), (0.0, "+0"), (None, "-")]
)
def test_a_small_prediction_is_not_nothing(predicted: float | None, shown: str) -> None:
    """Of classifiers it is a divergence, and those of good plans are millionths."""
    rows = summarise(results(keeps=(0.5,), predicted=1.0))
    rows[0] = dataclasses.replace(rows[0], predicted=predicted)
    console = Console(width=400)
    with console.capture() as captured:
        console.print(comparison(rows, results().dense))
    head, _, first, *_ = cells(captured.get())
    assert first[head.index("predicted")] == shown
