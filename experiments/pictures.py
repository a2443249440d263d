"""Pictures of a report beside an experiment."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def keep_pictures(
    wanted: Mapping[str, Path], profile: Any, plans: Mapping[str, Any] | None, results: Any
) -> None:
    """Draw some of a report's charts.

    Args:
        wanted: name of the picture, see write_pictures -> where it goes.
        profile: see write_pictures, as all that follow.
        plans: see write_pictures.
        results: see write_pictures.
    """
    from rankopt.report import write_pictures

    with tempfile.TemporaryDirectory() as temporary:
        drawn = Path(temporary) / "drawn"
        for name in write_pictures(drawn, profile, plans, results, only=wanted):
            shutil.copy(drawn / name, wanted[name])
