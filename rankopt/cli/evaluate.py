"""The command ``rankopt evaluate``."""

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
  rankopt evaluate ./bert-sst2 --data dev.tsv --text-column sentence --json
"""


@with_data()
def evaluate(
    model: ModelArgument,
    asked: DataOptions,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Measure loss, the task's metric and size of a dense or compressed model."""
    source = asked.read(model)
    from rankopt.cli.report import evaluation, print_table, reasons_of
    from rankopt.evaluation.evaluation import evaluate as evaluated

    loaded, batches, also = source.load_all(dtype)
    found = evaluated(loaded, batches, also=also)
    if as_json:
        show_json(found.to_dict())
    else:
        print_table(evaluation(found))
    for reason in reasons_of(found, asked.named):
        note(reason)
