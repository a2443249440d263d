"""The command ``rankopt compare``."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rankopt.cli.data import READING, DataOptions, with_data
from rankopt.cli.given import require_with
from rankopt.cli.options import (
    DtypeOption,
    JsonOption,
    MultipleOption,
    PinOption,
    ScaleOption,
    WideOption,
    naming,
    note,
    pins_of,
    show,
    show_json,
)
from rankopt.errors import OptionError, RankoptError
from rankopt.files import RESULTS, is_format, require_file
from rankopt.plan.compare import DEFAULT_STRATEGIES, GRAMMAR, Strategy, spread
from rankopt.plan.compare import compare as compared
from rankopt.profile.profile import Profile
from rankopt.results import (
    Line,
    Measured,
    MeasuredPlan,
    compared_with,
    increase_name,
    lines_of,
    prediction,
)

EXAMPLES = """\b
Examples:
  rankopt compare profile.safetensors --keep 0.9 0.8 0.6
  rankopt compare profile.safetensors --keep 0.8 \\
    --strategy uniform greedy/layerwise
  rankopt compare profile.safetensors --keep 0.9 \\
    --model ./model --data heldout.txt -o results.json
  rankopt compare sample-1.safetensors sample-2.safetensors --keep 0.9 \\
    --form pairs pivoted --model ./model --data heldout.txt
"""


@with_data(needed=False, about="Held-out data, as for evaluate.")
def compare(
    ctx: typer.Context,
    profile: Annotated[
        list[Path],
        typer.Argument(help="A profile, or several of other samples of the calibration data."),
    ],
    *,
    keep: Annotated[
        list[float], typer.Option(help="Shares of the planned layers' parameters to keep.")
    ],
    strategy: Annotated[
        list[str] | None,
        typer.Option(help=f"{GRAMMAR}; if not given: " + ", ".join(map(str, DEFAULT_STRATEGIES))),
    ] = None,
    rank_multiple: MultipleOption = 1,
    pin: PinOption = None,
    form: Annotated[
        list[str] | None,
        typer.Option(help="pairs, pivoted, or both: of the strategies that name none."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="One or several: of the strategies that name none; the profile's first."),
    ] = None,
    scale: ScaleOption = None,
    model: Annotated[str | None, typer.Option(help="Also measure the loss of this model.")] = None,
    asked: DataOptions,
    against: Annotated[
        str | None,
        typer.Option(
            help="The strategy that measured losses are compared with, in pairs of examples; "
            "exact, or the first."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Results file: written as it goes; what it has is not measured again.",
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show strategies side by side: retained Fisher information, size, gap, and measured loss."""
    if (model is None) != (not asked.data):
        raise RankoptError("measuring the loss needs both --model and --data")
    if model is None:
        require_with(ctx, [*READING, "dtype", "against", "output"], "--model and --data")
        if len(profile) > 1:
            raise OptionError(
                f"{len(profile)} profiles are compared by what their plans measure: add --model "
                "and --data, or name one profile"
            )
    if output is not None:
        require_file(output, is_format(RESULTS), apart_from=[*profile, model, *asked.data])
    source = None if model is None else asked.read(model)
    strategies = spread(
        [Strategy.parse(text) for text in strategy] if strategy else DEFAULT_STRATEGIES,
        backend or (),
        form or (),
    )
    reference = _reference(against, strategies)
    profiles = {str(path): Profile.load(path) for path in profile}
    if len(profiles) < len(profile):
        raise OptionError(f"a profile is given twice: {', '.join(map(str, profile))}")
    how: Any = {"rank_multiple": rank_multiple, "scale": scale, "pins": pins_of(pin)}
    rows = [row for each in profiles.values() for row in compared(each, keep, strategies, **how)]
    plans, dense = [MeasuredPlan.of(row) for row in rows], None
    if source is not None:
        from rankopt.apply.apply import backend_of
        from rankopt.backends import find_backends
        from rankopt.evaluation.comparison import measure_comparison

        find_backends(x.backend for x in strategies if x.backend and ":" in x.backend)
        by_digest = {each.digest(): each for each in profiles.values()}
        for row in rows:
            backend_of(row.plan, by_digest[row.plan.profile_digest])
        loaded, batches, also = source.load_all(dtype)
        with naming(asked.named):
            results = measure_comparison(loaded, profiles, rows, batches, also=also, file=output)
        found = {plan.asked: plan for plan in results.plans}
        plans, dense = [found[plan.asked] for plan in plans], results.dense
    first = next(iter(profiles.values()))
    lines = lines_of(first.info.layers, plans)
    if dense is not None and len(strategies) > 1:
        lines = compared_with(lines, reference)
    if as_json:
        show_json(_plain(plans, lines, profiles) | ({"dense": dense.to_dict()} if dense else {}))
    else:
        from rankopt.cli.tables import print_comparison

        print_comparison(lines, dense, wide=wide)
        for text in (_test(lines, reference), _prediction(lines, dense)):
            if text:
                show(text)
    _warn(lines)


