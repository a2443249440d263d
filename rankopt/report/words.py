"""What a report says in words and tables: of the profile, of each plan, of what was measured.

A table is its columns and rows of text; nothing here is HTML, the page's script makes text of it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import median

from rankopt.errors import printable
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from rankopt.results.correlation import Correlation
from rankopt.results.results import Results
from rankopt.results.summary import Line


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        columns: their heads.
        rows: as many texts each.
        note: a sentence below it.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "columns": [printable(column) for column in self.columns],
            "rows": [[printable(text) for text in row] for row in self.rows],
            "note": printable(self.note),
        }


def facts_of(profile: Profile) -> Table:
    """What was measured, on what, and how sure it is."""
    info = profile.info
    share = info.planned_parameters / info.model_parameters
    fixed = info.model_parameters - info.planned_parameters
    number = f"{len(info.layers):,} layers" if len(info.layers) > 1 else "one layer"
    backends = "; ".join(f"{each.name} ({each.source})" for each in info.backends)
    tied = sum(len(layer.members) > 1 for layer in info.layers)
    rows = [
        ("model", f"{info.architecture}, task {info.task}"),
        (
            "planned",
            f"{number} with {info.planned_parameters:,} of the model's "
            f"{info.model_parameters:,} parameters ({share:.1%}), form {info.form}",
        ),
        *(
            [("tied", f"{tied:,} of the layers, each one matrix of several modules")]
            if tied
            else []
        ),
        ("left alone", f"{fixed:,} parameters, which no plan changes"),
        (
            "measured on",
            f"{info.examples:,} examples with {info.targets:,} targets (predicted tokens, or "
            "labels)",
        ),
        ("estimator", _estimator(profile)),
        ("losses by", backends),
        ("certainty", _certainty(profile)),
    ]
    if info.sources is not None:
        rows.append(("data", ", ".join(map(str, info.sources))))
    if info.again is not None:
        rows.append(("rounds", f"half of it measured again under {info.again}"))
    if info.cross_fit:
        rows.append(("losses", "cross-fitted: half on data that did not make the factors"))
    if info.stopped is not None:
        rows.append(("stopped", info.stopped))
    return Table(("what", "value"), tuple(rows))


def certificates_of(plans: Mapping[str, Plan]) -> Table:
    """One column for each plan: what it costs, what it loses, and how sure that is the least."""
    said = [_certificate(plan) for plan in plans.values()]
    heads = list(dict.fromkeys(head for each in said for head in each))
    return Table(
        ("", *plans),
        tuple((head, *(each.get(head, "") for each in said)) for head in heads),
        "The gap is the proven distance to the best plan within the budget; 0 is proven optimal. "
        "The predicted increase is of the loss of a target, in nats, to second order.",
    )


def measured_of(results: Results, lines: Sequence[Line], against: str | None) -> Table:
    """One row for each strategy and budget, the dense model first."""
    metrics = list(dict.fromkeys(name for line in lines for name in line.metrics))
    # Of other data the loss and what a classifier gets right: a perplexity says the loss again.
    named = dict.fromkeys(name for line in lines for name in line.also)
    others = [name for name in named if not name.startswith("perplexity of ")]
    made: dict[str, list[str]] = {
        "backend": [line.plans[0].backend for line in lines],
        "form": [line.plans[0].form for line in lines],
        "scale": [line.plans[0].scale for line in lines],
    }
    made = {head: values for head, values in made.items() if len(set(values)) > 1}
    several = any(line.half_width is not None for line in lines)
    columns = ["strategy", *made, "keep", "kept", "loss", *(["±"] if several else []), *metrics]
    columns += [*others, "predicted increase"]
    columns += ["stability of ranks"] if several else []
    columns += ["difference", "interval", "corrected p"] if against is not None else []
    dense = results.dense
    first = [
        "dense",
        *("" for _ in made),
        "",
        "100.00%",
        _loss(dense.loss),
        *([""] if several else []),
    ]
    first += [_figure(dense.metrics.get(name)) for name in metrics]
    first += [_loss(dense.of_others.get(name)) for name in others]
    rows = [first + [""] * (len(columns) - len(first))]
    for k, line in enumerate(lines):
        row = [
            line.strategy,
            *(values[k] for values in made.values()),
            f"{line.keep:g}",
            f"{line.kept:.2%}",
            _loss(line.loss),
        ]
        row += [_loss(line.half_width)] if several else []
        row += [_figure(line.metrics.get(name)) for name in metrics]
        row += [_loss(line.also.get(name)) for name in others]
        row += [_figure(line.predicted)]
        row += [_figure(line.stability, ".2f")] if several else []
        row += _difference(line) if against is not None else []
        rows.append(row)
    return Table(tuple(columns), tuple(map(tuple, rows)), _measured_note(results, lines, against))


def correlations_of(found: Mapping[str, Correlation]) -> Table:
    """Whether predictions order plans as measurements do, one row for each backend."""
    return Table(
        ("backend", "Spearman's correlation", "95 % interval", "of so many"),
        tuple(
            (name, f"{its.rho:.2f}", f"{its.low:.2f} to {its.high:.2f}", str(its.count))
            for name, its in found.items()
        ),
        "Of predicted and measured increase, over strategies and budgets: 1 is the same order; the "
        "interval is a bootstrap's over them. "
        "Backends with fewer than three have none.",
    )


def _estimator(profile: Profile) -> str:
    info = profile.info
    reason = "" if info.estimator_reason is None else f" ({info.estimator_reason})"
    return f"{info.estimator} Fisher information of each {info.unit}{reason}"


def _certainty(profile: Profile) -> str:
    errors = profile.standard_errors()
    worst = max(errors, key=lambda name: errors[name])
    if math.isinf(errors[worst]):
        return "unknown: it takes two batches or more"
    return (
        f"standard error of a layer's Fisher information {median(errors.values()):.1%} (median), "
        f"{errors[worst]:.1%} ({worst})"
    )


def _certificate(plan: Plan) -> dict[str, str]:
    proof, size = plan.certificate, plan.size
    dense = sum(entry.rank is None for entry in plan.layers)
    found = {
        "chosen by": f"{plan.solver}, objective {plan.objective}",
        "losses by": f"{plan.backend}, scale {plan.scale}",
        "form of low ranks": plan.form,
        "budget": plan.asked,
        "kept of the planned layers": f"{size.planned / size.planned_dense:.2%}",
        "kept of the model": f"{size.model / size.model_dense:.2%}",
        "parameters of the planned layers": f"{size.planned:,}",
        "layers": f"{len(plan.layers) - dense:,} low rank, {dense:,} dense",
        "loss": f"{proof.loss:.5g}",
        "no plan is below": f"{proof.bound:.5g}",
        "gap": f"{proof.gap:.2%} ({proof.status.replace('_', ' ')})",
        "unit of the loss": proof.unit,
        "retained Fisher information": f"{plan.retained_total:.3%}",
        "worst layer": f"{plan.worst_layer} ({plan.retained_worst:.1%})",
    }
    if plan.pinned:
        found["pinned"] = f"{len(plan.pinned)} layers, whose rank was given"
    if plan.min_retained is not None:
        found["retained by every layer at least"] = f"{plan.min_retained:.2%}"
    if proof.multiplier is not None:
        found["1,000 more parameters would save"] = f"{1000 * proof.multiplier:.3g}"
    if plan.predicted is not None:
        found["predicted increase"] = f"+{plan.predicted:.4g}"
    return found


def _difference(line: Line) -> list[str]:
    found = line.against
    if found is None:
        return ["", "", ""]
    what = "" if found.what == "loss" else f" {found.what}"
    return [
        f"{found.mean:+.4f}{what}",
        f"{found.low:+.4f} to {found.high:+.4f}",
        f"{found.corrected:.2g}",
    ]


def _measured_note(results: Results, lines: Sequence[Line], against: str | None) -> str:
    said = [f"{results.dense.examples:,} examples with {results.dense.targets:,} targets."]
    if any(line.half_width is not None for line in lines):
        said.append("±: half of the 95 % interval over calibrations.")
    if against is not None:
        tests = dict.fromkeys(line.against.test for line in lines if line.against is not None)
        how = f" by {' or '.join(tests)}," if tests else ""
        said.append(
            f"Differences are to {against} at the same budget, p{how} after Holm's correction."
        )
    waiting = sum(row.measured is None for row in results.plans)
    if waiting:
        said.append(f"{waiting} more are not measured yet.")
    return " ".join(said)


def _loss(value: float | None) -> str:
    return _figure(value, ".4f")


def _figure(value: float | None, how: str = ".4g") -> str:
    return "" if value is None else format(value, how)
