"""Teach transformers to load compressed models, without importing transformers.

Importing transformers takes seconds, so ``import rankopt`` must not. A finder on ``sys.meta_path``
waits until somebody else imports transformers' table of quantizers and then adds ours; if the
table is there already, ours is added at once.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


def _add(table: ModuleType) -> None:
    ours = importlib.import_module("rankopt.apply.quantizer")
    # Half imported, when its own import of transformers has led here: it registers at its end.
    complete = hasattr(ours, "RankoptQuantizer")
    if complete and ours.METHOD not in table.AUTO_QUANTIZER_MAPPING:
        table.register_quantization_config(ours.METHOD)(ours.RankoptConfig)
        table.register_quantizer(ours.METHOD)(ours.RankoptQuantizer)


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

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add(module)

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Add our quantizer to transformers' table, now or when the table is imported."""
    if _TABLE in sys.modules:
        _add(sys.modules[_TABLE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
