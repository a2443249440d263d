"""The command ``rankopt evaluate``."""

import dataclasses
import json

import typer

from rankopt.cli.options import (
    BatchOption,
    DataOption,
    DtypeOption,
    ExamplesOption,
    JsonOption,
    LabelOption,
    LengthOption,
    ModelArgument,
    PairOption,
    Source,
    SplitOption,
    TextOption,
)

EXAMPLES = """\b
Examples:
  rankopt evaluate ./smaller --data heldout.txt
  rankopt evaluate ./bert-sst2 --data dev.tsv --text-column sentence --json
"""


def evaluate(
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
        model,
        data,
        split,
        (text_column, pair_column, label_column),
        examples,
        max_length,
        batch_size,
    )
    from rankopt.cli.report import evaluation, print_table
    from rankopt.evaluation.evaluation import evaluate as evaluated

    loaded, batches = source.load(model, dtype)
    found = evaluated(loaded, batches)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        print_table(evaluation(found))
