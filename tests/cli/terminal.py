"""A terminal of a given width for ``rankopt``, and what is on its screen in the end."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).parents[2]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*([a-zA-Z])")


def in_terminal(columns: int, folder: Path, *arguments: object) -> tuple[int, str]:
    """``rankopt ARGUMENTS`` in a folder: exit code, and all that it wrote to the terminal."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'solvers'}",
        "TERM": "xterm",
    }
    # As in a user's terminal, where the bars of other libraries would be shown.
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    with subprocess.Popen(
        [sys.executable, "-m", "rankopt", *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdin=child,
        stdout=child,
        stderr=child,
    ) as process:
        os.close(child)
        written = b""
        with contextlib.suppress(OSError):  # the end of a terminal's output, on Linux
            while part := os.read(parent, 65536):
                written += part
        code = process.wait()
    os.close(parent)
    return code, written.decode()


def screen(written: str) -> list[str]:
    """The lines that are left to read: carriage returns overwrite, cursor movements are obeyed."""
    lines, row, column, at = [""], 0, 0, 0
    while at < len(written):
        if found := ESCAPES.match(written, at):
            at = found.end()
            if found[1] == "A":
                row = max(row - 1, 0)
            elif found[1] == "K":
                lines[row] = lines[row][:column]
            continue
        character = written[at]
        at += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + character + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
