"""The command line: data on stdout, progress on stderr, one line and an exit code for mistakes.

Exit codes: 0 done, 2 a mistake in what was given, 3 a budget that no ranks fit.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from rankopt._version import __version__
from rankopt.compare import DEFAULT_STRATEGIES, Strategy, compare
from rankopt.errors import RankoptError
from rankopt.files import require_free
from rankopt.plan import Plan
from rankopt.planning import known_solvers, make_plan
from rankopt.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rankopt.data import Row as DataRow
    from rankopt.tasks import Batch

app = typer.Typer(
    help="Decide how many ranks each layer of a neural network deserves.\n\n"
    "profile -> plan -> apply -> evaluate; compare shows strategies side by side.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _SpreadOptions(TyperCommand):
    """Lets a repeatable option take several values: ``--keep 0.9 0.8`` is two of it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {
            name
            for param in self.params
            if isinstance(param, TyperOption) and param.multiple
            for name in param.opts
        }
        spread: list[str] = []
        current: str | None = None
        for position, arg in enumerate(args):
            if current is not None and not arg.startswith("-") and self._fits(current, arg):
                if args[position - 1] != current:
                    spread.append(current)
            else:
                current = arg if arg in repeatable else None
            spread.append(arg)
        return super().parse_args(ctx, spread)

    @staticmethod
    def _fits(option: str, value: str) -> bool:
        if option != "--keep":
            return not Path(value).exists()
        try:
            float(value)
        except ValueError:
            return False
        return True