def _reference(against: str | None, strategies: Sequence[Strategy]) -> str:
    """The strategy that all are compared with, as it is written.

    Raises:
        OptionError: it is not among them.
    """
    named = [str(each) for each in strategies]
    if against is None:
        plain = [
            str(each)
            for each in strategies
            if dataclasses.replace(each, backend=None, form=None) == Strategy("exact")
        ]
        return (plain or named)[0]
    wanted = str(Strategy.parse(against))
    if wanted not in named:
        raise OptionError(f"--against {wanted!r} is none of the strategies: {', '.join(named)}")
    return wanted


def _plain(
    plans: Sequence[MeasuredPlan], lines: Sequence[Line], profiles: Mapping[str, Profile]
) -> dict[str, Any]:
    names = {profile.digest(): name for name, profile in profiles.items()}
    rows = [plan.to_dict() | {"calibration": names[plan.calibration]} for plan in plans]
    compared = [line.to_dict() for line in lines if line.measured]
    return {"rows": rows, **({"lines": compared} if compared else {})}


def _test(lines: Sequence[Line], reference: str) -> str:
    """What the difference is of, and how p was found."""
    found = next((line.against for line in lines if line.against is not None), None)
    if found is None:
        return ""
    how = "McNemar's test" if found.test == "McNemar" else "paired bootstrap over examples"
    return (
        f"difference: {found.what} over that of {reference} at the same budget; p: {how}, Holm's "
        "correction for all rows"
    )


def _prediction(lines: Sequence[Line], dense: Measured | None) -> str:
    """How well predictions order the plans."""
    if dense is None or dense.loss is None:
        return ""
    found = prediction(lines, dense.loss)
    each = (f"{name} {its} of {its.count} plans" for name, its in found.items())
    what = increase_name(lines)
    return f"predicted against measured {what}, Spearman: {', '.join(each)}" if found else ""


#: Plans whose realised budgets differ by more than this share of the planned layers are told.
APART = 1e-3


def _warn(lines: Sequence[Line]) -> None:
    for keep in dict.fromkeys(line.keep for line in lines):
        kept = {line.strategy: line.kept for line in lines if line.keep == keep}
        least, most = min(kept, key=kept.__getitem__), max(kept, key=kept.__getitem__)
        if kept[most] - kept[least] > APART:
            note(
                f"at {keep:g} the plans do not spend alike: {least} keeps {kept[least]:.2%}, "
                f"{most} {kept[most]:.2%}"
            )
    from rankopt.cli.tables import reasons_of

    reasons: dict[str, dict[str, None]] = {}
    for line in lines:
        for reason in (text for found in line.measured for text in reasons_of(found)):
            reasons.setdefault(reason, {})[f"{line.strategy} at {line.keep:g}"] = None
    for reason, names in reasons.items():
        note(f"{', '.join(names)}: {reason}")
