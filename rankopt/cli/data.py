"""The data options, written once: what a command is given, and the data read from it."""

import dataclasses
import functools
import inspect
import platform
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from rankopt.cli.options import note
from rankopt.errors import DataError, OptionError

if TYPE_CHECKING:
    from rankopt.data.rows import DataSource
    from rankopt.model.tasks import Batch

_HELP = (
    ".txt, .json, .jsonl, .tsv, .csv, .parquet or .arrow file (or packed: .jsonl.gz), a folder, or "
    "a data set NAME[:CONFIG]."
)


_EACH = "Given once it is of all sources, else once for each."
_ALSO = (
    "Another domain, measured beside: as --data. If not given, language models are also measured "
    "on python-help, 16 windows of Python's help texts."
)
#: Of one of several files; empty is as if it were not given.
MAY_BE_EMPTY = ("--split", "--text-column", "--pair-column", "--label-column")
#: Given once for each source: what stands behind their value may be the model.
REPEATED = ("--data", "--also", *MAY_BE_EMPTY)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """One field for each option: its name, kind, default and help."""

    data: Annotated[tuple[str, ...], typer.Option("--data", help=_HELP)] = ()
    weight: Annotated[
        tuple[float, ...],
        typer.Option(
            help="Of each --data: shares of the examples, in their order; equal if not given."
        ),
    ] = ()
    also: Annotated[tuple[str, ...], typer.Option("--also", help=_ALSO)] = ()
    no_also: Annotated[
        bool, typer.Option("--no-also", help="Measure on --data alone, not on python-help.")
    ] = False
    split: Annotated[
        tuple[str, ...], typer.Option(help=f"Split of a data set (train). {_EACH}")
    ] = ()
    text_column: Annotated[
        tuple[str, ...],
        typer.Option(help="Column of the text, the chat messages, or the list of words."),
    ] = ("text",)
    pair_column: Annotated[tuple[str, ...], typer.Option(help="Column of a second text.")] = ()
    label_column: Annotated[
        tuple[str, ...], typer.Option(help="Column of the label; language models have none.")
    ] = ("label",)
    examples: Annotated[
        int | None,
        typer.Option(
            help="Windows or rows to take, at equal distances; all if not given. Of a mixture "
            "in all, of another domain as many."
        ),
    ] = None
    resample: Annotated[
        int | None,
        typer.Option(
            help="Seed: draw the examples at random, with replacement, instead of at equal "
            "distances: another sample of the data, to see what depends on it."
        ),
    ] = None
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window, or at most of a row; 256, or what the model can take."
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(help="Windows or rows at a time.")] = 4

    @property
    def named(self) -> str:
        """All data, for messages."""
        return ", ".join(self.data)

    def read(self, model: str) -> "Source":
        """Read the rows and look for the columns of the texts, if there may be such a model.

        Raises:
            ModelError: there cannot.
            DataError: no such data, split or column.
            OptionError: options of another number of sources than there are.
        """
        from rankopt.data.domains import PYTHON_HELP
        from rankopt.data.rows import require_columns
        from rankopt.model.loading import require_model

        assert self.data, "a command that can do without data looks first"
        if self.weight and len(self.data) == 1:
            raise OptionError("--weight belongs to several --data: add one, or leave --weight out")
        if self.also and self.no_also:
            raise OptionError("--no-also does not go with --also: leave one of the two out")
        # Before the data: where the two are swapped, it is this that tells.
        require_model(model)
        sources = []
        for each in self._sources([name for name in self.also if name != PYTHON_HELP]):
            each = dataclasses.replace(each, rows=each.read())
            require_columns(each.source, each.read(), each.columns.text, each.columns.pair)
            sources.append(each)
        count = len(self.data)
        return Source(model, self, tuple(sources[:count]), tuple(sources[count:]))

    def _sources(self, also: Sequence[str]) -> "Iterator[DataSource]":
        from rankopt.data.rows import Columns, DataSource

        names = (*self.data, *also)
        split, text, pair, label = (
            self._for_each(option, len(names))
            for option in ("split", "text_column", "pair_column", "label_column")
        )
        for n, name in enumerate(names):
            columns = Columns(text[n] or "text", pair[n], label[n] or "label")
            yield DataSource(name, columns, split[n])

    def _for_each(self, option: str, sources: int) -> list[str | None]:
        given = getattr(self, option) or ("",)
        if len(given) not in (1, sources):
            name = f"--{option.replace('_', '-')}"
            raise OptionError(
                f"{name} is given {len(given)} times for {sources} sources: give it once for all, "
                "or once for each ('' for its default)"
            )
        return [each or None for each in (given * sources if len(given) == 1 else given)]


#: Parameters that say how data is read: they do nothing without data.
READING = tuple(field.name for field in dataclasses.fields(DataOptions) if field.name != "data")
_OTHERS, _MIXED = ("also", "no_also"), ("weight", "resample")
_DEFAULTS = DataOptions()
_KINDS = get_type_hints(DataOptions, include_extras=True)
_SEVERAL = tuple(name for name, kind in _KINDS.items() if get_origin(kind.__origin__) is tuple)


