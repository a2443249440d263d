"""The label of one row, for every task that has labels."""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from rankopt.errors import DataError, few
from rankopt.model.tasks import IGNORED

Label = int | float | list[int] | list[float]
#: Beyond it a label would be infinite in float32, which labels are kept in.
_LARGEST = float(np.finfo(np.float32).max)


def label_of(where: str, value: Any, task: str, label2id: Mapping[str, int]) -> Label:
    """A class, a number, several numbers, or an answer (0 to 1) for each of several classes.

    Args:
        where: file and row, for errors.
        value: as it was read; lists may be JSON.
        task: see ProfileInfo.
        label2id: for labels given as names; empty if the classes are not known.

    Raises:
        DataError: it is no label of the task.
    """
    if task == "multi-label-classification":
        return _answers(where, value, label2id)
    if task == "regression":
        several = listed(value)
        if not several:
            return _number(where, value)
        return [_number(where, each) for each in several]
    return class_of(where, value, label2id)


def classes_of(where: str, values: list[Any], label2id: Mapping[str, int]) -> list[int]:
    """A class for each word; IGNORED stays what it is."""
    return [
        IGNORED if value in (IGNORED, str(IGNORED)) else class_of(where, value, label2id)
        for value in values
    ]


def class_of(where: str, value: Any, label2id: Mapping[str, int]) -> int:
    """A class, by name or by number."""
    if str(value) in label2id:
        return label2id[str(value)]
    number = _finite(value)
    whole = number is not None and number == int(number) and 0 <= number < 2**31
    if number is None or not whole or (label2id and number not in label2id.values()):
        named = f" or one of {few(label2id, 12)}" if label2id else ""
        _refuse(where, value, f"a class number of the model{named}")
    return int(number)


def list_of(where: str, value: Any) -> list[Any]:
    """A list, given as one or as JSON."""
    found = listed(value)
    if found is None:
        raise DataError(f"{where}: a list is wanted, got {value!r:.60}")
    return found


def listed(value: Any) -> list[Any] | None:
    """A list, given as one or as JSON; None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else None


def _answers(where: str, value: Any, label2id: Mapping[str, int]) -> list[float]:
    found = [value] if isinstance(value, str) and value in label2id else listed(value)
    named = found is not None and all(isinstance(each, str) for each in found)
    if named and label2id and set(found or ()) <= set(label2id):
        chosen = {label2id[name] for name in found or ()}
        return [float(n in chosen) for n in range(len(label2id))]
    numbers = [_finite(each) for each in found or [None]]
    answers = [each for each in numbers if each is not None and 0 <= each <= 1]
    if len(answers) != len(numbers) or len(answers) != (len(label2id) or len(answers)):
        among = f", or of names among {few(label2id, 12)}" if label2id else ""
        wanted = f"a list of {len(label2id) or 'several'} answers from 0 to 1"
        _refuse(where, value, wanted + among)
    return answers


def _number(where: str, value: Any) -> float:
    number = _finite(value)
    if number is None or abs(number) > _LARGEST:
        _refuse(where, value, "a number")
    return number


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _refuse(where: str, value: Any, wanted: str) -> NoReturn:
    raise DataError(f"{where}: the label {value!r:.60} is not {wanted}")
