"""What commands of the command line share: options, data, and checks before long work."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rankopt.errors import RankoptError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rankopt.data.rows import Row as DataRow
    from rankopt.model.tasks import Batch


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
#: Parameters that say how data is read: they do nothing without data.
READING = (
    "split",
    "text_column",
    "pair_column",
    "label_column",
    "examples",
    "max_length",
    "batch_size",
)
WideOption = Annotated[
    bool, typer.Option("--wide", help="All columns of the table, however narrow the terminal.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
BackendOption = Annotated[str | None, typer.Option(help="Whose spectra; the profile's first.")]
ScaleOption = Annotated[str | None, typer.Option(help="How layers compare; the backend's first.")]
MultipleOption = Annotated[int, typer.Option(help="Offer only multiples of this rank.")]


@dataclasses.dataclass(frozen=True)
class Source:
    """Data that was read before the model it is for: a wrong column is found early.

    Attributes:
        data: file or name of a data set.
        rows: of it.
        columns: of the text, the second text and the label.
        examples, max_length, batch_size: as on the command line.
    """

    data: str
    rows: "Sequence[DataRow]"
    columns: tuple[str, str | None, str]
    examples: int | None
    max_length: int | None
    batch_size: int

    @classmethod
    def read(
        cls,
        model: str,
        data: str,
        split: str | None,
        columns: tuple[str, str | None, str],
        examples: int | None,
        max_length: int | None,
        batch_size: int,
    ) -> "Source":
        """Read the rows and look for the columns of the texts, if there may be such a model.

        Raises:
            ModelError: there cannot.
            DataError: no such data, split or column.
        """
        from rankopt.data.rows import read_rows, require_columns
        from rankopt.model.loading import require_model

        # Before the data: where the two are swapped, it is this that tells.
        require_model(model)
        rows = read_rows(data, split)
        require_columns(data, rows, *columns[:2])
        return cls(data, rows, columns, examples, max_length, batch_size)

    def load(
        self, name: str, dtype: str, device_map: str | None = None
    ) -> "tuple[Any, list[Batch]]":
        """The model, and the data tokenised for its task; windows as long as the model allows.

        Raises:
            ModelError: no such model.
            DataError: more tokens than the model takes, or data that does not fit the task.
        """
        from rankopt.data.batches import load_batches
        from rankopt.data.rows import Columns
        from rankopt.errors import DataError
        from rankopt.model.loading import hide_bars, load_model, load_tokenizer, longest_input
        from rankopt.model.tasks import task_of

        hide_bars()
        model = load_model(name, dtype, device_map)
        longest, max_length = longest_input(model), self.max_length
        if max_length is None:
            max_length = min(256, longest or 256)
        elif longest is not None and max_length > longest:
            raise DataError(f"--max-length {max_length}: the model takes at most {longest} tokens")
        batches = load_batches(
            self.data,
            load_tokenizer(name),
            task_of(model),
            columns=Columns(*self.columns),
            max_length=max_length,
            batch_size=self.batch_size,
            examples=self.examples,
            label2id={str(k): int(v) for k, v in (model.config.label2id or {}).items()},
            rows=self.rows,
        )
        return model, batches


def note(text: str) -> None:
    """A line on stderr."""
    typer.echo(text, err=True)


def require_writable(path: Path, force: bool) -> None:
    """Refuse before the long work, not after it."""
    if path.is_dir():
        raise RankoptError(f"{path} is a folder: name a file")
    if path.exists() and not force:
        raise RankoptError(f"{path} exists: name another file, or replace it with --force")
    if not path.absolute().parent.is_dir():
        raise RankoptError(f"cannot write {path}: the folder {path.parent} does not exist")


def floor_of(text: str | None) -> "float | Literal['best'] | None":
    """``--min-retained`` as make_plan takes it.

    Raises:
        RankoptError: neither a number nor "best".
    """
    if text is None or text == "best":
        return text  # type: ignore[return-value]
    try:
        return float(text)
    except ValueError:
        raise RankoptError(f"--min-retained must be a number or best, got {text!r}") from None
