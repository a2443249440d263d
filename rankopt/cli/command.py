"""What every command does alike: several values for one option, and messages in its own words."""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperOption

from rankopt.cli.data import MAY_BE_EMPTY, REPEATED
from rankopt.cli.options import Verbose, talk
from rankopt.errors import OptionError, RankoptError, WriteError, first_line
from rankopt.progress import Quiet

#: Options of ``rankopt`` itself that are understood behind a command, too.
QUIET, VERBOSE = ("-q", "--quiet"), ("-v", "--verbose")


class Command(TyperCommand):
    """A command of rankopt.

    A repeatable option takes several values: ``--keep 0.9 0.8`` is two of it. What the library
    says of its parameters is said of the command's options.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its values; take what is said of all commands.

        Raises:
            OptionError: an empty value.
        """
        talk(
            quiet=Quiet.on or not {*QUIET}.isdisjoint(args),
            verbose=Verbose.on or not {*VERBOSE}.isdisjoint(args),
        )
        args = [arg for arg in args if arg not in (*QUIET, *VERBOSE)]
        for place, arg in enumerate(args):
            if not arg and (place == 0 or args[place - 1] not in MAY_BE_EMPTY):
                before = " ".join(["rankopt", str(ctx.info_name), *args[:place]])
                raise OptionError(f"after '{before}' comes an empty value: is a variable not set?")
        repeatable = {
            name
            for param in self.params
            if isinstance(param, TyperOption) and param.multiple and not _apart(param)
            for name in param.opts
        }
        spread: list[str] = []
        current: str | None = None
        for position, arg in enumerate(args):
            if current is not None and not arg.startswith("-") and self._fits(current, arg):
                if args[position - 1] != current:
                    spread.append(current)
            else:
                current = arg if arg in repeatable else None
            spread.append(arg)
        return super().parse_args(ctx, spread)

    @staticmethod
    def _fits(option: str, value: str) -> bool:
        if option not in ("--keep", "--weight"):
            return not Path(value).exists()
        try:
            float(value)
        except ValueError:
            return False
        return True

    def invoke(self, ctx: Any) -> Any:
        """Run it; an error's message names options as they are typed.

        Raises:
            WriteError: the system refuses something, or stdout cannot be written.
        """
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
            return result
        except RankoptError as error:
            error.args = (in_options(str(error), options_of(self.params)),)
            raise
        except BrokenPipeError:
            # Who reads has seen enough; what else was to be written lies where it belongs.
            _drop_output()
            return None
        except OSError as error:
            if error.errno is None:
                raise WriteError(first_line(error)) from error
            what = f"read or write {error.filename}"
            if error.filename is None:
                what = "write the output"
                _drop_output()
            raise WriteError(f"cannot {what}: {error.strerror}") from error


def _apart(option: TyperOption) -> bool:
    """Whether it has one value each time it is given, so that the model may stand behind it."""
    return not set(option.opts).isdisjoint(REPEATED)


def _drop_output() -> None:
    """What is still to be flushed would be refused again, at the end and with a traceback."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def options_of(params: Iterable[Any]) -> dict[str, str]:
    """The long form of every option, by the name of its parameter."""
    return {
        param.name: max(param.opts, key=len)
        for param in params
        if isinstance(param, TyperOption) and param.name
    }


def in_options(message: str, options: Mapping[str, str]) -> str:
    """A message with options in the place of Python's keywords.

    A name with an underscore is one wherever it stands alone; a plain word (``keep``, ``data``)
    only where its surroundings say so: before ``=``, at the head of the message, in brackets with a
    number, in a list with another option. What is quoted or part of a path is the user's.

    Args:
        message: of an error.
        options: by the parameter's name.
    """
    if not options:
        return message
    ordered = sorted(options, key=len, reverse=True)
    names = "|".join(map(re.escape, ordered))
    scored = "|".join(re.escape(name) for name in ordered if "_" in name) or r"(?!)"
    alone, end = r"(?<![\w./\\'\"-])", r"(?![\w/\\'\"-]|\.\w)"
    patterns = (
        rf"(){alone}({names})=(?=\S)",
        rf"^()({names})(?=:? (?:is|must|needs|takes|belongs|none)\b)",
        rf"(\()({names})(?= [\d.])",
        rf"(){alone}({scored}){end}",
        rf"(){alone}({names})(?=(?:,| and| or) --)",
        rf"(--[\w-]+(?:,| and| or) )({names}){end}",
    )
    for pattern in patterns:
        message = re.sub(pattern, lambda found: _as_option(found, options), message)
    return message


def _as_option(found: re.Match[str], options: Mapping[str, str]) -> str:
    return f"{found[1]}{options[found[2]]}{' ' if found[0].endswith('=') else ''}"
