"""Text of another domain, to measure a language model on beside the data that was given."""

from collections.abc import Mapping
from typing import Any

from rankopt.data.batches import text_batches
from rankopt.errors import DataError
from rankopt.model.tasks import Batch

#: What the help texts are called in tables, and on the command line.
PYTHON_HELP = "python-help"
#: Few, so that they cost little; the same for every model.
HELP_WINDOWS = 16


def help_topics() -> list[str]:
    """The help texts that Python carries (``pydoc_data.topics``), in the order of their names.

    Raises:
        DataError: this Python has none, or has them in another form.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python comes without its help texts (pydoc_data.topics)") from error
    if not isinstance(topics, Mapping) or not all(isinstance(x, str) for x in topics.values()):
        raise DataError("this Python has its help texts (pydoc_data.topics) in another form")
    return [topics[name] for name in sorted(topics)]


def python_help(
    tokenizer: Any, max_length: int = 256, batch_size: int = 4, windows: int = HELP_WINDOWS
) -> list[Batch]:
    """Windows at equal distances over all of Python's help texts.

    Other versions of Python have other texts: losses of two models are comparable if the same
    Python measured them.

    Args:
        tokenizer: of the model, a causal language model.
        max_length: tokens of a window.
        batch_size: windows of a batch.
        windows: how many.

    Raises:
        DataError: see help_topics; or less text than one window.
    """
    return text_batches(help_topics(), tokenizer, max_length, batch_size, windows)
