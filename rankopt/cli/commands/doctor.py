"""The command ``rankopt doctor``."""

import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer

from rankopt._version import __version__
from rankopt.cli.options import JsonOption, show, show_json
from rankopt.errors import RankoptError, first_line
from rankopt_solvers.registry import ENTRY_POINTS, find_solver

EXAMPLES = """\b
Examples:
  rankopt doctor
  rankopt doctor --json

Plug-ins of other distributions are loaded, to see whether they do. Exit code 2 if something that is
there does not work; an extra that is not installed is no such thing.
"""
#: What says most about a failure, whether an extra asks for it or not.
ALWAYS = ("rankopt", "numpy", "torch", "transformers", "safetensors")


def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, what can be computed with, and what does not work."""
    found = examined()
    if as_json:
        show_json(found)
    else:
        show("\n".join(_lines(found)))
    if found["problems"]:
        raise typer.Exit(2)


def examined() -> dict[str, Any]:
    """Plain values: versions, extras, devices, plug-ins, problems."""
    problems: list[str] = []
    extras = _extras(problems)
    wanted = {name for extra in extras.values() for name in extra["packages"]}
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in dict.fromkeys((*ALWAYS, *sorted(wanted)))},
        "extras": extras,
        "torch": _torch(problems),
        "plug-ins": _plug_ins(problems),
        "problems": problems,
    }


def _version(package: str) -> str | None:
    if package == "rankopt":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras(problems: list[str]) -> dict[str, Any]:
    """Extra -> its packages and what of them is missing or too old."""
    try:
        asked = importlib.metadata.requires("rankopt") or []
    except importlib.metadata.PackageNotFoundError:
        problems.append("rankopt is imported from a folder, not installed: pip install rankopt")
        return {}
    found: dict[str, Any] = {}
    for text in asked:
        match = re.match(r"([\w.-]+)(?:\[.*?\])?(?:>=([\w.]+))?.*extra == ['\"](\w+)['\"]", text)
        if match is None or match[3] in ("dev", "docs"):
            continue
        name, least, extra = match.groups()
        told = found.setdefault(extra, {"packages": [], "lacks": []})
        told["packages"].append(name)
        version = _version(name)
        if version is None or (least is not None and _numbers(version) < _numbers(least)):
            told["lacks"].append(name if least is None else f"{name}>={least}")
    return found


def _numbers(version: str) -> list[int]:
    """Of a release, for comparing it; what follows the numbers does not count."""
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])]


def _torch(problems: list[str]) -> dict[str, Any] | None:
    """What torch can compute with; None without it."""
    if _version("torch") is None:
        return None
    try:
        torch = importlib.import_module("torch")
        devices = ["cpu"]
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None:
            kind = accelerator.type
            devices += [f"{kind}:{n}" for n in range(torch.accelerator.device_count())]
        names = [
            torch.cuda.get_device_name(device) if device.startswith("cuda") else device
            for device in devices
        ]
        told = {
            "devices": dict(zip(devices, names, strict=True)),
            "threads": torch.get_num_threads(),
        }
        told["cores"] = os.cpu_count()
        if _version("transformers") is not None:
            table = importlib.import_module("transformers.quantizers.auto")
            told["reloads"] = "rankopt" in table.AUTO_QUANTIZER_MAPPING
            if not told["reloads"]:
                problems.append("transformers does not know rankopt's models after import rankopt")
    except (Exception, SystemExit) as error:  # whatever a broken installation does
        problems.append(f"torch or transformers cannot be imported: {first_line(error)}")
        return None
    return told


def _plug_ins(problems: list[str]) -> dict[str, dict[str, str]]:
    """Group -> name -> where it is; those that do not load are problems."""
    groups: dict[str, Callable[[str], object]] = {ENTRY_POINTS: find_solver}
    if _version("torch") is not None:
        from rankopt.backends import GROUP, find_backend

        groups[GROUP] = find_backend
    found: dict[str, dict[str, str]] = {}
    for group, load in groups.items():
        found[group] = {}
        for point in importlib.metadata.entry_points(group=group):
            found[group][point.name] = point.value
            try:
                load(point.name)
            except (RankoptError, ValueError, ImportError) as error:
                problems.append(first_line(error))
    return found


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    """For people."""
    packages = found["packages"]
    yield f"rankopt {packages['rankopt']}, Python {found['python']}, {found['platform']}"
    for name in ALWAYS[1:]:
        yield f"  {name:14}{packages[name] or 'not installed'}"
    told = found["torch"]
    if told is not None:
        named = ", ".join(
            name if name == device else f"{device} ({name})"
            for device, name in told["devices"].items()
        )
        yield f"  {'computes on':14}{named}; {told['threads']} threads, {told['cores']} cores"
    yield "extras"
    for extra, its in found["extras"].items():
        lacks = ", ".join(its["lacks"])
        state = f"lacks {lacks}: pip install 'rankopt[{extra}]'" if lacks else "there"
        yield f"  {extra:14}{state}"
    yield "plug-ins"
    for group, points in found["plug-ins"].items():
        named = ", ".join(f"{name} ({where})" for name, where in points.items())
        yield f"  {group.rpartition('.')[2]:14}{named or 'none'}"
    for problem in found["problems"]:
        yield f"problem: {problem}"
    if not found["problems"]:
        yield "no problems found"
