"""What an experiment publishes: results.json and table.md, and which code they are of."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rankopt.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
#: What figures follow from.
CODE = ("rankopt", "solvers", ":(glob)experiments/**/*.py")


def provenance(here: Path, *packages: str, folder: Path | None = None) -> dict[str, Any]:
    """How the figures are made; called before they are, since a run may be interrupted.

    Args:
        here: folder of the experiment.
        packages: whose versions matter, beside rankopt, torch and transformers.
        folder: keeps what was measured, and so the commits of all runs that measured; it is made.

    Returns:
        The command; the commits, one for each run of the folder that had another than those before,
        with ``+`` where files were changed since; versions.
    """
    commits = [_commit()]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "commits.json"
        earlier = json.loads(kept.read_text("utf-8")) if kept.exists() else []
        commits = list(dict.fromkeys([*earlier, *commits]))
        write(kept, json.dumps(commits) + "\n")
    return {
        "command": f"python experiments/{here.name}/run.py",
        "commits": commits,
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("rankopt", "torch", "transformers", *packages)
        },
    }


def publish(
    here: Path,
    how: Mapping[str, Any],
    found: Mapping[str, Any],
    table: str,
    earlier: Mapping[str, Any] | None = None,
    names: tuple[str, str] = ("results.json", "table.md"),
) -> dict[str, Any]:
    """Write both files.

    Args:
        here: folder of the experiment.
        how: see provenance.
        found: the figures.
        table: those that are shown, as Markdown.
        earlier: what results.json had, if some of it is in what was found.
        names: of the files.

    Returns:
        What results.json has now.
    """
    how = beside(how, earlier)
    whole = {"made": how, **{name: value for name, value in found.items() if name != "made"}}
    write(here / names[0], json.dumps(whole, indent=1) + "\n")
    write(here / names[1], f"{table.rstrip()}\n\n{footer(how)}\n")
    return whole


def beside(how: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """How it is made, if some figures are still those of earlier results."""
    before = (earlier or {}).get("made", {}).get("commits", [])
    return {**how, "commits": list(dict.fromkeys([*before, *how["commits"]]))}


def footer(how: Mapping[str, Any]) -> str:
    """How it was made, in a line below a table."""
    commits = ", ".join(f"`{commit}`" for commit in how["commits"])
    versions = ", ".join(f"{name} {number}" for name, number in how["versions"].items())
    return f"`{how['command']}` at {commits}; Python {how['python']}, {versions}."


def write(file: Path, text: str) -> None:
    """All of it or nothing."""
    with whole_file(file) as whole:
        whole.write_text(text, encoding="utf-8")


def _commit() -> str:
    git = ["git", "-C", os.fspath(ROOT)]
    try:
        said = [
            subprocess.run([*git, *asked], check=True, capture_output=True, text=True).stdout
            for asked in (
                ("rev-parse", "--short=10", "HEAD"),
                ("status", "--porcelain", "--", *CODE),
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return f"no commit, rankopt {_version('rankopt')}"
    return said[0].strip() + ("+" if said[1].strip() else "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
