"""Optuna studies that several processes create at once and share."""

import contextlib
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study

from rankopt_solvers.search.records import OtherStudyError, StudyError, without_password

BACK_OFF_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8)

Made = TypeVar("Made")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's notes: new studies, experimental arguments, heartbeats made elsewhere."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")
            yield
    finally:
        optuna.logging.set_verbosity(level)


def patiently(what: str, attempt: Callable[[], Made]) -> Made:
    """Try again where two processes create the same at once: each database has its own error."""
    for delay in (*BACK_OFF_SECONDS, None):
        try:
            return attempt()
        except (ImportError, StudyError):
            raise
        except Exception as error:
            if delay is None:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise StudyError(f"cannot {what}: {without_password(first)}") from error
            time.sleep(delay * random.uniform(0.5, 1.5))
    raise AssertionError


def open_study(storage: BaseStorage, name: str, identity: dict[str, Any]) -> Study:
    """Create the study, or join the one of this name; safe with several creators at once.

    Args:
        storage: from open_storage.
        name: of the study.
        identity: what the study is about, kept in its attributes; JSON values.

    Raises:
        StudyError: the study of this name is about something else.
    """
    with quiet():
        study = patiently(
            f"create the study {name!r}",
            lambda: optuna.create_study(
                storage=storage, study_name=name, direction="minimize", load_if_exists=True
            ),
        )
    # Whoever creates it writes all attributes before the first trial, so look in this order.
    new = not study.get_trials(deepcopy=False)
    for key, wanted in identity.items():
        found = study.user_attrs.get(key)
        if found is None and new:
            study.set_user_attr(key, wanted)
        elif found != wanted:
            raise OtherStudyError(name, f"another {key} ({found!s:.60}, now {wanted!s:.60})")
    return study
