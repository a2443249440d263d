"""The command ``rankopt report``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from rankopt.cli.options import ForceOption, ProfileArgument, note
from rankopt.errors import RankoptError
from rankopt.files import PICTURES, PLAN, RESULTS, format_of, require_file, require_free
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from rankopt.results.results import Results

EXAMPLES = """\b
Examples:
  rankopt report profile.safetensors plan.json -o report.html
  rankopt report profile.safetensors plan.json other.json results.json \\
    -o report.html --against uniform
  rankopt report profile.safetensors plan.json --png figures

Files are plans of the profile and results of its model, in any order. The page
is one file without any network; it needs rankopt[report], and no torch.
"""


def report(
    profile: ProfileArgument,
    files: Annotated[
        list[Path] | None, typer.Argument(help="Plans, and at most one file of results.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Page to write.")] = None,
    png: Annotated[Path | None, typer.Option(help="Folder to write the charts to, as PNG.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Strategy of the results to compare the others with.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Layer to show first; the first plan's worst.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Write a page, or pictures, of a profile, its plans and what was measured of them."""
    if output is None and png is None:
        raise RankoptError("nothing to write: name a page with -o, a folder with --png, or both")
    from rankopt.report.report import is_report, write_pictures, write_report
    from rankopt.report.vega import require_library

    read = (profile, *(files or ()))
    if output is not None:
        require_file(output, is_report, overwrite=force, apart_from=read)
        if output.suffix.lower() not in ("", ".html", ".htm"):
            raise RankoptError(
                f"{output}: the page is HTML, name it {output.with_suffix('.html')}; pictures go "
                "to a folder (--png)"
            )
    if png is not None:
        require_free(png, force, kind=PICTURES, apart_from=(*read, output))
    if format_of(profile) in (PLAN, RESULTS):
        raise RankoptError(f"{profile} is a {format_of(profile)}: name the profile first")
    require_library()
    plans, results = _read(files or [])
    loaded = Profile.load(profile)
    if output is not None:
        write_report(output, loaded, plans, results, against=against, layer=layer)
        note(f"report written to {output}: open it with a browser")
    if png is not None:
        names = write_pictures(png, loaded, plans, results, layer=layer, overwrite=force)
        note(f"pictures written to {png}: {', '.join(names)}")


def _read(files: list[Path]) -> tuple[dict[str, Plan], Results | None]:
    """Plans by a short name, and the results."""
    plans: dict[str, Plan] = {}
    results: Results | None = None
    stems = [file.stem for file in files]
    for file in files:
        if not file.is_file():
            raise RankoptError(f"no file at {file}: a plan or results are wanted")
        kind = format_of(file)
        if kind == PLAN:
            name = file.stem if stems.count(file.stem) == 1 else os.fspath(file)
            if name in plans:
                raise RankoptError(f"{file} is given twice: leave one of the two out")
            plans[name] = Plan.load(file)
        elif kind == RESULTS:
            if results is not None:
                raise RankoptError(f"{file} is a second file of results: give one")
            results = Results.load(file)
        else:
            what = "of no format of rankopt" if kind is None else f"a {kind}"
            raise RankoptError(f"{file} is {what}: plans and results are wanted beside the profile")
    return plans, results