ModelArgument = Annotated[str, typer.Argument(help="A model folder or a hub name.")]
ProfileArgument = Annotated[Path, typer.Argument(help="A profile file.")]
DataOption = Annotated[
    str,
    typer.Option("--data", help=".txt, .jsonl, .tsv or .csv file, or a data set NAME[:CONFIG]."),
]
SplitOption = Annotated[str | None, typer.Option(help="Split of a data set (train).")]
TextOption = Annotated[str, typer.Option(help="Column of the text, or of the list of words.")]
PairOption = Annotated[str | None, typer.Option(help="Column of a second text.")]
LabelOption = Annotated[str, typer.Option(help="Column of the label; language models have none.")]
ExamplesOption = Annotated[
    int | None, typer.Option(help="Windows or rows to take, at equal distances; all if not given.")
]
LengthOption = Annotated[
    int | None,
    typer.Option(help="Tokens of a window, or at most of a row; 256, or what the model can take."),
]
BatchOption = Annotated[int, typer.Option(help="Windows or rows at a time.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
BackendOption = Annotated[str | None, typer.Option(help="Whose spectra; the profile's first.")]
ScaleOption = Annotated[str | None, typer.Option(help="How layers compare: nats or sum (fwsvd).")]
MultipleOption = Annotated[int, typer.Option(help="Offer only multiples of this rank.")]


def _batches(
    source: str,
    model: Any,
    model_name: str,
    *,
    rows: "Sequence[DataRow]",
    columns: tuple[str, str | None, str],
    max_length: int | None,
    batch_size: int,
    examples: int | None,
) -> "list[Batch]":
    from rankopt.data import Columns, load_batches
    from rankopt.errors import DataError
    from rankopt.models import load_tokenizer, longest_input
    from rankopt.tasks import task_of

    longest = longest_input(model)
    if max_length is None:
        max_length = min(256, longest or 256)
    elif longest is not None and max_length > longest:
        raise DataError(f"--max-length {max_length}: the model takes at most {longest} tokens")
    return load_batches(
        source,
        load_tokenizer(model_name),
        task_of(model),
        columns=Columns(*columns),
        max_length=max_length,
        batch_size=batch_size,
        examples=examples,
        label2id={str(k): int(v) for k, v in (model.config.label2id or {}).items()},
        rows=rows,
    )


def _rows(source: str, split: str | None, *columns: str | None) -> "Sequence[DataRow]":
    """Read data and find a missing column before a model is loaded."""
    from rankopt.data import read_rows, require_columns

    rows = read_rows(source, split)
    require_columns(source, rows, *columns)
    return rows


def _writable(path: Path, force: bool) -> None:
    """Refuse before the long work, not after it."""
    if path.is_dir():
        raise RankoptError(f"{path} is a folder: name a file")
    if path.exists() and not force:
        raise RankoptError(f"{path} exists: name another file, or replace it with --force")
    if not path.absolute().parent.is_dir():
        raise RankoptError(f"cannot write {path}: the folder {path.parent} does not exist")


def _note(text: str) -> None:
    typer.echo(text, err=True)


@app.command(
    cls=_SpreadOptions,
    epilog="Examples:\n\n"
    "rankopt profile ./model --data train.txt -o profile.safetensors\n\n"
    "rankopt profile ./bert-sst2 --data train.tsv --text-column sentence --examples 512 -o p.st\n\n"
    "rankopt profile gpt2 --data Salesforce/wikitext:wikitext-2-raw-v1 --examples 64 -o p.st",
)
def profile(
    model: ModelArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="Profile to write.")],
    split: SplitOption = None,
    text_column: TextOption = "text",
    pair_column: PairOption = None,
    label_column: LabelOption = "label",
    examples: ExamplesOption = 256,
    max_length: LengthOption = None,
    batch_size: BatchOption = 4,
    backend: Annotated[
        list[str] | None, typer.Option(help="fwsvd (default) or svd, or both.")
    ] = None,
    dtype: DtypeOption = "float32",
    bases: Annotated[
        bool, typer.Option(help="Keep singular vectors: a larger file, a faster apply.")
    ] = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what every rank of every layer retains."""
    _writable(output, force)
    rows = _rows(data, split, text_column, pair_column)
    from rankopt.measure import profile_model
    from rankopt.models import load_model
    from rankopt.report import profile_summary

    loaded = load_model(model, dtype)
    batches = _batches(
        data,
        loaded,
        model,
        rows=rows,
        columns=(text_column, pair_column, label_column),
        max_length=max_length,
        batch_size=batch_size,
        examples=examples,
    )
    found = profile_model(loaded, batches, backends=tuple(backend or ["fwsvd"]), keep_bases=bases)
    found.save(output)
    typer.echo(found.info.model_dump_json() if as_json else profile_summary(found))
    _note(f"profile written to {output} ({output.stat().st_size / 2**20:.1f} MiB)")


@app.command(
    epilog="Examples:\n\n"
    "rankopt plan profile.safetensors --keep 0.8 -o plan.json\n\n"
    "rankopt plan profile.safetensors --keep-total 0.7 --solver knapsack --rank-multiple 8\n\n"
    "rankopt plan profile.safetensors --solver threshold --share 0.95\n\n"
    "Without -o the plan is printed. Solvers: " + ", ".join(known_solvers()) + "."
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
    solver: Annotated[str, typer.Option(help=", ".join(known_solvers()))] = "greedy",
    objective: Annotated[str, typer.Option(help="total, layerwise or maxmin.")] = "total",
    rank_multiple: MultipleOption = 1,
    backend: BackendOption = None,
    scale: ScaleOption = None,
    share: Annotated[
        float | None, typer.Option(help="threshold: retained share of every layer.")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="knapsack: seconds for the integer program (30).")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Plan to write.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decide the rank of every layer under a budget."""
    if output is not None:
        _writable(output, force)
    made = make_plan(
        Profile.load(profile),
        keep=keep,
        keep_total=keep_total,
        max_params=max_params,
        solver=solver,
        objective=objective,  # type: ignore[arg-type]
        rank_multiple=rank_multiple,
        backend=backend,
        scale=scale,
        share=share,
        **({} if time_limit is None else {"time_limit": time_limit}),
    )
    if output is not None:
        made.save(output)
        _note(f"plan written to {output}")
    typer.echo(made.to_json() if as_json else str(made))


@app.command(
    "compare",
    cls=_SpreadOptions,
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
            help="SOLVER or SOLVER/OBJECTIVE; if not given: "
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
    data_rows = [] if data is None else _rows(data, split, text_column, pair_column)
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
    if model is not None and data is not None:
        from rankopt.evaluation import evaluate
        from rankopt.measured import measure_rows
        from rankopt.models import load_model

        loaded = load_model(model, dtype)
        batches = _batches(
            data,
            loaded,
            model,
            rows=data_rows,
            columns=(text_column, pair_column, label_column),
            max_length=max_length,
            batch_size=batch_size,
            examples=examples,
        )
        dense = evaluate(loaded, batches)
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
    rows = _rows(data, split, text_column, pair_column)
    from rankopt.evaluation import evaluate
    from rankopt.models import load_model
    from rankopt.report import evaluation, print_table

    loaded = load_model(model, dtype)
    batches = _batches(
        data,
        loaded,
        model,
        rows=rows,
        columns=(text_column, pair_column, label_column),
        max_length=max_length,
        batch_size=batch_size,
        examples=examples,
    )
    found = evaluate(loaded, batches)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        print_table(evaluation(found))


@app.command(
    cls=_SpreadOptions,
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


def main() -> None:
    """Run the command line; mistakes end in one line on stderr and an exit code."""
    if not sys.stderr.isatty():
        # Ours hide themselves; those of transformers and datasets want to be told.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except RankoptError as error:
        _note(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _note("stopped")
        sys.exit(130)
