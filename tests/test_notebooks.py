"""The notebooks run, from top to bottom, on a tiny model; what is stored in them is of a run."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests import tiny

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
FOUND = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
ROOT = NOTEBOOKS.parents[1]


def test_there_are_notebooks() -> None:
    assert len(FOUND) >= 2


@pytest.mark.parametrize("name", FOUND)
def test_a_notebook_was_run_whole_in_its_order(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any(output.output_type == "stream" for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    # What a notebook shows comes from its cells, not from the machine that ran it.
    assert str(ROOT) not in nbformat.writes(notebook)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    tiny.llama().save_pretrained(model)
    tiny.tokenizer(model)
    monkeypatch.setenv("RANKOPT_MODEL", str(model))
    monkeypatch.setenv("RANKOPT_WINDOWS", "8")
    monkeypatch.setenv("RANKOPT_LENGTH", "16")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "solvers")]))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any(output.output_type == "stream" for output in shown)
