"""A refinement that was interrupted anywhere goes on to the same bits, and with nothing else."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rankopt import DataError, refine
from rankopt.refinement.fit import Fit
from rankopt.refinement.refinement import Refined
from tests.refinement.small import RECIPE, bits, changed, compressed, low_rank_in

ROOT = Path(__file__).parents[2]
METHODS = ("distill", "blocks")


def refined(method: Any, **options: Any) -> tuple[Refined, Any]:
    model, dense, batches = compressed()
    if "dtype" in options:
        model.to(options.pop("dtype"))
    return refine(model, dense, batches, method=method, **{**RECIPE, **options}), model


def interrupted_after(step: int, monkeypatch: pytest.MonkeyPatch, method: Any, **how: Any) -> None:
    calls, take = [], Fit._take

    def fails(self: Fit, number: int) -> None:
        take(self, number)
        calls.append(number)
        if len(calls) == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_take", fails)
        with pytest.raises(KeyboardInterrupt):
            refined(method, **how)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [2, 6, 16])
def test_a_resumed_refinement_has_the_bits_of_an_uninterrupted_one(
    method: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, whole = refined(method)
    how = {"checkpoint": tmp_path / "partial", "checkpoint_every": 3}
    interrupted_after(step, monkeypatch, method, **how)
    assert (tmp_path / "partial").exists() == (step > 3)
    if method == "blocks":
        interrupted_after(17, monkeypatch, method, **how)  # in the second block
    found, model = refined(method, **how)
    assert found == wanted and not changed(bits(whole), model)
    # No step is taken any more, and nothing has changed.
    monkeypatch.setattr(Fit, "_take", None)
    again, model = refined(method, **how)
    assert again == wanted and not changed(bits(whole), model)
    assert os.listdir(tmp_path) == ["partial"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_of_16_bits_are_in_the_checkpoint(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, whole = refined("distill", dtype=dtype)
    how = {"checkpoint": tmp_path / "partial", "checkpoint_every": 1, "dtype": dtype}
    interrupted_after(7, monkeypatch, "distill", **how)
    found, model = refined("distill", **how)
    assert found == wanted and not changed(bits(whole), model)


def test_a_checkpoint_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "partial"
    interrupted_after(5, monkeypatch, "distill", checkpoint=path, checkpoint_every=2)
    before = path.read_bytes()
    for options, named in (
        ({"seed": 1}, "another seed"),
        ({"passes": 3}, "another passes"),
        ({"vectors": False}, "another vectors"),
    ):
        with pytest.raises(DataError, match=f"{named}: give the same to go on"):
            refined("distill", checkpoint=path, **options)
    with pytest.raises(DataError, match="another method"):
        refined("blocks", checkpoint=path)
    model, dense, batches = compressed()
    with pytest.raises(DataError, match="another data: "):
        refine(model, dense, batches[::-1], checkpoint=path, **RECIPE)
    with torch.no_grad():
        next(low_rank_in(model)).up.weight[0, 0] += 1.0
    with pytest.raises(DataError, match="another model: "):
        refine(model, dense, batches, checkpoint=path, **RECIPE)
    assert path.read_bytes() == before


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "partial"
    interrupted_after(5, monkeypatch, "distill", checkpoint=path, checkpoint_every=2)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1.0
    save_file(tensors, path, header)
    with pytest.raises(DataError, match=r"cannot be read .*damaged.*: delete it to start again"):
        refined("distill", checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Exception, match=r"no such file of rankopt|cannot be read"):
        refined("distill", checkpoint=path)
    assert path.stat().st_size == 100


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from rankopt.refinement.fit import Fit
    from tests.refinement.small import compressed
    from tests.refinement.test_refine_resume import METHODS, refined

    compressed()
    for method in METHODS:
        # Children: each is killed, and nothing was back-propagated before it was born.
        child = os.fork()
        if child == 0:
            take = Fit._take

            def dies(self, number, seen=[]):
                take(self, number)
                seen.append(number)
                if len(seen) == 11:
                    os.kill(os.getpid(), signal.SIGKILL)

            Fit._take = dies
            refined(method, checkpoint=Path(sys.argv[1]) / method, checkpoint_every=2)
            os._exit(0)
        print(method, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'solvers'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.split("\n")[:-1] == [f"{m} {-signal.SIGKILL}" for m in METHODS], done.stderr
    for method in METHODS:
        path = tmp_path / method
        assert path.exists(), "it was killed before anything was saved"
        found, model = refined(method, checkpoint=path)
        wanted, whole = refined(method)
        assert found == wanted and not changed(bits(whole), model)


def test_no_pickle_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_after(5, monkeypatch, "distill", checkpoint=tmp_path / "p", checkpoint_every=1)
    monkeypatch.setattr(torch, "load", None)
    assert refined("distill", checkpoint=tmp_path / "p")[0].steps == 16
