"""The data options, written once: what a command is given, and the data read from it."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from rankopt.data.rows import Row as DataRow
    from rankopt.model.tasks import Batch

_HELP = (
    ".txt, .json, .jsonl, .tsv, .csv, .parquet or .arrow file (or packed: .jsonl.gz), a folder, or "
    "a data set NAME[:CONFIG]."
)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """One field for each option: its name, kind, default and help."""

    data: Annotated[str | None, typer.Option("--data", help=_HELP)] = None
    split: Annotated[str | None, typer.Option(help="Split of a data set (train).")] = None
    text_column: Annotated[
        str, typer.Option(help="Column of the text, the chat messages, or the list of words.")
    ] = "text"
    pair_column: Annotated[str | None, typer.Option(help="Column of a second text.")] = None
    label_column: Annotated[
        str, typer.Option(help="Column of the label; language models have none.")
    ] = "label"
    examples: Annotated[
        int | None,
        typer.Option(help="Windows or rows to take, at equal distances; all if not given."),
    ] = None
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window, or at most of a row; 256, or what the model can take."
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(help="Windows or rows at a time.")] = 4

    def read(self, model: str) -> "Source":
        """Read the rows and look for the columns of the texts, if there may be such a model.

        Raises:
            ModelError: there cannot.
            DataError: no such data, split or column.
        """
        from rankopt.data.rows import read_rows, require_columns
        from rankopt.model.loading import require_model

        assert self.data is not None, "a command that can do without data looks first"
        # Before the data: where the two are swapped, it is this that tells.
        require_model(model)
        rows = read_rows(self.data, self.split)
        require_columns(self.data, rows, self.text_column, self.pair_column)
        return Source(model, self, rows)


#: Parameters that say how data is read: they do nothing without data.
READING = tuple(field.name for field in dataclasses.fields(DataOptions) if field.name != "data")


@dataclasses.dataclass(frozen=True)
class Source:
    """Data that was read before the model it is for: a wrong column is found early.

    Attributes:
        model: its folder or hub name.
        asked: how it was to be read.
        rows: of the data.
    """

    model: str
    asked: DataOptions
    rows: "Sequence[DataRow]"

    def load(self, dtype: str, device_map: str | None = None) -> "tuple[Any, list[Batch]]":
        """The model, and the data tokenised for its task; windows as long as the model allows.

        Raises:
            ModelError: no such model.
            DataError: more tokens than the model takes, or data that does not fit the task.
        """
        from rankopt.data.batches import load_batches
        from rankopt.data.fitting import fit_batches, fit_length, fit_padding
        from rankopt.data.rows import Columns
        from rankopt.model.loading import hide_bars, load_model, load_tokenizer
        from rankopt.model.tasks import task_of

        hide_bars()
        asked = self.asked
        model = load_model(self.model, dtype, device_map)
        tokenizer, task = load_tokenizer(self.model), task_of(model)
        if task != "causal-lm":
            fit_padding(model, tokenizer, asked.batch_size)
        batches = load_batches(
            str(asked.data),
            tokenizer,
            task,
            columns=Columns(asked.text_column, asked.pair_column, asked.label_column),
            max_length=fit_length(model, tokenizer, asked.max_length),
            batch_size=asked.batch_size,
            examples=asked.examples,
            label2id={str(k): int(v) for k, v in (model.config.label2id or {}).items()},
            rows=self.rows,
        )
        return model, fit_batches(model, tokenizer, batches)


def with_data(
    *, needed: bool = True, about: str | None = None, examples: int | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the data options in the place of its parameter of type DataOptions.

    Args:
        needed: --data must be given.
        about: the help of --data, if it is not the usual one.
        examples: default of --examples.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        (asked,) = (each.name for each in own if each.annotation is DataOptions)
        options = list(_parameters(needed, about, examples))

        @functools.wraps(command)
        def called(**given: Any) -> None:
            data = DataOptions(**{option.name: given.pop(option.name) for option in options})
            command(**given, **{asked: data})

        spread: list[inspect.Parameter] = []
        for each in own:
            spread += options if each.name == asked else [each]
        # By name only: an option without a default may stand behind one that has one.
        named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in spread]
        called.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        called.__annotations__ = {each.name: each.annotation for each in named}
        return called

    return decorate


def _parameters(
    needed: bool, about: str | None, examples: int | None
) -> Iterator[inspect.Parameter]:
    kinds = get_type_hints(DataOptions, include_extras=True)
    for field in dataclasses.fields(DataOptions):
        kind, default = kinds[field.name], field.default
        if field.name == "data":
            value, default = (str, inspect.Parameter.empty) if needed else (str | None, None)
            kind = Annotated[value, typer.Option("--data", help=about or _HELP)]
        elif field.name == "examples":
            default = examples
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
        )
