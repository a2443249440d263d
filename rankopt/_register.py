"""Teach transformers to load compressed models, without importing transformers.

Importing transformers takes seconds, so ``import rankopt`` must not. A finder on ``sys.meta_path``
waits until somebody else imports transformers' table of quantizers and then imports ours, which
adds itself; if the table is there already, ours is imported at once.

The table imports torchao, if that is installed.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

_TABLE = "transformers.quantizers.auto"
_QUANTIZER = "rankopt.apply.quantizer"
#: What torchao logs while it is imported and harms nobody: kernels of other devices, and a
#: deprecated call. Logger -> what the message has in it.
_NOISE = {"torchao": "Failed to load", "torch.utils._pytree": "register_constant()"}


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
            with quiet():
                execute(module)
            importlib.import_module(_QUANTIZER)

        spec.loader.exec_module = execute_and_import  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torchao says of itself while it is imported; all else is said."""
    filters = {name: _Without(noise) for name, noise in _NOISE.items()}
    for name, each in filters.items():
        logging.getLogger(name).addFilter(each)
    try:
        yield
    finally:
        for name, each in filters.items():
            logging.getLogger(name).removeFilter(each)


class _Without(logging.Filter):
    def __init__(self, noise: str) -> None:
        super().__init__()
        self._noise = noise

    def filter(self, record: logging.LogRecord) -> bool:
        return self._noise not in record.getMessage()


def register() -> None:
    """Import our quantizer, which adds itself to the table, once the table is imported."""
    if _TABLE in sys.modules:
        importlib.import_module(_QUANTIZER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
