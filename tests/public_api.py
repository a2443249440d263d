"""The public names and signatures, as text: ``python -m tests.public_api > tests/public_api.txt``.

A change of that file is a change of the interface, and belongs in CHANGELOG.md.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

#: Where public names are listed.
PACKAGES = ("rankopt", "rankopt.testing", "rankopt_solvers", "rankopt_solvers.testing")
FILE = Path(__file__).with_name("public_api.txt")


def listed() -> str:
    """One line for each name, and for each public method of a class."""
    return "".join(f"{line}\n" for package in PACKAGES for line in _of_package(package))


def _of_package(name: str) -> Iterator[str]:
    package = importlib.import_module(name)
    own = [k for k, v in vars(package).items() if getattr(v, "__module__", None) == name]
    for public in sorted(getattr(package, "__all__", own)):
        if public.startswith("_"):
            continue
        yield from _of(f"{name}.{public}", getattr(package, public))


def _of(name: str, what: object) -> Iterator[str]:
    if not inspect.isclass(what):
        yield name + (_signature(what) if inspect.isfunction(what) else "")
        return
    bases = ", ".join(base.__name__ for base in what.__bases__ if base is not object)
    yield f"class {name}({bases}){'' if _inherits(what) else _signature(what)}"
    for member, value in sorted(vars(what).items()):
        if member.startswith("_") or member == "model_config":
            continue
        inner = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if inspect.isfunction(inner):
            yield f"  {name}.{member}{_signature(inner)}"
        elif isinstance(value, property):
            yield f"  {name}.{member}"


def _inherits(what: type) -> bool:
    """Whether it says nothing about how it is made: errors, protocols."""
    return issubclass(what, Exception) or bool(getattr(what, "_is_protocol", False))


def _signature(what: Callable[..., object]) -> str:
    try:
        found = inspect.signature(what)
    except (TypeError, ValueError):
        return ""
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


if __name__ == "__main__":
    sys.stdout.write(listed())
