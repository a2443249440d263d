"""Vega-Lite, which draws: its script for a page, and pictures without a browser."""

import functools
import json
from typing import Any

from rankopt.errors import MissingExtraError

#: Of the library that the specifications are written for.
_VERSION = "6"
#: Pixels of a picture for each of its points: sharp in print.
_SHARPNESS = 2.5


@functools.cache
def script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that needs no network.

    Raises:
        MissingExtraError: the library is not there.
    """
    bundle: str = _library().javascript_bundle(vl_version=_version())
    return bundle


def picture(spec: dict[str, Any]) -> bytes:
    """A specification with its data as PNG.

    Raises:
        MissingExtraError: the library is not there.
    """
    library = _library()
    drawn: bytes = library.vegalite_to_png(
        json.dumps(spec), vl_version=_version(), scale=_SHARPNESS, allowed_base_urls=[]
    )
    return drawn


def require_library() -> None:
    """See that charts can be drawn, before anything takes long.

    Raises:
        MissingExtraError: they cannot.
    """
    _library()


def _library() -> Any:
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError("a report", "vl-convert-python", "report") from error
    return vl_convert


def _version() -> str:
    """The newest of the major version."""
    known: list[str] = _library().get_vegalite_versions()
    fitting = [version for version in known if version.lstrip("v").split(".")[0] == _VERSION]
    return fitting[-1] if fitting else known[-1]
