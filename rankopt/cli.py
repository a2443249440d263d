"""The command line: data on stdout, progress on stderr, one line and an exit code for mistakes.

Exit codes: 0 done, 2 a mistake in what was given, 3 a budget that no ranks fit, 130 and 143 stopped
by Ctrl-C and by SIGTERM.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rankopt import profiling
from rankopt._version import __version__
from rankopt.compare import DEFAULT_STRATEGIES, Strategy, compare
from rankopt.errors import RankoptError
from rankopt.files import require_free
from rankopt.options import (
    BackendOption,
    BatchOption,
    DataOption,
    DtypeOption,
    ExamplesOption,
    ForceOption,
    JsonOption,
    LabelOption,
    LengthOption,
    ModelArgument,
    MultipleOption,
    PairOption,
    ProfileArgument,
    ScaleOption,
    Source,
    SplitOption,
    SpreadOptions,
    TextOption,
    floor_of,
    require_writable,
)
from rankopt.plan import Plan
from rankopt.planning import known_solvers, make_plan
from rankopt.profile import Profile

_SOLVERS = ", ".join([*known_solvers(), "search"])

app = typer.Typer(
    help="Decide how many ranks each layer of a neural network deserves.\n\n"
    "profile -> plan -> apply -> evaluate; compare shows strategies side by side.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _note(text: str) -> None:
    typer.echo(text, err=True)


app.command(cls=SpreadOptions, epilog=profiling.EXAMPLES)(profiling.profile)


@app.command(
    epilog="Examples:\n\n"
    "rankopt plan profile.safetensors --keep 0.8 -o plan.json\n\n"
    "rankopt plan profile.safetensors --keep-total 0.7 --min-retained 0.5 --rank-multiple 8\n\n"
    "rankopt plan profile.safetensors --solver threshold --share 0.95\n\n"
    "rankopt plan profile.safetensors --keep 0.9 -o plan.json --solver search "
    "--model ./model --data validation.txt --trials 40\n\n"
    "Without -o the plan is printed. Solvers: " + _SOLVERS + ", or "
    "module:function of your own. A search goes on where it was stopped when it is called again."
)
def plan(
    profile: ProfileArgument,
    keep: Annotated[
        float | None, typer.Option(help="Share of the planned layers' parameters to keep.")
    ] = None,
    keep_total: Annotated[
        float | None, typer.Option(help="Share of the whole model's parameters to keep.")
    ] = None,
    max_params: Annotated[
        int | None, typer.Option(help="Parameters for the planned layers.")
    ] = None,
    solver: Annotated[str, typer.Option(help=_SOLVERS)] = "exact",
    objective: Annotated[str, typer.Option(help="total, layerwise or maxmin.")] = "total",
    rank_multiple: MultipleOption = 1,
    backend: BackendOption = None,
    scale: ScaleOption = None,
    share: Annotated[
        float | None, typer.Option(help="threshold: retained share of every layer.")
    ] = None,
    min_retained: Annotated[
        str | None,
        typer.Option(
            help="Share that every layer retains at least, or best: the largest possible."
        ),
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="exact (60) or knapsack (30): seconds.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="search: the model to measure.")] = None,
    data: Annotated[
        str | None, typer.Option(help="search: validation data, as for evaluate.")
    ] = None,
    trials: Annotated[int, typer.Option(help="search: plans to measure in all.")] = 40,
    sampler: Annotated[
        str, typer.Option(help="search: cmaes, tpe, thompson, gp or random.")
    ] = "cmaes",
    storage: Annotated[
        str | None,
        typer.Option(help="search: journal file or database URL; OUTPUT.journal if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="search: of the sampler.")] = 0,
    workers: Annotated[int, typer.Option(help="search: processes that share the trials.")] = 1,
    split: SplitOption = None,
    text_column: TextOption = "text",
    pair_column: PairOption = None,
    label_column: LabelOption = "label",
    examples: ExamplesOption = None,
    max_length: LengthOption = None,
    batch_size: BatchOption = 4,
    dtype: DtypeOption = "float32",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Plan to write.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decide the rank of every layer under a budget."""
    if output is not None:
        require_writable(output, force)
    if solver != "search" and (model is not None or data is not None):
        raise RankoptError("--model and --data are for --solver search")
    limits: dict[str, Any] = {"keep": keep, "keep_total": keep_total, "max_params": max_params}
    how: dict[str, Any] = {
        "objective": objective,
        "rank_multiple": rank_multiple,
        "backend": backend,
        "scale": scale,
    }
    timed: dict[str, Any] = {} if time_limit is None else {"time_limit": time_limit}
    if solver != "search":
        made = make_plan(
            Profile.load(profile),
            **limits,
            **how,
            solver=solver,
            share=share,
            min_retained=floor_of(min_retained),
            **timed,
        )
    else:
        if model is None or data is None:
            raise RankoptError("--solver search measures a model: it needs --model and --data")
        if share is not None or min_retained is not None:
            raise RankoptError("--share and --min-retained do not go with --solver search")
        source = Source.read(
            data, split, (text_column, pair_column, label_column), examples, max_length, batch_size
        )
        loaded_profile = Profile.load(profile)
        from rankopt.searching import search_plan, with_workers

        loaded, batches = source.load(model, dtype)
        kept = storage or (None if output is None else f"{output}.journal")
        with with_workers(workers, kept):
            searched = search_plan(
                loaded,
                loaded_profile,
                batches,
                **limits,
                **how,
                trials=trials,
                sampler=sampler,
                storage=kept,
                seed=seed,
                solver_options=timed,
            )
        made = searched.plan
        _note(str(searched))
    if output is not None:
        made.save(output)
        _note(f"plan written to {output}")
    typer.echo(made.to_json() if as_json else str(made))


