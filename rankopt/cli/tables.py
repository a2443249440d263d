"""For people: comparisons and evaluations as Markdown tables, and the summary of a profile."""

import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from rankopt.cli.options import note
from rankopt.errors import printable
from rankopt.layers import LeftAlone
from rankopt.profile.profile import Profile
from rankopt.results import Line, Measured
from rankopt.results.paired import Difference

if TYPE_CHECKING:
    from rankopt.evaluation.evaluation import Evaluation

_MEBIBYTE = 2**20


#: Wider than any table: what a table measures in it is what it needs.
_ENDLESS = 100_000
#: Where stdout is a file or a pipe.
_PIPED = 200
#: The first to go where a comparison is wider than the terminal, and so on.
EXPENDABLE = (
    "seconds",
    "backend",
    "MiB",
    "parameters",
    "model",
    "kept",
    "gap",
    "stability",
    "worst layer",
    "predicted",
    "retained",
    "p",
    "difference",
    "+-",
)


def print_table(table: Table) -> None:
    """To stdout, as wide as it needs to be: what does not fit overflows, nothing is cut."""
    width = _PIPED if not sys.stdout.isatty() else _console().width
    _console(max(width, _needed(table))).print(table)


def print_comparison(
    lines: Sequence[Line], dense: Measured | None = None, *, wide: bool = False
) -> None:
    """A comparison to stdout; in a terminal that is too narrow with fewer columns.

    Args:
        lines: see comparison.
        dense: see comparison.
        wide: all columns, whatever the width.
    """
    table = comparison(lines, dense)
    everything = [str(column.header) for column in table.columns]
    hidden: list[str] = []
    if sys.stdout.isatty() and not wide:
        room = _console().width
        for column in _expendable(everything, lines):
            if _needed(table) <= room:
                break
            hidden.append(column)
            table = comparison(lines, dense, without=hidden)
    print_table(table)
    if hidden:
        names = ", ".join(column for column in everything if column in hidden)
        note(f"hidden to fit the terminal: {names}; --wide shows all")


def _expendable(columns: Sequence[str], lines: Sequence[Line]) -> Iterator[str]:
    """Columns that a comparison can do without, the least important first.

    Strategy and budget stay, and one figure: the measured loss, or what is retained.
    """
    measured = _are_measured(lines)
    yield from (name for name in EXPENDABLE if name in columns and (measured or name != "retained"))
    if measured:
        found = [each for line in lines for each in line.measured]
        yield from reversed(_metrics(found))
        yield from reversed(_of_others(found))


