"""The command line: data on stdout, progress on stderr, one line and an exit code for mistakes.

Exit codes: 0 done (also where whoever read stdout had seen enough), 2 a mistake in what was given,
or the system refuses to read or write (disk full, permission denied, read-only, quota), 3 a budget
that no ranks fit, 130 and 143 stopped by Ctrl-C and by SIGTERM.
"""

import os
import signal
import sys
import traceback
from typing import Annotated

import typer

from rankopt._version import __version__
from rankopt.cli.command import QUIET, VERBOSE, Command
from rankopt.cli.commands import (
    apply,
    compare,
    demo,
    doctor,
    evaluate,
    export,
    import_,
    plan,
    profile,
    refine,
    report,
    schema,
)
from rankopt.cli.options import Verbose, talk, tell
from rankopt.errors import RankoptError

app = typer.Typer(
    help="Decide how many ranks each layer of a neural network deserves.\n\n"
    "profile -> plan -> apply -> refine -> evaluate; compare shows strategies side by side, "
    "report all of it on one page.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command(cls=Command, epilog=profile.EXAMPLES)(profile.profile)
app.command(cls=Command, epilog=plan.EXAMPLES)(plan.plan)
app.command(cls=Command, epilog=compare.EXAMPLES)(compare.compare)
app.command(cls=Command, epilog=apply.EXAMPLES)(apply.apply)
app.command(cls=Command, epilog=refine.EXAMPLES)(refine.refine)
app.command(cls=Command, epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(cls=Command, epilog=report.EXAMPLES)(report.report)
app.command(cls=Command, epilog=demo.EXAMPLES)(demo.demo)
app.command(cls=Command, epilog=export.EXAMPLES)(export.export)
app.command("import", cls=Command, epilog=import_.EXAMPLES)(import_.import_)
app.command(cls=Command, epilog=doctor.EXAMPLES)(doctor.doctor)
app.command(cls=Command, epilog=schema.EXAMPLES)(schema.schema)


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
    quiet: Annotated[
        bool,
        typer.Option(*QUIET, help="Results, warnings and errors only; no bars or notes."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option(*VERBOSE, help="Show where an error comes from.")
    ] = False,
) -> None:
    talk(quiet=quiet, verbose=verbose)


def _terminated(number: int, _: object) -> None:
    tell("stopped")
    sys.exit(128 + number)


def main() -> None:
    """Run the command line; mistakes end in one line on stderr and an exit code."""
    if not sys.stderr.isatty():
        # Ours hide themselves; those of transformers and datasets want to be told.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Torch's threads wait for each other busily, thirty times as long as this: on a machine
        # that computes something else, too, for one that is not even running.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Schedulers send it: what is temporary is removed on the way out, as it is after Ctrl-C.
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except RankoptError as error:
        if Verbose.on:
            traceback.print_exc()
        tell(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        tell("stopped")
        sys.exit(130)
