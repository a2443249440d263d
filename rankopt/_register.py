"""Teach transformers to load compressed models, without importing transformers.

Importing transformers takes seconds, so ``import rankopt`` must not. A finder on ``sys.meta_path``
waits until somebody else imports transformers' table of quantizers and then imports ours, which
adds itself; if the table is there already, ours is imported at once.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_TABLE = "transformers.quantizers.auto"
_QUANTIZER = "rankopt.apply.quantizer"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_import(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_QUANTIZER)

        spec.loader.exec_module = execute_and_import  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Import our quantizer, which adds itself to the table, once the table is imported."""
    if _TABLE in sys.modules:
        importlib.import_module(_QUANTIZER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
