"""The command ``rankopt compare``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankopt.cli.data import READING, DataOptions, with_data
from rankopt.cli.given import require_with
from rankopt.cli.options import (
    BackendOption,
    DtypeOption,
    FormOption,
    JsonOption,
    MultipleOption,
    ProfileArgument,
    ScaleOption,
    WideOption,
    naming,
    note,
    show_json,
)
from rankopt.errors import RankoptError
from rankopt.plan.compare import DEFAULT_STRATEGIES, GRAMMAR, Strategy
from rankopt.plan.compare import compare as compared
from rankopt.profile.profile import Profile

if TYPE_CHECKING:
    from rankopt.evaluation.evaluation import Evaluation

EXAMPLES = """\b
Examples:
  rankopt compare profile.safetensors --keep 0.9 0.8 0.6
  rankopt compare profile.safetensors --keep 0.8 \\
    --strategy uniform greedy/layerwise
  rankopt compare profile.safetensors --keep 0.9 \\
    --model ./model --data heldout.txt
"""


@with_data(needed=False, about="Held-out data, as for evaluate.")
def compare(
    ctx: typer.Context,
    profile: ProfileArgument,
    *,
    keep: Annotated[
        list[float], typer.Option(help="Shares of the planned layers' parameters to keep.")
    ],
    strategy: Annotated[
        list[str] | None,
        typer.Option(help=f"{GRAMMAR}; if not given: " + ", ".join(map(str, DEFAULT_STRATEGIES))),
    ] = None,
    rank_multiple: MultipleOption = 1,
    form: FormOption = None,
    backend: BackendOption = None,
    scale: ScaleOption = None,
    model: Annotated[str | None, typer.Option(help="Also measure the loss of this model.")] = None,
    asked: DataOptions,
    dtype: DtypeOption = "float32",
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show strategies side by side: retained Fisher information, size, gap, and measured loss."""
    if (model is None) != (not asked.data):
        raise RankoptError("measuring the loss needs both --model and --data")
    if model is None:
        require_with(ctx, [*READING, "dtype"], "--model and --data")
    source = None if model is None else asked.read(model)
    strategies = [Strategy.parse(text) for text in strategy] if strategy else DEFAULT_STRATEGIES
    loaded_profile = Profile.load(profile)
    rows = list(
        compared(
            loaded_profile,
            keep,
            strategies,
            rank_multiple=rank_multiple,
            form=form,
            backend=backend,
            scale=scale,
        )
    )
    printed: dict[str, Any] = {"rows": [row.to_dict() for row in rows]}
    measured: list[Evaluation] = []
    dense = None
    if source is not None:
        from rankopt.apply.apply import backend_of
        from rankopt.backends import find_backends
        from rankopt.evaluation.plans import measure_comparison, measured_dict

        named = (backend, *(each.backend for each in strategies))
        find_backends(name for name in named if name is not None and ":" in name)
        for row in rows:
            backend_of(row.plan, loaded_profile)
        loaded, batches, also = source.load_all(dtype)
        with naming(asked.named):
            dense, pairs = measure_comparison(loaded, loaded_profile, rows, batches, also=also)
        measured = [evaluation for _, evaluation in pairs]
        printed["rows"] = [measured_dict(*pair) for pair in pairs]
        printed["dense"] = dense.to_dict()
    from rankopt.cli.tables import print_comparison, reasons_of

    if as_json:
        show_json(printed)
    else:
        print_comparison(rows, measured, dense, wide=wide)
    reasons: dict[str, list[str]] = {}
    for row, found in zip(rows, measured, strict=bool(measured)):
        for reason in reasons_of(found):
            reasons.setdefault(reason, []).append(f"{row.strategy} at {row.keep:g}")
    for reason, names in reasons.items():
        note(f"{', '.join(names)}: {reason}")
