"""Tables for people: comparisons, plans and evaluations, as Markdown that a terminal shows well."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from rankopt.compare import Row
from rankopt.profile import Profile

if TYPE_CHECKING:
    from rankopt.evaluation import Evaluation

_MEBIBYTE = 2**20


def print_table(table: Table) -> None:
    """To stdout; as wide as it needs to be where stdout is a file or a pipe."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=box.MARKDOWN, show_edge=True, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    return table


def comparison(rows: Sequence[Row], dense: "Evaluation | None" = None) -> Table:
    """One line for each strategy and budget; with measured loss if the rows have it.

    ``kept`` is the realised share of the planned layers' parameters, ``model`` that of the whole
    model.
    """
    measured = any(row.measured is not None for row in rows)
    metrics = list(rows[0].measured.metrics) if rows and rows[0].measured else []
    columns = ["strategy", "keep", "parameters", "kept", "model", "MiB", "retained", "worst layer"]
    columns += ["gap", "seconds", *(["loss", *metrics] if measured else [])]
    lines = []
    if dense is not None and rows:
        size = rows[0].plan.size
        lines.append(
            [
                "dense",
                "",
                f"{size.planned_dense:,}",
                "100.00%",
                "100.00%",
                f"{size.model_bytes_dense / _MEBIBYTE:.1f}",
                "100.00%",
                "100.0%",
                "",
                "",
                *_measured(dense, metrics),
            ]
        )
    for row in rows:
        size, plan = row.plan.size, row.plan
        lines.append(
            [
                str(row.strategy),
                f"{row.keep:g}",
                f"{size.planned:,}",
                f"{size.planned / size.planned_dense:.3%}",
                f"{size.model / size.model_dense:.2%}",
                f"{size.model_bytes / _MEBIBYTE:.1f}",
                f"{plan.retained_total:.2%}",
                f"{plan.retained_worst:.1%}",
                f"{plan.certificate.gap:.1e}" if plan.certificate.gap else "0",
                f"{row.seconds:.2f}",
                *(_measured(row.measured, metrics) if row.measured is not None else []),
            ]
        )
    return _table(columns, lines)


def _measured(found: "Evaluation", metrics: Sequence[str]) -> list[str]:
    values = [f"{found.metrics[name]:.4g}" for name in metrics]
    return [f"{found.loss:.4f}", *values]


def evaluation(found: "Evaluation") -> Table:
    """One measured model, one line for each figure."""
    unit = "nats per target" if found.task != "regression" else "squared error"
    lines = [
        ["task", found.task],
        ["examples", f"{found.examples:,}"],
        ["targets (tokens or labels)", f"{found.targets:,}"],
        [f"loss ({unit})", f"{found.loss:.6f}"],
        *([name, f"{value:.6g}"] for name, value in found.metrics.items()),
        ["parameters of the plannable layers", f"{found.planned_parameters:,}"],
        ["parameters of the whole model", f"{found.model_parameters:,}"],
        ["bytes of the whole model", f"{found.model_bytes:,}"],
    ]
    return _table(["measured", "value"], lines)


def profile_summary(profile: Profile) -> str:
    """What was measured, and what no plan will touch."""
    info = profile.info
    share = info.planned_parameters / info.model_parameters
    rest = info.model_parameters - info.planned_parameters
    lines = [
        f"{info.architecture}, {info.task}: {info.estimator} Fisher per {info.unit} from "
        f"{info.examples:,} examples, {info.targets:,} targets",
        f"  planned     {len(info.layers)} layers, {info.planned_parameters:,} of "
        f"{info.model_parameters:,} parameters ({share:.1%})",
        f"  left alone  {rest:,} parameters, among them:",
    ]
    shown = info.left_alone[:8]
    lines += [f"    {x.name} ({x.module}, {x.parameters:,}): {x.reason}" for x in shown]
    if len(info.left_alone) > len(shown):
        lines.append(f"    and {len(info.left_alone) - len(shown)} more")
    return "\n".join(lines)
