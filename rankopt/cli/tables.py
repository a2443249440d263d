"""For people: comparisons and evaluations as Markdown tables, and the summary of a profile."""

import math
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from rankopt.cli.options import note
from rankopt.errors import printable
from rankopt.layers import LeftAlone
from rankopt.plan.compare import ComparedPlan
from rankopt.profile.profile import Profile

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
    "worst layer",
    "retained",
)


def print_table(table: Table) -> None:
    """To stdout, as wide as it needs to be: what does not fit overflows, nothing is cut."""
    width = _PIPED if not sys.stdout.isatty() else _console().width
    _console(max(width, _needed(table))).print(table)


def print_comparison(
    rows: Sequence[ComparedPlan],
    measured: "Sequence[Evaluation]" = (),
    dense: "Evaluation | None" = None,
    *,
    wide: bool = False,
) -> None:
    """A comparison to stdout; in a terminal that is too narrow with fewer columns.

    Args:
        rows: see comparison.
        measured: see comparison.
        dense: see comparison.
        wide: all columns, whatever the width.
    """
    table = comparison(rows, measured, dense)
    everything = [str(column.header) for column in table.columns]
    hidden: list[str] = []
    if sys.stdout.isatty() and not wide:
        room = _console().width
        for column in _expendable(everything, measured):
            if _needed(table) <= room:
                break
            hidden.append(column)
            table = comparison(rows, measured, dense, without=hidden)
    print_table(table)
    if hidden:
        names = ", ".join(column for column in everything if column in hidden)
        note(f"hidden to fit the terminal: {names}; --wide shows all")


def _expendable(columns: Sequence[str], measured: "Sequence[Evaluation]") -> Iterator[str]:
    """Columns that a comparison can do without, the least important first.

    Strategy and budget stay, and one figure: the measured loss, or what is retained.
    """
    yield from (name for name in EXPENDABLE if name in columns and (measured or name != "retained"))
    if measured:
        yield from reversed(_metrics(measured))
        yield from reversed(_of_others(measured))


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
    rows: Sequence[ComparedPlan],
    measured: "Sequence[Evaluation]" = (),
    dense: "Evaluation | None" = None,
    *,
    without: Collection[str] = (),
) -> Table:
    """One line for each strategy and budget; with the rows' measured loss if it is given.

    ``kept`` is the realised share of the planned layers' parameters, ``model`` that of the whole
    model. Rows of different backends say which: what they retain is measured by their own losses.
    Columns that are named in ``without`` are left out.
    """
    several = len({row.plan.backend for row in rows}) > 1
    metrics, others = _metrics(measured), _of_others(measured)
    columns = ["strategy", *(["backend"] if several else []), "keep", "parameters", "kept", "model"]
    columns += ["MiB", "retained", "worst layer"]
    columns += ["gap", "seconds", *(["loss", *others, *metrics] if measured else [])]
    lines = []
    if dense is not None and rows:
        size = rows[0].plan.size
        lines.append(
            [
                "dense",
                *([""] if several else []),
                "",
                f"{size.planned_dense:,}",
                "100.00%",
                "100.00%",
                f"{size.model_bytes_dense / _MEBIBYTE:.1f}",
                "100.00%",
                "100.0%",
                "",
                "",
                *_measured(dense, others, metrics),
            ]
        )
    for index, row in enumerate(rows):
        size, plan = row.plan.size, row.plan
        lines.append(
            [
                str(row.strategy),
                *([plan.backend] if several else []),
                f"{row.keep:g}",
                f"{size.planned:,}",
                f"{size.planned / size.planned_dense:.3%}",
                f"{size.model / size.model_dense:.2%}",
                f"{size.model_bytes / _MEBIBYTE:.1f}",
                f"{plan.retained_total:.2%}",
                f"{plan.retained_worst:.1%}",
                f"{plan.certificate.gap:.1e}" if plan.certificate.gap else "0",
                f"{row.seconds:.2f}",
                *(_measured(measured[index], others, metrics) if measured else []),
            ]
        )
    shown = [index for index, column in enumerate(columns) if column not in without]
    return _table([columns[k] for k in shown], [[line[k] for k in shown] for line in lines])


def _measured(found: "Evaluation", others: Sequence[str], metrics: Sequence[str]) -> list[str]:
    return [
        f"{found.loss:.4f}",
        *(_figure(found.of_others.get(name), ".4f") for name in others),
        *(_figure(found.metrics.get(name), ".4g") for name in metrics),
    ]


def _of_others(measured: "Sequence[Evaluation]") -> list[str]:
    """What is shown of other domains: their losses, and of classifiers the metrics."""
    names = (name for found in measured for name in found.of_others)
    return [name for name in dict.fromkeys(names) if not name.startswith("perplexity of ")]


def reasons_of(found: "Evaluation", data: str = "") -> list[str]:
    """Notes of all domains, each with the name of its own."""
    named = [(data, found), *found.also.items()]
    return [f"{name}: {note}" if name else note for name, each in named for note in each.notes]


def _metrics(measured: "Sequence[Evaluation]") -> list[str]:
    """Of all rows: one whose loss is not finite lacks some."""
    return list(dict.fromkeys(name for found in measured for name in found.metrics))


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
    share = info.planned_parameters / info.model_parameters
    rest = info.model_parameters - info.planned_parameters
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
        given = (f"{x.examples:,} of {x.name} (weight {x.weight:g})" for x in info.sources)
        lines.append(f"  data        {', '.join(given)}")
    if info.stopped is not None:
        lines.append(f"  stopped     {info.stopped}")
    for backend in info.backends:
        scales = ", ".join(f"{scale.name} ({scale.unit})" for scale in backend.scales)
        lines.append(f"  backend     {backend.name}, {backend.source}; scales: {scales}")
    lines += _certainty(profile)
    lines.append(
        f"  planned     {len(info.layers)} layers, {info.planned_parameters:,} of "
        f"{info.model_parameters:,} parameters ({share:.1%}), form {info.form}"
    )
    inside = [x for x in info.left_alone if _block_free(x.name) != x.name]
    missed = sum(x.parameters for x in inside)
    if missed:
        lines.append(
            f"  NOT COVERED {missed:,} parameters inside the blocks "
            f"({missed / (missed + info.planned_parameters):.1%} of the matrices there):"
        )
        lines += _grouped(inside)
    outside = [x for x in info.left_alone if x not in inside]
    lines.append(f"  left alone  {rest:,} parameters in all; outside the blocks:")
    lines += _grouped(outside)
    return "\n".join(map(printable, lines))


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
