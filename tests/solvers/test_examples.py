"""The examples run with numpy and rankopt_solvers alone, and say what they promise."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rankopt_solvers

EXAMPLES = Path(__file__).parents[2] / "solvers" / "examples"
NAMES = ["bit_widths", "lora_ranks", "pruning_ratios"]
CODE = """
import runpy, sys
allowed, path, root = {"numpy", "rankopt_solvers"}, *sys.argv[1:]
sys.path.insert(0, root)

class Wall:
    def find_spec(self, name, *_):
        if name.partition(".")[0] not in allowed | set(sys.stdlib_module_names):
            raise ImportError(f"an example must not import {name}")

sys.meta_path.insert(0, Wall())
runpy.run_path(path, run_name="__main__")
"""


def run(path: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(rankopt_solvers.__file__).parents[1])
    command = [sys.executable, "-c", CODE, str(path), root]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_without_torch_and_without_rankopt(name: str) -> None:
    done = run(EXAMPLES / f"{name}.py")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 4


@pytest.mark.parametrize("module", ["torch", "rankopt"])
def test_the_wall_around_the_examples_stands(module: str, tmp_path: Path) -> None:
    example = tmp_path / "example.py"
    example.write_text(f"import {module}\n", encoding="utf-8")
    assert f"must not import {module}" in run(example).stderr


def test_allocating_beats_the_uniform_baseline_in_every_row_of_every_table() -> None:
    rows = []
    for name in ("bit_widths", "pruning_ratios"):
        table = run(EXAMPLES / f"{name}.py").stdout
        rows += re.findall(r"^ *[\d%]+ +([\d.]+) +([\d.]+) ", table, flags=re.MULTILINE)
    assert len(rows) == 6
    assert all(float(allocated) < float(alike) for alike, allocated in rows)


def test_the_examples_are_short_and_all_of_them_are_tested() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"measure"}
    assert scripts == set(NAMES)
    for name in NAMES:
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_one_model_with_36_linear_layers(name: str) -> None:
    path = EXAMPLES / f"{name}.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 10_000
    assert "all-MiniLM-L6-v2" in data["model"] and data["versions"]["torch"]
    assert len(data["layers"]) == 36
    assert sum(np.prod(layer["shape"]) for layer in data["layers"].values()) == 6 * 12 * 384**2


def test_more_bits_lose_less_and_no_pruning_loses_nothing() -> None:
    layers = json.loads((EXAMPLES / "bit_widths.json").read_text(encoding="utf-8"))["layers"]
    assert all((np.diff(layer["loss"]) < 0).all() for layer in layers.values())
    layers = json.loads((EXAMPLES / "pruning_ratios.json").read_text(encoding="utf-8"))["layers"]
    assert all(layer["loss"][0] == 0.0 < layer["loss"][-1] for layer in layers.values())


def test_explained_variance_is_a_falling_share_of_one_and_common_to_one_input() -> None:
    layers = json.loads((EXAMPLES / "lora_ranks.json").read_text(encoding="utf-8"))["layers"]
    for layer in layers.values():
        shares = np.array(layer["explained"])
        assert (np.diff(shares) <= 0).all() and 0 < shares.sum() < 1
    for block in range(6):
        q, k, v = (layers[f"{block}.attention.self.{n}"] for n in ("query", "key", "value"))
        assert q["explained"] == k["explained"] == v["explained"]
