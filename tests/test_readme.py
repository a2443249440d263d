"""The README's Python example, run as printed."""

import re
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[1]


def test_readme_example_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(example.strip().splitlines()) <= 14
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    model = tmp_path / "demo" / "model"
    tiny.llama(max_position_embeddings=256).save_pretrained(model)
    tiny.tokenizer(model)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example, names)
    assert "exact plan" in capsys.readouterr().out
    assert names["smaller"].num_parameters() == names["plan"].size.model  # type: ignore[attr-defined]


def test_readme_is_short_and_its_files_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) < 150
    for link in re.findall(r"\]\(([^)]+)\)", readme):
        assert (ROOT / link).exists(), link


def test_readme_table_is_the_one_that_the_experiment_wrote() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = (ROOT / "experiments" / "00_main_job" / "table.md").read_text(encoding="utf-8")
    figures, _made = table.strip().rsplit("\n\n", 1)
    assert figures in readme


def test_the_table_of_backends_is_the_experiments() -> None:
    printed = (ROOT / "rankopt" / "README.md").read_text(encoding="utf-8")
    shown = printed.split("<!-- backends -->\n")[1].split("<!-- /backends -->")[0]
    made = (ROOT / "experiments" / "05_backends" / "table.md").read_text(encoding="utf-8")
    _dense, figures, _made = made.strip().split("\n\n")
    assert shown.strip() == figures
