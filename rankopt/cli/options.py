"""What commands of the command line share: options, and checks before long work."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import typer

from rankopt.errors import NotFiniteError, OptionError, RankoptError, printable
from rankopt.progress import Quiet
from rankopt.schema import finite

ModelArgument = Annotated[str, typer.Argument(help="A model folder or a hub name.")]
ProfileArgument = Annotated[Path, typer.Argument(help="A profile file.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
WideOption = Annotated[
    bool, typer.Option("--wide", help="All columns of the table, however narrow the terminal.")
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Read and check everything, say what would be done, write nothing."
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
BackendOption = Annotated[str | None, typer.Option(help="Whose spectra; the profile's first.")]
ScaleOption = Annotated[
    str | None,
    typer.Option(help="kronecker, nats, sum ...: how layers compare; the backend's first."),
]
FormOption = Annotated[
    str | None, typer.Option(help="pairs or pivoted: how a low rank is kept; the profile's.")
]
PinOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pin", help="GLOB=RANK or GLOB=dense: your own choice for these layers; repeatable."
    ),
]
MultipleOption = Annotated[int, typer.Option(help="Offer only multiples of this rank.")]


class Verbose:
    """Whether an error also shows where it comes from, for the report of a fault."""

    on = False


def talk(*, quiet: bool, verbose: bool) -> None:
    """How much is said from now on, by transformers and datasets, too."""
    Quiet.on, Verbose.on = quiet, verbose
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def note(text: str) -> None:
    """A line on stderr that says what was done, unless it is to be quiet."""
    if not Quiet.on:
        tell(text)


def tell(text: str) -> None:
    """A line on stderr in any case."""
    typer.echo(printable(text), err=True)


def show(text: str) -> None:
    """A text of one or more lines on stdout."""
    typer.echo(printable(text, "\n\t"))


@contextlib.contextmanager
def naming(data: str) -> Iterator[None]:
    """Say on which data the dense model's loss is not finite."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{data}: {error}") from error


def show_json(value: object, *, indent: int | None = 1) -> None:
    """JSON on stdout: null where a number is not finite."""
    typer.echo(json.dumps(finite(value), indent=indent, allow_nan=False))


def pins_of(given: Sequence[str] | None) -> "dict[str, int | Literal['dense']]":
    """``--pin`` as make_plan takes it.

    Raises:
        OptionError: neither GLOB=RANK nor GLOB=dense.
    """
    found: dict[str, int | Literal["dense"]] = {}
    for text in given or ():
        pattern, _, rank = text.rpartition("=")
        if not pattern or (rank != "dense" and not rank.isdecimal()):
            raise OptionError(f"--pin takes GLOB=RANK or GLOB=dense, not {text!r}")
        found.pop(pattern, None)  # the last decides, wherever the first stood
        found[pattern] = "dense" if rank == "dense" else int(rank)
    return found


#: Names of multiples; of bytes there are binary ones, too.
_MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BYTES = {
    f"{prefix}{binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("kMGT", 1)
    for binary in ("", "i")
} | {"": 1, "B": 1}
_TIMES = {"": 1, "us": 1, "ms": 10**3, "s": 10**6}


def bytes_of(text: str | None) -> int | None:
    """``--max-bytes``: 1500, 200MB, 1.5GiB.

    Raises:
        OptionError: no such number of bytes.
    """
    return None if text is None else _number("--max-bytes", text, _BYTES)


def flops_of(text: str | None) -> int | None:
    """``--max-flops``: 85000, 1.5G.

    Raises:
        OptionError: no such number.
    """
    return None if text is None else _number("--max-flops", text, _MULTIPLES)


def microseconds_of(text: str | None) -> float | None:
    """``--max-latency``: 850, 1.2ms.

    Raises:
        OptionError: no such time.
    """
    return None if text is None else float(_fraction("--max-latency", text, _TIMES))


def _number(option: str, text: str, units: Mapping[str, int]) -> int:
    """Rounded down."""
    found = _fraction(option, text, units)
    if 0 < found < 1:
        raise OptionError(f"{option} takes 1 or more, not {text!r}")
    return math.floor(found)


def _fraction(option: str, text: str, units: Mapping[str, int]) -> Fraction:
    found = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+]?[0-9]{1,2})?) ?([A-Za-z]*)", text)
    # Small and large letters are told apart for nobody's sake: KB and kB are the same.
    known = {name.lower(): number for name, number in units.items()}
    if found is None or found[2].lower() not in known or len(text) > 40:
        named = ", ".join(name for name in units if name)
        raise OptionError(f"{option} takes a number, or one with {named}; not {text!r}")
    return Fraction(found[1].replace("_", "")) * known[found[2].lower()]


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