@app.command(
    "compare",
    cls=SpreadOptions,
    epilog="Examples:\n\n"
    "rankopt compare profile.safetensors --keep 0.9 0.8 0.6\n\n"
    "rankopt compare profile.safetensors --keep 0.8 --strategy uniform greedy/layerwise\n\n"
    "rankopt compare profile.safetensors --keep 0.9 --model ./model --data heldout.txt",
)
def compare_command(
    profile: ProfileArgument,
    keep: Annotated[
        list[float], typer.Option(help="Shares of the planned layers' parameters to keep.")
    ],
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="SOLVER[/OBJECTIVE][@BACKEND]; if not given: "
            + ", ".join(map(str, DEFAULT_STRATEGIES))
        ),
    ] = None,
    rank_multiple: MultipleOption = 1,
    backend: BackendOption = None,
    scale: ScaleOption = None,
    model: Annotated[str | None, typer.Option(help="Also measure the loss of this model.")] = None,
    data: Annotated[str | None, typer.Option(help="Held-out data, as for evaluate.")] = None,
    split: SplitOption = None,
    text_column: TextOption = "text",
    pair_column: PairOption = None,
    label_column: LabelOption = "label",
    examples: ExamplesOption = None,
    max_length: LengthOption = None,
    batch_size: BatchOption = 4,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Show strategies side by side: retained Fisher information, size, gap, and measured loss."""
    if (model is None) != (data is None):
        raise RankoptError("measuring the loss needs both --model and --data")
    source = (
        None
        if data is None
        else Source.read(
            data, split, (text_column, pair_column, label_column), examples, max_length, batch_size
        )
    )
    strategies = [Strategy.parse(text) for text in strategy] if strategy else DEFAULT_STRATEGIES
    loaded_profile = Profile.load(profile)
    rows = list(
        compare(
            loaded_profile,
            keep,
            strategies,
            rank_multiple=rank_multiple,
            backend=backend,
            scale=scale,
        )
    )
    dense = None
    if model is not None and source is not None:
        from rankopt.evaluation import evaluate
        from rankopt.measured import measure_rows

        loaded, batches = source.load(model, dtype)
        dense = evaluate(loaded, batches, layers=loaded_profile.info.layers)
        rows = list(measure_rows(loaded, loaded_profile, rows, batches))
    if as_json:
        found = {"rows": [row.to_dict() for row in rows]}
        if dense is not None:
            found["dense"] = dataclasses.asdict(dense)  # type: ignore[assignment]
        typer.echo(json.dumps(found, indent=1))
    else:
        from rankopt.report import comparison, print_table

        print_table(comparison(rows, dense))


@app.command(
    epilog="Examples:\n\n"
    "rankopt apply ./model plan.json --profile profile.safetensors -o ./smaller\n\n"
    "Load the result with transformers, after `import rankopt`."
)
def apply(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    profile: Annotated[Path, typer.Option(help="The profile that the plan was made from.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model folder to write.")],
    dtype: DtypeOption = "auto",
    allow_other_weights: Annotated[
        bool, typer.Option(help="Accept the same layers with other weights (fine-tuned since).")
    ] = False,
    force: ForceOption = False,
) -> None:
    """Factorise the planned layers and save the smaller model."""
    require_free(output, force)
    loaded_plan, loaded_profile = Plan.load(plan), Profile.load(profile)
    from rankopt.checkpoint import save_model
    from rankopt.models import load_model, load_tokenizer
    from rankopt.surgery import apply_plan

    loaded = load_model(model, dtype)
    apply_plan(loaded, loaded_plan, loaded_profile, allow_other_weights=allow_other_weights)
    try:
        tokenizer = load_tokenizer(model)
    except RankoptError as error:
        tokenizer = None
        _note(f"no tokenizer is saved: {error}")
    save_model(loaded, output, plan=loaded_plan, tokenizer=tokenizer, overwrite=force)
    typer.echo(str(loaded_plan))
    _note(f"model written to {output}: load it with transformers after `import rankopt`")


@app.command(
    "evaluate",
    epilog="Examples:\n\n"
    "rankopt evaluate ./smaller --data heldout.txt\n\n"
    "rankopt evaluate ./bert-sst2 --data dev.tsv --text-column sentence --json",
)
def evaluate_command(
    model: ModelArgument,
    data: DataOption,
    split: SplitOption = None,
    text_column: TextOption = "text",
    pair_column: PairOption = None,
    label_column: LabelOption = "label",
    examples: ExamplesOption = None,
    max_length: LengthOption = None,
    batch_size: BatchOption = 4,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Measure loss, the task's metric and size of a dense or compressed model."""
    source = Source.read(
        data, split, (text_column, pair_column, label_column), examples, max_length, batch_size
    )
    from rankopt.evaluation import evaluate
    from rankopt.report import evaluation, print_table

    loaded, batches = source.load(model, dtype)
    found = evaluate(loaded, batches)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        print_table(evaluation(found))


