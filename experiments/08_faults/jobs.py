"""What is interrupted: four jobs on a tiny model, each in a process forked from a warm one.

A start of torch and transformers takes seconds and would be nearly all that ``kill -9`` hits; a
fork of a process that has them takes milliseconds.
"""

import contextlib
import dataclasses
import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = Callable[[Path], None]


@dataclasses.dataclass(frozen=True)
class Given:
    """What all jobs read: they write beside it, in a folder of their own.

    Attributes:
        model: a folder.
        data: a text file.
        profile: of the model.
        plan: of the profile.
        other: another plan.
    """

    model: Path
    data: Path
    profile: Path
    plan: Path
    other: Path


def prepare(folder: Path) -> Given:
    """Make the inputs, and import in this process what the jobs need."""
    from rankopt import Profile, make_plan
    from tests import tiny

    given = Given(*(folder / name for name in ("model", "data.txt", "p.st", "plan.json", "o.json")))
    tiny.llama(intermediate_size=64).save_pretrained(given.model)
    tiny.tokenizer(given.model)
    words = [tiny.WORDS[(7 * n * n + n) % len(tiny.WORDS)] for n in range(400)]
    given.data.write_text(" ".join(words), encoding="utf-8")
    make_profile(given, given.profile)
    profile = Profile.load(given.profile)
    make_plan(profile, keep=0.6).save(given.plan)
    make_plan(profile, keep=0.8).save(given.other)
    # What is imported late, and the tables of libraries, are in the parent from now on.
    for number, job in enumerate(jobs(given).values()):
        place = folder / f"warm{number}"
        place.mkdir()
        job(place)
    return given


def command(*arguments: object) -> None:
    """Run the command line in this process; its exit code ends it unless it is 0."""
    from rankopt.cli.app import main

    sys.argv = ["rankopt", *map(str, arguments)]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise


def make_profile(given: Given, output: Path, every: int = 1) -> None:
    """The command ``rankopt profile``."""
    how = ("--examples", 24, "--max-length", 16, "--backend", "kronecker", "--backend", "fwsvd")
    saved = ("--checkpoint-every", every, "-o", output, "--force")
    command("profile", given.model, "--data", given.data, *how, "--batch-size", 2, *saved)


def search(given: Given, output: Path) -> None:
    """The command ``rankopt plan --solver search``: plans only, so that the best is known.

    With this budget its six plans are six.
    """
    how = ("--solver", "search", "--model", given.model, "--data", given.data, "--examples", 4)
    what = ("--max-length", 16, "--trials", 6, "-o", output, "--force")
    command("plan", given.profile, "--keep", 0.5, *how, *what)


def apply(given: Given, output: Path, plan: Path | None = None) -> None:
    """The command ``rankopt apply``."""
    made = ("--profile", given.profile, "-o", output.name, "--force")
    # The model card has the command as it was typed: the same wherever the folder is.
    with contextlib.chdir(output.parent):
        command("apply", given.model, plan or given.plan, *made)


def save(given: Given, output: Path) -> None:
    """``save_model`` in Python, onto what is there."""
    import torch
    from transformers import AutoModelForCausalLM

    from rankopt import save_model

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    save_model(model, output, overwrite=True)


def jobs(given: Given) -> dict[str, Job]:
    """Name -> what writes into a folder of its own."""
    return {
        "profile": lambda folder: make_profile(given, folder / "p.st"),
        "search": lambda folder: search(given, folder / "plan.json"),
        "apply": lambda folder: apply(given, folder / "out"),
        "save": lambda folder: save(given, folder / "out"),
    }


def fork(work: Callable[[], None], said: Path) -> int:
    """Start a child that works and exits with 0, or with the code of its SystemExit; its id.

    Args:
        work: runs in the child.
        said: file for the child's stdout and stderr.
    """
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        from optuna.storages.journal import JournalFileOpenLock

        from rankopt_solvers.search import workers

        # A trial, or a lock, that was taken in the moment of the kill is waited for so long.
        workers.NOBODY_SECONDS = 0.3
        JournalFileOpenLock.__init__.__defaults__ = (1,)
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def timed(work: Callable[[], None], said: Path) -> float:
    """Seconds that the work takes in a child; it must succeed."""
    began = time.perf_counter()
    code = wait(fork(work, said))
    if code:
        raise RuntimeError(f"exit code {code}: {said.read_text(encoding='utf-8')}")
    return time.perf_counter() - began


def listing(folder: Path) -> list[str]:
    """Names of all files in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    """Of a file, or of the names and contents of a folder."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    names = "".join(f"{name} {sha256(path / name)}\n" for name in listing(path))
    return hashlib.sha256(names.encode()).hexdigest()


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders of rankopt, and locks."""
    found = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return [x for x in found if "/." in f"/{x}" or x.endswith((".partial", ".lock", ".tmp"))]


def outcome(job: str, folder: Path) -> Any:
    """What a job has made, as far as it is the same each time; checks all that it has made.

    Raises:
        Exception: something cannot be read.
    """
    if job == "profile":
        from rankopt import Profile
        from rankopt.profile.tensors import sha256_of

        profile = Profile.load(folder / "p.st")
        # In the file they stand in the order in which threads were done with them.
        kept = sorted(sha256_of(name, array) for name, array in profile.kept_arrays.items())
        return [profile.digest(), *kept]
    if job == "search":
        from rankopt import Plan
        from rankopt_solvers.search.storages import open_storage

        plan = Plan.load(folder / "plan.json")
        measured: dict[str, float] = {}
        storage = open_storage(folder / "plan.json.journal")
        for study in storage.get_all_studies():
            for trial in storage.get_all_trials(study._study_id):
                if trial.state.name == "COMPLETE" and "repeats" not in trial.user_attrs:
                    choice = str(trial.user_attrs["choice"])
                    assert choice not in measured, f"{choice} was measured twice"
                    measured[choice] = trial.values[0]
        assert len(measured) == 6, "two of its plans are one, so the last trial is drawn"
        return [plan.to_json(), dict(sorted(measured.items()))]
    return sha256(folder / "out")
