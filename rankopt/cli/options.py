"""What commands of the command line share: options, and checks before long work."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rankopt.errors import RankoptError

ModelArgument = Annotated[str, typer.Argument(help="A model folder or a hub name.")]
ProfileArgument = Annotated[Path, typer.Argument(help="A profile file.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
WideOption = Annotated[
    bool, typer.Option("--wide", help="All columns of the table, however narrow the terminal.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
BackendOption = Annotated[str | None, typer.Option(help="Whose spectra; the profile's first.")]
ScaleOption = Annotated[str | None, typer.Option(help="How layers compare; the backend's first.")]
MultipleOption = Annotated[int, typer.Option(help="Offer only multiples of this rank.")]


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