class _Console(Console):
    """Leaves it to the command line what happens when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        """Raise what is being handled."""
        raise


def _console(width: int | None = None) -> Console:
    # A strategy may be called module:function of whatever name: no markup, no emoji.
    return _Console(width=width, markup=False, emoji=False)


def _needed(table: Table) -> int:
    console = _console(_ENDLESS)
    return Measurement.get(console, console.options, table).maximum


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=box.MARKDOWN, show_edge=True, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*map(printable, row))
    return table


def comparison(
    lines: Sequence[Line], dense: Measured | None = None, *, without: Collection[str] = ()
) -> Table:
    """One line for each strategy and budget; with the measured loss if there is one.

    ``kept`` is the realised share of the planned layers' parameters, ``model`` that of the whole
    model. Rows of different backends say which: what they retain is measured by their own losses.
    Under several calibrations all figures are means, and ``+-`` is half of the loss's interval over
    them; ``stability`` is the correlation of their ranks. ``difference`` is from the strategy that
    is compared with, ``p`` after correction for the whole table.

    Args:
        lines: to show.
        dense: the model without a plan, measured.
        without: columns to leave out.
    """
    columns = _columns(lines)
    shown = [name for name in columns if name not in without]
    rows = [[columns[name](line) for name in shown] for line in lines]
    if dense is not None and lines:
        of_dense = _dense(lines[0], dense)
        rows.insert(0, [of_dense.get(name, "") for name in shown])
    return _table(shown, rows)


def _columns(lines: Sequence[Line]) -> dict[str, Callable[[Line], str]]:
    """Header -> what stands under it; columns in which nothing would stand are not there."""
    several = len({line.plans[0].backend for line in lines}) > 1
    found = [each for line in lines for each in line.measured]
    columns: dict[str, Callable[[Line], str]] = {"strategy": lambda line: line.strategy}
    if several:
        columns["backend"] = lambda line: line.plans[0].backend
    columns |= {
        "keep": lambda line: f"{line.keep:g}",
        "parameters": lambda line: f"{fmean(x.size.planned for x in line.plans):,.0f}",
        "kept": lambda line: f"{line.kept:.3%}",
        "model": lambda line: f"{fmean(x.size.model / x.size.model_dense for x in line.plans):.2%}",
        "MiB": lambda line: f"{fmean(x.size.model_bytes for x in line.plans) / _MEBIBYTE:.1f}",
        "retained": lambda line: f"{fmean(x.retained_total for x in line.plans):.2%}",
        "worst layer": lambda line: f"{fmean(x.retained_worst for x in line.plans):.1%}",
        "gap": lambda line: _gap(fmean(x.gap for x in line.plans)),
        "seconds": lambda line: f"{fmean(x.seconds for x in line.plans):.2f}",
    }
    if any(line.stability is not None for line in lines):
        columns["stability"] = lambda line: _figure(line.stability, ".2f")
    if not _are_measured(lines):
        return columns
    if any(line.predicted is not None for line in lines):
        columns["predicted"] = lambda line: _increase(line.predicted)
    columns["loss"] = lambda line: _figure(line.loss, ".4f")
    if any(line.half_width is not None for line in lines):
        columns["+-"] = lambda line: _figure(line.half_width, ".4f")
    for name in _of_others(found):
        columns[name] = lambda line, name=name: _figure(line.also.get(name), ".4f")  # type: ignore[misc]
    for name in _metrics(found):
        columns[name] = lambda line, name=name: _figure(line.metrics.get(name), ".4g")  # type: ignore[misc]
    if any(line.against is not None for line in lines):
        columns["difference"] = lambda line: _difference(line.against)
        columns["p"] = lambda line: "" if line.against is None else f"{line.against.corrected:.1g}"
    return columns


def _dense(line: Line, found: Measured) -> dict[str, str]:
    size = line.plans[0].size
    return {
        "strategy": "dense",
        "parameters": f"{size.planned_dense:,}",
        **dict.fromkeys(("kept", "model", "retained"), "100.00%"),
        "MiB": f"{size.model_bytes_dense / _MEBIBYTE:.1f}",
        "worst layer": "100.0%",
        "loss": _figure(found.loss, ".4f"),
        **{name: _figure(value, ".4f") for name, value in found.of_others.items()},
        **{name: _figure(value, ".4g") for name, value in found.metrics.items()},
    }


def _are_measured(lines: Sequence[Line]) -> bool:
    return any(line.measured for line in lines)


def _gap(gap: float) -> str:
    return f"{gap:.1e}" if gap else "0"


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _of_others(measured: "Sequence[Evaluation | Measured]") -> list[str]:
    """What is shown of other domains: their losses, and of classifiers the metrics."""
    names = (name for found in measured for name in found.of_others)
    return [name for name in dict.fromkeys(names) if not name.startswith("perplexity of ")]


def reasons_of(found: "Evaluation | Measured", data: str = "") -> list[str]:
    """Notes of all domains, each with the name of its own."""
    named = [(data, found), *found.also.items()]
    return [f"{name}: {note}" if name else note for name, each in named for note in each.notes]


def _metrics(measured: "Sequence[Evaluation | Measured]") -> list[str]:
    """Of all rows: one whose loss is not finite lacks some."""
    return list(dict.fromkeys(name for found in measured for name in found.metrics))


def _increase(value: float | None) -> str:
    """A divergence may be far below what four digits after the point show."""
    return _figure(value, "+.4f" if value is None or abs(value) >= 1e-3 else "+.2g")


def _figure(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def evaluation(found: "Evaluation") -> Table:
    """One measured model, one line for each figure."""
    unit = "nats per target" if found.task != "regression" else "squared error"
    lines = [
        ["task", found.task],
        ["examples", f"{found.examples:,}"],
        ["targets (tokens or labels)", f"{found.targets:,}"],
        [f"loss ({unit})", f"{found.loss:.6f}"],
        *([name, _figure(value, ".6g")] for name, value in found.metrics.items()),
        *([name, _figure(found.of_others[name], ".6f")] for name in _of_others([found])),
        *([f"targets of {name}", f"{each.targets:,}"] for name, each in found.also.items()),
        ["parameters of the plannable layers", f"{found.planned_parameters:,}"],
        ["parameters of the whole model", f"{found.model_parameters:,}"],
        ["bytes of the whole model", f"{found.model_bytes:,}"],
    ]
    return _table(["measured", "value"], lines)


def profile_summary(profile: Profile) -> str:
    """What was measured, how sure it is, and what no plan will touch."""
    info = profile.info
    lines = [
        f"{info.architecture}, {info.task}: {info.estimator} Fisher per {info.unit} from "
        f"{info.examples:,} examples, {info.targets:,} targets"
    ]
    if info.estimator_reason is not None:
        lines.append(f"  estimator   {info.estimator}: {info.estimator_reason}")
    if info.estimator == "sampled":
        lines.append(f"  labels      drawn {info.draws}x from the model's prediction, "
                     f"seed {info.seed}")  # fmt: skip
    if info.sources is not None:
        lines.append(f"  data        {', '.join(map(str, info.sources))}")
    if info.again is not None:
        lines.append(f"  rounds      half of it measured again under {info.again}")
    if info.cross_fit:
        lines.append("  losses      cross-fitted: half on data that did not make the factors")
    if info.bits:
        lines.append(f"  rounding    to {' and '.join(map(str, info.bits))} bits: losses measured")
    if info.stopped is not None:
        lines.append(f"  stopped     {info.stopped}")
    for backend in info.backends:
        scales = ", ".join(f"{scale.name} ({scale.unit})" for scale in backend.scales)
        lines.append(f"  backend     {backend.name}, {backend.source}; scales: {scales}")
    lines += _certainty(profile)
    lines += coverage(
        len(info.layers),
        info.planned_parameters,
        info.model_parameters,
        info.left_alone,
        info.form,
    )
    return "\n".join(map(printable, lines))


def coverage(
    layers: int, planned: int, whole: int, left_alone: Sequence[LeftAlone], form: str
) -> list[str]:
    """Lines of how much of a model can be planned, and what cannot.

    Args:
        layers: that are planned.
        planned: their parameters, dense.
        whole: those of the model.
        left_alone: other matrices.
        form: of plans.
    """
    lines = [
        f"  planned     {layers} layers, {planned:,} of {whole:,} parameters "
        f"({planned / whole:.1%}), form {form}"
    ]
    inside = [x for x in left_alone if _block_free(x.name) != x.name]
    missed = sum(x.parameters for x in inside)
    if missed:
        lines.append(
            f"  NOT COVERED {missed:,} parameters inside the blocks "
            f"({missed / (missed + planned):.1%} of the matrices there):"
        )
        lines += _grouped(inside)
    outside = [x for x in left_alone if x not in inside]
    lines.append(f"  left alone  {whole - planned:,} parameters in all; outside the blocks:")
    return lines + _grouped(outside)


#: Above this standard error of a layer's Fisher information, more data is advised. Where losses
#: fall exponentially with the rank and those of each layer are wrong by a share d, the plan that is
#: best for them loses more than the best one, by var(d)/2 of it: half a percent for 10 %.
SURE = 0.1


def _certainty(profile: Profile) -> list[str]:
    errors = profile.standard_errors()
    worst = max(errors, key=lambda name: errors[name])
    largest, batches = errors[worst], 0 if profile.batch_units is None else profile.batch_units.size
    if math.isinf(largest):
        return ["  certainty   unknown: it takes two batches or more to see how much they differ"]
    found = (
        f"  certainty   standard error of a layer's Fisher {median(errors.values()):.1%} (median), "
        f"{largest:.1%} ({worst}), from {batches} batches"
    )
    if largest <= SURE:
        return [found, f"              more data is not needed: all are within {SURE:.0%}"]
    wanted = profile.examples * (largest / SURE) ** 2
    digits = 10 ** max(math.floor(math.log10(wanted)) - 1, 0)
    enough = math.ceil(wanted / digits) * digits
    return [
        found,
        f"              more data is advisable: about {enough:,} examples would bring every layer "
        f"within {SURE:.0%}",
    ]


def _block_free(name: str) -> str:
    """The name without the numbers of blocks, ``model.layers.*.mlp``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _grouped(modules: Sequence[LeftAlone]) -> list[str]:
    """One line for all modules of a kind, those with most parameters first; eight at most."""
    kinds: dict[tuple[str, str], list[LeftAlone]] = {}
    for x in modules:
        kinds.setdefault((_block_free(x.name), x.module), []).append(x)
    largest = sorted(kinds.items(), key=lambda kind: -sum(x.parameters for x in kind[1]))
    lines = []
    for (pattern, module), found in largest[:8]:
        name, times = (found[0].name, "") if len(found) == 1 else (pattern, f"{len(found)} x, ")
        parameters = sum(x.parameters for x in found)
        lines.append(f"    {name} ({module}, {times}{parameters:,}): {found[0].reason}")
    if len(largest) > 8:
        hidden = sum(x.parameters for _, found in largest[8:] for x in found)
        lines.append(f"    and {len(largest) - 8} more kinds ({hidden:,})")
    return lines
