"""Backends: which error of a layer counts, and so which loss a rank has and which factors are best.

Built in are svd, fwsvd, fwsvd_two_sided, tfwsvd, whitened and kronecker, each a module whose text
is its mathematics. Backends of others come through the entry point group ``rankopt.backends``, or
as ``module:object``, and are loaded only when they are named: never because a file names them.
"""

import importlib
import re
from collections.abc import Iterable, Mapping, Set
from importlib.metadata import entry_points
from typing import cast

from rankopt.backends.base import Backend, Scale
from rankopt.errors import OptionError, first_line
from rankopt.profile.info import NAME

GROUP = "rankopt.backends"
BUILT_IN = ("fwsvd", "fwsvd_two_sided", "kronecker", "svd", "tfwsvd", "whitened")
#: Name -> module:object, and what was loaded from there in this process.
_LOADED: dict[str, tuple[str, Backend]] = {}


def known_backends() -> tuple[str, ...]:
    """Names of all backends, those of other distributions included."""
    others = {point.name for point in entry_points(group=GROUP)}
    return (*BUILT_IN, *sorted(others - set(BUILT_IN)))


def find_backend(name: str) -> Backend:
    """A backend by name.

    Args:
        name: a built-in, an entry point of group ``rankopt.backends``, or ``module:object``. What
            was loaded as ``module:object`` has its own name from then on, in this process: that
            is the name that profiles and plans record.

    Raises:
        OptionError: no such backend (lists those that exist), it cannot be loaded, or its name is
            another backend's.
    """
    if ":" in name:
        return _load_object(name)
    if name in BUILT_IN:
        return _built_in(name)
    if name in _LOADED:
        return _LOADED[name][1]
    point = next(iter(entry_points(group=GROUP, name=name)), None)
    if point is None:
        known = ", ".join(dict.fromkeys([*known_backends(), *_LOADED]))
        raise OptionError(f"unknown backend {name!r}; known: {known}, or module:object of your own")
    try:
        loaded = point.load()
    except (Exception, SystemExit) as error:
        why = f"does not load: {first_line(error)}"
        raise OptionError(f"the backend {name!r} ({point.value}) {why}") from error
    return _checked(loaded, f"the backend {name!r} ({point.value})")


def find_backends(names: Iterable[str]) -> dict[str, Backend]:
    """Backends by the names that a profile records: of ``module:object`` the object's own.

    Raises:
        OptionError: see find_backend.
    """
    if isinstance(names, str):
        raise OptionError(f"backends are a list of names, not one text: give [{names!r}]")
    found = {}
    for name in names:
        backend = find_backend(name)
        found[backend.name if ":" in name else name] = backend
    return found


def loaded_from(name: str) -> str | None:
    """The ``module:object`` that a backend was loaded from in this process, if it was."""
    return _LOADED[name][0] if name in _LOADED else None


def _built_in(name: str) -> Backend:
    found: Backend = importlib.import_module(f"rankopt.backends.{name}").BACKEND
    return found


def _checked(loaded: object, what: str) -> Backend:
    if isinstance(loaded, type):
        raise OptionError(f"{what} is the class {loaded.__name__}: name an object of it")
    try:
        sound = (
            isinstance(loaded, Backend)
            and hasattr(loaded, "name")  # from Python 3.12 on isinstance asks no property
            and isinstance(loaded.source, str)
            and isinstance(loaded.needs, Set)
            and isinstance(loaded.scales, Mapping)
            and len(loaded.scales) > 0
            and all(isinstance(scale, Scale) for scale in loaded.scales.values())
        )
    except Exception:  # whatever a property of others does
        sound = False
    if not sound:
        raise OptionError(
            f"{what} is a {type(loaded).__name__} without the "
            "attributes of rankopt.backends.base.Backend"
        )
    return cast(Backend, loaded)


def _load_object(where: str) -> Backend:
    module, _, path = where.partition(":")
    what = f"the backend {where!r}"
    try:
        loaded: object = importlib.import_module(module)
        for part in path.split("."):
            loaded = getattr(loaded, part)
    except (Exception, SystemExit) as error:  # whatever others do when they are imported
        raise OptionError(
            f"{what} does not load: {first_line(error)}; wanted is module:object, of a module "
            "that Python finds"
        ) from error
    backend = _checked(loaded, what)
    name = backend.name
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise OptionError(
            f"{what} has the name {name!r}, which becomes part of names in files: use letters, "
            "digits, _, + and -"
        )
    if name in BUILT_IN:
        if backend is _built_in(name):
            return backend
        raise OptionError(f"{what} has the name of the built-in {name!r}: give it another name")
    others = {point.value for point in entry_points(group=GROUP, name=name)}
    others |= {_LOADED[name][0]} if name in _LOADED else set()
    if others - {where}:
        raise OptionError(
            f"{what} has the name {name!r}, as {', '.join(sorted(others - {where}))} has: give it "
            "another name"
        )
    _LOADED[name] = where, backend
    return backend
