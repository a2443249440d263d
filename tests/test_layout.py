"""Bounds on the packages that CONTRIBUTING states: files, lines and private signatures."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path
    for source in ("rankopt", "solvers/rankopt_solvers")
    for path in (ROOT / source).rglob("*.py")
)
PACKAGES = sorted({path.parent for path in MODULES})


def private_functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
            found = node.args
            named = [*found.posonlyargs, *found.args, *found.kwonlyargs]
            count = len([argument for argument in named if argument.arg not in ("self", "cls")])
            yield f"{path.relative_to(ROOT)}:{node.name}", count


def test_packages_have_at_most_16_files() -> None:
    counts = {str(package): len(list(package.glob("*.py"))) for package in PACKAGES}
    assert len(counts) >= 13
    assert max(counts.values()) <= 16, counts


def test_modules_have_at_most_400_lines() -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for path in MODULES}
    assert max(lengths.values()) <= 400, max(lengths, key=lambda path: lengths[path])


def test_private_functions_take_at_most_12_parameters() -> None:
    counts = dict(found for path in MODULES for found in private_functions(path))
    assert len(counts) > 100
    assert max(counts.values()) <= 12, max(counts, key=lambda name: counts[name])


@pytest.mark.parametrize("package", ["model", "measure", "apply", "refinement", "evaluation"])
def test_faces_of_torch_packages_hold_a_docstring_only(package: str) -> None:
    """An import there would import torch, or transformers while it is half imported."""
    tree = ast.parse((ROOT / "rankopt" / package / "__init__.py").read_text(encoding="utf-8"))
    assert len(tree.body) == 1 and ast.get_docstring(tree)
