"""The site's pages: what they show runs, what they link exists, what is public is in the reference.

A page is read from its top. Its blocks of Python share one namespace; those with a title are files,
and are written. Its shell blocks are rankopt's command line, run in this process. A block below
``<!-- run: slow -->`` starts processes of its own, or takes seconds: a slow test runs it, too.
"""

import contextlib
import dataclasses
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rankopt
import rankopt_solvers
from tests import tiny
from tests.cli.test_cli import exit_code

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
#: The README's shell lines are a block of the same kind, though indented.
README = "../README.md"
#: Not code.
SHOWN = ("toml", "text")
#: A page that needs a package which the tests do not install; it runs where that is there.
_NEEDS = re.compile(r"^<!-- needs: (\w+) -->$", re.MULTILINE)
_BLOCK = re.compile(
    r'^(<!-- run: slow -->\n)?^```(\w*)(?: title="([\w.]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    file: str = ""
    slow: bool = False


def blocks(text: str) -> list[Block]:
    found = [Block(m[2], m[4], m[3] or "", bool(m[1])) for m in _BLOCK.finditer(text)]
    assert text.count("```") == 2 * len(found), "a fence that is not understood"
    return found


def read(page: str) -> list[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    if page != README:
        return blocks(text)
    section = text.split("## On the command line\n")[1].split("\nEvery command has")[0]
    assert section.count("rankopt ") >= 10
    return [Block("bash", re.sub(r"^    ", "", section.strip("\n"), flags=re.MULTILINE))]


RUN = [page for page in PAGES if any(block.language not in SHOWN for block in read(page))]


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, as lists of arguments."""
    joined = text.replace("\\\n", " ").splitlines()
    return [found for line in joined if (found := shlex.split(line, comments=True))]


def run_page(found: list[Block], monkeypatch: pytest.MonkeyPatch, *, slow: bool) -> None:
    """All blocks of a page, in its order, in the working folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(found):
        if block.language in SHOWN or (block.slow and not slow):
            continue
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, f"block {number}", "exec"), names)
        else:
            assert block.language == "bash", f"block {number} is {block.language!r}"
            for command in commands(block.text):
                run_command(command, monkeypatch)


def run_command(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if command[:3] == ["python", "-m", "rankopt"]:
        command = command[2:]
    if command[0] == "torchrun":
        launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", *command[1:]]
        done = subprocess.run(launched, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return
    assert command[0] == "rankopt", f"{command[0]} is no command of ours"
    code = exit_code(monkeypatch, *command[1:])
    assert code == 0, f"exit code {code}: {shlex.join(command)}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages start from: ``model``, ``train.txt``, ``validation.txt``, ``heldout.txt``."""
    folder = tmp_path_factory.mktemp("docs")
    tiny.saved(tiny.llama(max_position_embeddings=256), folder / "model")
    generator = torch.Generator().manual_seed(0)
    for name, size in (("train", 2100), ("validation", 600), ("heldout", 800)):
        picked = torch.randint(len(tiny.WORDS), (size,), generator=generator).tolist()
        (folder / f"{name}.txt").write_text(tiny.text(picked), encoding="utf-8")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the page's own, from which Python imports, with the same files."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'solvers'}")
    monkeypatch.setenv("COLUMNS", "200")
    # Code of folders is copied there, and imported from there.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    return tmp_path


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    """Modules that a page has written are of that page."""
    before = set(sys.modules)
    yield
    written = {block.file.removesuffix(".py") for page in PAGES for block in read(page)}
    for name in written & set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("page", RUN)
def test_every_block_of_a_page_runs(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in _NEEDS.findall((DOCS / page).read_text(encoding="utf-8")):
        pytest.importorskip(package)
    run_page(read(page), monkeypatch, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.slow for block in read(page))]
)
def test_every_block_of_a_page_runs_those_with_processes_too(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(read(page), monkeypatch, slow=True)


@pytest.mark.slow
def test_the_readmes_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "demo").mkdir()
    (folder / "demo" / "model").symlink_to(folder / "model")
    (folder / "text.txt").symlink_to(folder / "train.txt")
    run_page(read(README), monkeypatch, slow=True)


@pytest.mark.parametrize(
    "text",
    [
        "```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n",
        "```bash\nrankopt plan missing.safetensors --keep 0.5\n```\n",
        "```bash\nrankopt doctor --json\nrankopt \\\n    no-such-command\n```\n",
        "```bash\nls\n```\n",
        "```sh\nrankopt doctor\n```\n",
        "    ```python\n    x = 1\n    ```\n",
    ],
)
def test_a_page_that_is_wrong_fails(
    text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(AssertionError):
        run_page(blocks(text), monkeypatch, slow=True)


def test_pages_that_must_be_there_are_and_have_something_to_run() -> None:
    how_to = {page for page in PAGES if page.startswith("how-to/")} - {"how-to/index.md"}
    assert len(how_to) >= 6
    assert {*how_to, "getting-started.md"} <= set(RUN)
    for page in (path for path in PAGES if path.startswith("concepts/")):
        assert re.search(r"!\[[^\]]+\]\([^)]+\.(svg|png)\)", (DOCS / page).read_text()), page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_of_the_repository(page: str) -> None:
    text = _BLOCK.sub("", (DOCS / page).read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        assert (DOCS / page).parent.joinpath(link).is_file(), link
    assert not re.search(r"https?://|src=", text)


@pytest.mark.parametrize(("page", "module"), [("api.md", rankopt), ("solvers.md", rankopt_solvers)])
def test_the_reference_has_every_public_name(page: str, module: Any) -> None:
    text = (DOCS / "reference" / page).read_text(encoding="utf-8")
    named = re.findall(rf"^::: {module.__name__}\.(\w+)$", text, flags=re.MULTILINE)
    assert sorted(named) == sorted(module.__all__)


def test_drawings_are_read_in_light_and_dark_and_fetch_nothing() -> None:
    drawings = list(DOCS.rglob("*.svg"))
    assert len(drawings) >= 6
    for path in drawings:
        text = path.read_text(encoding="utf-8")
        assert "currentColor" in text, path
        assert not re.search(r"<script|<image|href|url\(", text), path


def test_pages_that_are_planned_in_the_navigation_are_there() -> None:
    planned = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    named = set(re.findall(r"([\w./-]+\.md)$", planned, flags=re.MULTILINE))
    assert set(PAGES) <= named
