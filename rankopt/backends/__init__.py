"""Backends: which error of a layer counts, and so which loss a rank has and which factors are best.

Built in are svd, fwsvd, fwsvd_two_sided, tfwsvd, whitened and kronecker, each a module whose text
is its mathematics. Backends of others come through the entry point group ``rankopt.backends``, and
are loaded only when they are named.
"""

import importlib
from importlib.metadata import entry_points

from rankopt.backends.base import Backend
from rankopt.errors import OptionError

GROUP = "rankopt.backends"
BUILT_IN = ("fwsvd", "fwsvd_two_sided", "kronecker", "svd", "tfwsvd", "whitened")


def known_backends() -> tuple[str, ...]:
    """Names of all backends, those of other distributions included."""
    others = {point.name for point in entry_points(group=GROUP)}
    return (*BUILT_IN, *sorted(others - set(BUILT_IN)))


def find_backend(name: str) -> Backend:
    """A backend by name.

    Raises:
        OptionError: no such backend (lists those that exist), or it cannot be loaded.
    """
    if name in BUILT_IN:
        found: Backend = importlib.import_module(f"rankopt.backends.{name}").BACKEND
        return found
    point = next(iter(entry_points(group=GROUP, name=name)), None)
    if point is None:
        raise OptionError(f"unknown backend {name!r}; known: {', '.join(known_backends())}")
    try:
        loaded = point.load()
    except Exception as error:
        raise OptionError(f"the backend {name!r} ({point.value}) does not load: {error}") from error
    if not isinstance(loaded, Backend):
        raise OptionError(
            f"the backend {name!r} ({point.value}) is a {type(loaded).__name__} without the "
            "attributes of rankopt.backends.base.Backend"
        )
    return loaded
