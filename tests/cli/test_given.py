"""An option that would do nothing is refused, by name; one that does something is not."""

from pathlib import Path

import pytest

from rankopt.cli.commands.plan import SEARCH
from rankopt.cli.data import READING
from tests.cli.test_cli import Run, done, run
from tests.synthetic import synthetic_profile

__all__ = ["run"]
#: A value that each option would take.
VALUES = {"trials": "7", "sampler": "tpe", "storage": "x.journal", "seed": "0", "workers": "1",
          "model": "./m", "data": "d.txt", "split": "test", "text_column": "text",
          "pair_column": "b", "label_column": "label", "examples": "3", "max_length": "16",
          "batch_size": "4", "dtype": "float32", "weight": "2", "also": "e.txt",
          "resample": "1", "against": "exact"}  # fmt: skip
REFUSED = {
    "several": ("plan {p} --keep .5 --trials 10 --sampler tpe --storage x.journal",
                "--trials, --sampler and --storage belong to --solver search: add that, or leave "
                "them out"),
    "force": ("plan {p} --keep .5 --force",
              "--force belongs to -o: add that, or leave --force out"),
    "share": ("plan {p} --keep .5 --share .9",
              "--share belongs to --solver threshold: add that, or leave --share out"),
    "share, search": ("plan {p} --keep .5 --share .9 --solver search --model m --data d",
                      "--share belongs to --solver threshold"),
    **{f"time limit, {solver}": (f"plan {{p}} --keep .5 --solver {solver} --time-limit 3",
                                 "--time-limit belongs to --solver exact, knapsack or search")
       for solver in ("uniform", "proportional", "threshold", "greedy", "density")},
    **{f"floor, {solver}": (f"plan {{p}} --keep .5 --solver {solver} --min-retained .5 {more}",
                            f"--min-retained does not go with --solver {solver}, but is for ")
       for solver, more in (("uniform", ""), ("proportional", ""), ("threshold", ""),
                            ("search", "--model m --data d"))},
    "draws": ("profile m --data d -o new --draws 1",
              "--draws belongs to --estimator sampled or --unit token"),
    "draws and seed": ("profile m --data d -o new --draws 1 --seed 3",
                       "--draws and --seed belong to --estimator sampled or --unit token"),
    "stability": ("profile m --data d -o new --stable-keep .8",
                  "--stable-keep belongs to --until-stable"),
    "tolerance": ("profile m --data d -o new --stable-tolerance .01",
                  "--stable-tolerance belongs to --until-stable"),
    "checkpoint": ("profile m --data d -o new --checkpoint-every 32 --layers-at-a-time 4",
                   "--checkpoint-every does not go with --layers-at-a-time, which saves no "
                   "checkpoints: leave one of the two out"),
}  # fmt: skip
REFUSED |= {
    f"{name} without search": (
        f"plan {{p}} --keep .5 --{name.replace('_', '-')} {VALUES[name]}",
        f"--{name.replace('_', '-')} belongs to --solver search",
    )
    for name in SEARCH
    if name not in ("also", "no_also")
}
REFUSED |= {
    f"{name} without data": (
        f"compare {{p}} --keep .5 --{name.replace('_', '-')} {VALUES[name]}",
        f"--{name.replace('_', '-')} belongs to --model and --data",
    )
    for name in (*READING, "dtype", "against")
    if name not in ("weight", "resample", "no_also")
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_option_that_would_do_nothing_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    command, wanted = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    synthetic_profile().save(tmp_path / "p.st")
    code, out, err = run(*command.format(p="p.st").split())
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {wanted}")
    assert [path.name for path in tmp_path.iterdir()] == ["p.st"]


@pytest.mark.parametrize(
    "options",
    [
        "--keep .5 --solver exact --time-limit 9 --min-retained .1",
        "--keep .5 --solver knapsack --time-limit 9",
        "--solver threshold --share .5",
        "--keep .5 --solver greedy --min-retained best",
        "--keep .5 --solver rankopt_solvers.exact:solve_exact --time-limit 9",
    ],
)
def test_an_option_that_does_something_is_taken(run: Run, tmp_path: Path, options: str) -> None:
    synthetic_profile().save(tmp_path / "p.st")
    done(run("plan", tmp_path / "p.st", *options.split()))