@app.command(
    cls=SpreadOptions,
    epilog="Examples:\n\n"
    "rankopt demo\n\n"
    "rankopt demo --output /tmp/demo --model ./another-causal-lm",
)
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for everything that is written.")
    ] = Path("demo"),
    model: Annotated[
        Path | None, typer.Option(help="Another causal language model's folder.")
    ] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Budgets; 0.9 and 0.8.")] = None,
    calibration: Annotated[int, typer.Option(help="Windows for the profile.")] = 32,
    held_out: Annotated[int, typer.Option(help="Windows for the measured loss.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    as_json: JsonOption = False,
) -> None:
    """Run the whole job on SmolLM2-135M and Python's own help texts."""
    from rankopt.demo import run_demo
    from rankopt.report import comparison, print_table

    result = run_demo(
        output,
        model_folder=model,
        keeps=tuple(keep or (0.9, 0.8)),
        calibration=calibration,
        held_out=held_out,
        max_length=max_length,
    )
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1))
        return
    print_table(comparison(result.rows, result.dense))
    typer.echo(f"\n{result.plan}")
    typer.echo(f"  reloaded        loss {result.reloaded.loss:.4f} (dense {result.dense.loss:.4f})")
    typer.echo(f"\nbefore: {result.before}\n\nafter:  {result.after}\n")
    typer.echo(f"written to {result.folder}{os.sep}: {', '.join(_written(result.folder))}")


def _written(folder: Path) -> list[str]:
    return sorted(f"{path.name}{os.sep if path.is_dir() else ''}" for path in folder.iterdir())


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def _terminated(number: int, _: object) -> None:
    _note("stopped")
    sys.exit(128 + number)


def main() -> None:
    """Run the command line; mistakes end in one line on stderr and an exit code."""
    if not sys.stderr.isatty():
        # Ours hide themselves; those of transformers and datasets want to be told.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Schedulers send it: what is temporary is removed on the way out, as it is after Ctrl-C.
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except RankoptError as error:
        _note(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _note("stopped")
        sys.exit(130)