@dataclasses.dataclass(frozen=True)
class Source:
    """Data that was read before the model it is for: a wrong column is found early.

    Attributes:
        model: its folder or hub name.
        asked: how it was to be read.
        data: sources, with their rows.
        also: the same of other domains.
    """

    model: str
    asked: DataOptions
    data: "tuple[DataSource, ...]"
    also: "tuple[DataSource, ...]" = ()

    def load(self, dtype: str, device_map: str | None = None) -> "tuple[Any, Sequence[Batch]]":
        """The model, and the data tokenised for its task; windows as long as the model allows.

        Raises:
            ModelError: no such model.
            DataError: more tokens than the model takes, or data that does not fit the task.
        """
        reader = _Reader.of(self, dtype, device_map)
        return reader.model, reader.batches(self.data)

    def load_all(self, dtype: str) -> "tuple[Any, Sequence[Batch], dict[str, Sequence[Batch]]]":
        """The same, and the data of other domains, by name; see load."""
        from rankopt.data.domains import HELP_WINDOWS, PYTHON_HELP, python_help

        reader = _Reader.of(self, dtype)
        batches = reader.batches(self.data)
        also = {}
        for name, each in zip(_short(self.also), self.also, strict=True):
            also[name] = reader.batches([each])
        asked = self.asked
        if PYTHON_HELP in asked.also or not (asked.also or asked.no_also or reader.of_rows):
            length = reader.max_length
            try:
                if reader.of_rows:
                    raise DataError("it has no labels: language models alone are measured on it")
                found = python_help(reader.tokenizer, length, asked.batch_size)
                also[PYTHON_HELP] = reader.fitted(found)
                note(
                    f"{PYTHON_HELP}: {HELP_WINDOWS} windows of {length} tokens, Python "
                    f"{platform.python_version()}"
                )
            except DataError as error:
                if PYTHON_HELP in asked.also:
                    raise DataError(f"{PYTHON_HELP}: {error}") from error
                note(f"{PYTHON_HELP} is left out: {error}")
        return reader.model, batches, also


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Model and tokenizer, fitted to each other, and what they make of sources."""

    asked: DataOptions
    model: Any
    tokenizer: Any
    task: str
    max_length: int

    @classmethod
    def of(cls, source: Source, dtype: str, device_map: str | None = None) -> "_Reader":
        from rankopt.data.fitting import fit_length, fit_padding
        from rankopt.model.loading import hide_bars, load_model, load_tokenizer
        from rankopt.model.tasks import task_of

        hide_bars()
        model = load_model(source.model, dtype, device_map)
        tokenizer, task = load_tokenizer(source.model), task_of(model)
        if task != "causal-lm":
            fit_padding(model, tokenizer, source.asked.batch_size)
        length = fit_length(model, tokenizer, source.asked.max_length)
        return cls(source.asked, model, tokenizer, task, length)

    @property
    def of_rows(self) -> bool:
        return self.task != "causal-lm"

    def batches(self, sources: "Sequence[DataSource]") -> "Sequence[Batch]":
        from rankopt.data.batches import load_batches
        from rankopt.data.mixtures import load_mixture

        how: dict[str, Any] = {
            "max_length": self.max_length,
            "batch_size": self.asked.batch_size,
            "examples": self.asked.examples,
            "resample": self.asked.resample,
            "label2id": {str(k): int(v) for k, v in (self.model.config.label2id or {}).items()},
        }
        if len(sources) > 1:
            weights = self.asked.weight or None
            mixed = load_mixture(sources, self.tokenizer, self.task, weights=weights, **how)
            note(f"data: {mixed}")
            return dataclasses.replace(mixed, batches=self.fitted(mixed.batches))
        (one,) = sources
        how |= {"columns": one.columns, "split": one.split, "rows": one.rows}
        return self.fitted(load_batches(one.source, self.tokenizer, self.task, **how))

    def fitted(self, batches: "Sequence[Batch]") -> "list[Batch]":
        from rankopt.data.fitting import fit_batches

        return fit_batches(self.model, self.tokenizer, list(batches))


def _short(sources: "Sequence[DataSource]") -> list[str]:
    """The last part of every path, or the whole where two end alike."""
    ends = [Path(each.source).name or each.source for each in sources]
    if len(set(ends)) == len(ends):
        return ends
    return [each.source for each in sources]


def with_data(
    *,
    needed: bool = True,
    about: str | None = None,
    examples: int | None = None,
    batch_size: int = 4,
    mixed: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the data options in the place of its parameter of type DataOptions.

    Args:
        needed: --data must be given.
        about: the help of --data, if it is not the usual one.
        examples: default of --examples.
        batch_size: default of --batch-size.
        mixed: several --data are one mixture; else --data is one, and --also are others beside it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        (asked,) = (each.name for each in own if each.annotation is DataOptions)
        options = list(_parameters(needed, about, examples, batch_size, mixed))

        @functools.wraps(command)
        def called(**given: Any) -> None:
            found: dict[str, Any] = {option.name: given.pop(option.name) for option in options}
            found |= {name: tuple(found[name] or ()) for name in _SEVERAL if name in found}
            data = DataOptions(**found)
            if len(data.data) > 1 and not mixed:
                raise OptionError(
                    f"--data is given {len(data.data)} times: what is measured is one; --also FILE "
                    "measures another beside it"
                )
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
    needed: bool, about: str | None, examples: int | None, batch_size: int, mixed: bool
) -> Iterator[inspect.Parameter]:
    for field in dataclasses.fields(DataOptions):
        kind: Any = _KINDS[field.name]
        default: Any = field.default
        if field.name in (_OTHERS if mixed else _MIXED):
            continue
        if field.name in _SEVERAL:
            # The command line gives lists, and None for none.
            value, _ = get_args(kind.__origin__)
            kind = Annotated[types.GenericAlias(list, value) | None, kind.__metadata__[0]]
            default = list(getattr(_DEFAULTS, field.name)) or None
        if field.name == "data":
            several = " Several: a mixture, see --weight." if mixed else ""
            option = typer.Option("--data", help=f"{about or _HELP}{several}")
            kind = Annotated[list[str] if needed else list[str] | None, option]
            default = inspect.Parameter.empty if needed else None
        elif field.name == "examples":
            default = examples
        elif field.name == "batch_size":
            default = batch_size
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
        )
