"""``rankopt profile``: what is planned, how it is estimated, when it stops, several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankopt import Profile
from rankopt.measure import decompose
from tests.cli.test_cli import Run, done, files, run

__all__ = ["files", "run"]
BACKENDS = ("fwsvd", "fwsvd_two_sided", "kronecker", "svd", "tfwsvd", "whitened")


def arguments(files: Path, output: Path, *more: object) -> list[object]:
    data = ("--data", files / "train.txt", "--max-length", 16, "-o", output)
    return ["profile", files / "model", *data, *more]


@pytest.mark.slow
def test_all_backends_are_planned_and_applied_from_one_profile(
    run: Run, files: Path, tmp_path: Path
) -> None:
    path = tmp_path / "p.safetensors"
    printed = done(run(*arguments(files, path, "--backend", *BACKENDS)))
    assert all(f"backend     {name}" in printed for name in BACKENDS)
    assert Profile.load(path).backends == BACKENDS
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.partial*"))
    names = [f"{solver}@{name}" for name in BACKENDS for solver in ("uniform", "exact")]
    measure = ("--model", files / "model", "--data", files / "heldout.txt", "--max-length", 16)
    rows = json.loads(
        done(run("compare", path, "--keep", 0.7, *measure, "--strategy", *names, "--json"))
    )["rows"]
    losses = {(row["backend"], row["solver"]): row["loss"] for row in rows}
    assert len(losses) == 12 and all(np.isfinite(loss) for loss in losses.values())
    assert len({losses[name, "exact"] for name in BACKENDS}) == 6
    plan, smaller = tmp_path / "plan.json", tmp_path / "smaller"
    done(run("plan", path, "--keep", 0.7, "--backend", "kronecker", "-o", plan))
    done(run("apply", files / "model", plan, "--profile", path, "-o", smaller))
    found = json.loads(done(run("evaluate", smaller, *measure[2:], "--json")))
    assert found["loss"] == pytest.approx(losses["kronecker", "exact"], rel=1e-5)


def test_globs_choose_layers_and_wrong_ones_are_named(
    run: Run, files: Path, tmp_path: Path
) -> None:
    path = tmp_path / "p.safetensors"
    chosen = ("--include", "*.mlp.*", "lm_head", "--exclude", "*.layers.0.*", "--untie")
    done(run(*arguments(files, path, *chosen)))
    names = {layer.name: layer.partners for layer in Profile.load(path).info.layers}
    assert names == {
        "lm_head": ("model.embed_tokens",),
        **{f"model.layers.1.mlp.{kind}_proj": () for kind in ("gate", "up", "down")},
    }
    other = tmp_path / "q.safetensors"
    for more, said in (
        (("--include", "*.q_porj"), "q_proj"),
        (("--include", "lm_head"), "--untie"),
        (("--exclude", "nothing"), "nothing"),
    ):
        code, _, err = run(*arguments(files, other, *more))
        assert code == 2 and said in err and "Traceback" not in err
        assert not list(tmp_path.glob("*q.safetensors*"))


def test_the_estimator_is_recorded_and_mistakes_exit_with_2(
    run: Run, files: Path, tmp_path: Path
) -> None:
    path = tmp_path / "p.safetensors"
    how = ("--estimator", "sampled", "--unit", "token", "--draws", 2, "--seed", 5, "--json")
    info = json.loads(done(run(*arguments(files, path, *how))))
    recorded = {k: info[k] for k in ("estimator", "unit", "draws", "seed")}
    assert recorded == {"estimator": "sampled", "unit": "token", "draws": 2, "seed": 5}
    assert info["units"] == 2 * info["targets"]
    assert info["backends"][0]["scales"][0]["unit"].startswith("nats per token")
    for more in (
        ("--estimator", "true"),
        ("--unit", "word"),
        ("--draws", 3),
        ("--backend", "pca"),
        ("--layers-at-a-time", 0),
        ("--until-stable", "--layers-at-a-time", 3),
        ("--until-stable", "--stable-keep", 7),
    ):
        code, _, err = run(*arguments(files, tmp_path / "q.safetensors", *more))
        assert code == 2 and err.startswith("error: ") and "Traceback" not in err, more


def test_until_stable_says_why_it_stopped(run: Run, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    often = ("--batch-size", 1, "--until-stable", "--stable-tolerance", 0.5)
    printed = done(run(*arguments(files, path, *often)))
    info = Profile.load(path).info
    assert info.stopped is not None and info.stopped in printed
    assert info.examples == 8 < 300 // 16


@pytest.mark.slow
def test_sigterm_leaves_the_checkpoint_and_nothing_else(files: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text((files / "train.txt").read_text(encoding="utf-8") * 100, encoding="utf-8")
    given = ("profile", files / "model", "--data", text, "-o", tmp_path / "p.safetensors")
    often = ("--max-length", 16, "--batch-size", 1, "--checkpoint-every", 1)
    started: Any = [sys.executable, "-m", "rankopt", *map(str, (*given, *often))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(started, stderr=subprocess.PIPE, text=True, env=environment) as process:
        partial, end = tmp_path / "p.safetensors.partial", time.monotonic() + 60
        while not partial.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.endswith("stopped\n") and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["long.txt", "p.safetensors.partial"]


@pytest.mark.slow
def test_two_processes_write_the_profile_of_one(run: Run, files: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    more = ("--backend", "kronecker", "fwsvd")
    done(run(*arguments(files, one, *more)))
    started: Any = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    started += ["--nproc-per-node", "2", "-m", "rankopt", *map(str, arguments(files, two, *more))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(started, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("planned ") == 1, "only the first process speaks"
    alone, shared = Profile.load(one), Profile.load(two)
    assert shared.info.processes == 2 and shared.info.data_digest == alone.info.data_digest
    assert shared.units == alone.units and shared.kept_arrays.keys() == alone.kept_arrays.keys()
    for name, rows in alone.fisher_rows.items():
        np.testing.assert_allclose(shared.fisher_rows[name], rows, rtol=1e-12)
        losses = alone.curves["kronecker"][name].losses
        difference = abs(shared.curves["kronecker"][name].losses - losses).max()
        assert difference <= 1e-12 * losses[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def _done(run: Run, files: Path, folder: Path, more: tuple[object, ...]) -> Path:
    path = folder / "other.st"
    done(run(*arguments(files, path, "--force", *more)))
    return path


def test_by_default_losses_are_cross_fitted_and_the_data_are_seen_twice(
    run: Run, files: Path, tmp_path: Path
) -> None:
    """Where that can be, and said wherever the profile is."""
    where = tmp_path / "crossed.st"
    printed = done(run(*arguments(files, where)))
    assert "cross-fitted: half on data that did not make the factors" in printed
    assert "half of it measured again" in printed and "scales: kronecker (nats" in printed
    info = Profile.load(where).info
    assert info.cross_fit and info.again == "Compressed(keep=0.8)"
    plain = tmp_path / "plain.st"
    done(run(*arguments(files, plain, "--no-cross-fit", "--rounds", 1)))
    info = Profile.load(plain).info
    assert not info.cross_fit and info.again is None
    for more in (("--until-stable",), ("--layers-at-a-time", 4), ("--no-moments",)):
        info = Profile.load(_done(run, files, tmp_path, more)).info
        assert info.cross_fit == (more != ("--no-moments",))
        assert (info.again is None) == (more != ("--no-moments",))
    assert "scale kronecker" not in done(run("plan", where, "--keep", 0.6))
    code, _, err = run(*arguments(files, tmp_path / "new", "--cross-fit", "--no-moments"))
    assert code == 2 and "--cross-fit values factors" in err and "moments" in err


def test_a_second_round(run: Run, files: Path, tmp_path: Path) -> None:
    plain, again = tmp_path / "plain.st", tmp_path / "again.st"
    done(run(*arguments(files, plain, "--rounds", 1)))
    printed = done(run(*arguments(files, again, "--round-keep", 0.6)))
    assert "half of it measured again under Compressed(keep=0.6)" in printed
    one, two = Profile.load(plain), Profile.load(again)
    assert (one.info.again, two.info.again) == (None, "Compressed(keep=0.6)")
    assert one.digest() != two.digest() and one.info.data_digest == two.info.data_digest
    assert not list(tmp_path.glob("*.partial*"))
    for more, said in (
        (("--rounds", 3), "--rounds is 1 or 2, not 3"),
        (("--rounds", 1, "--round-keep", 0.5), "--round-keep belongs to --rounds 2"),
        (("--until-stable", "--round-keep", 0.5), "--round-keep belongs to --rounds 2"),
        (("--rounds", 2, "--until-stable"), "does not go with --until-stable"),
        (("--rounds", 2, "--layers-at-a-time", 2, "--checkpoint-every", 0), "does not go with"),
        (("--rounds", 2, "--round-keep", 7), "keep"),
    ):
        code, out, err = run(*arguments(files, tmp_path / "new", *more))
        assert (code, out) == (2, "") and said in err and not (tmp_path / "new").exists()


def test_singular_vectors_that_are_many_are_left_out_and_that_is_said(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.safetensors"
    monkeypatch.setattr(decompose, "BASES_LIMIT", 1000)
    cases = (
        (("--backend", "svd"), False),
        (("--backend", "svd", "--bases"), True),
        (("--backend", "svd", "--no-bases"), False),
    )
    for number, (more, kept) in enumerate(cases):
        code, _, err = run(*arguments(files, path, *more, "--force"))
        assert code == 0 and ("singular vectors are not in it, 0.0 GiB" in err) == (number == 0)
        profile = Profile.load(path)
        assert bool(profile.kept("svd", profile.info.layers[0].name)) == kept
    monkeypatch.undo()
    assert "singular vectors" not in run(*arguments(files, path, *cases[0][0], "--force"))[2]
