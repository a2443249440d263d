"""The command ``rankopt evaluate``."""

from typing import Annotated

import typer

from rankopt.cli.data import DataOptions, with_data
from rankopt.cli.options import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    note,
    show_json,
)

EXAMPLES = """\b
Examples:
  rankopt evaluate ./smaller --data heldout.txt
  rankopt evaluate ./smaller --data heldout.txt --also code.txt
  rankopt evaluate ./smaller --data heldout.txt --dense ./model
  rankopt evaluate ./bert-sst2 --data dev.tsv --text-column sentence --json
"""


@with_data()
def evaluate(
    model: ModelArgument,
    asked: DataOptions,
    dense: Annotated[
        str | None,
        typer.Option(
            help="The model that it was compressed from: measures how far it has gone from that."
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Measure loss, the task's metric and size of a dense or compressed model."""
    from rankopt.model.loading import load_model, require_model

    if dense is not None:
        require_model(dense)
    source = asked.read(model)
    from rankopt.apply.refined import refined_on, refinements_of
    from rankopt.cli.tables import evaluation, print_table, reasons_of
    from rankopt.evaluation.evaluation import evaluate as evaluated

    loaded, batches, also = source.load_all(dtype)
    original = None if dense is None else load_model(dense, dtype)
    found = evaluated(loaded, batches, also=also, dense=original)
    refined = refinements_of(loaded)
    if as_json:
        about = {"refined": [each.model_dump() for each in refined]} if refined else {}
        show_json(found.to_dict() | about)
    else:
        print_table(evaluation(found))
    if refined:
        note(f"{model}: {refined_on(refined)}")
    for reason in reasons_of(found, asked.named):
        note(reason)
