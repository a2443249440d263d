"""Pages that have their text elsewhere: manuals, results, notebooks, commands; and all links.

Links in pages are relative to the repository, so that they work there and in an editor, too. Here
they are led to the page that a file became, and what is no page is copied into the site: nothing
points out of it. A link to a file that does not exist is a warning, which ``--strict`` makes an
error.
"""

import html
import json
import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("mkdocs.hooks.generated")
#: Files of the repository that are pages, and where; those of experiments are found.
PAGES = {
    "rankopt/README.md": "reference/manual.md",
    "solvers/README.md": "reference/rankopt_solvers.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "experiments/README.md": "experiments/index.md",
    "experiments/LOG.md": "experiments/log.md",
}
#: The project's README has no page of its own: it says what the first page says, at more length.
HOME = {"README.md": "index.md", ".": "index.md"}
COMMANDS = "<!-- every command, from its own help -->"
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))|(?<=src=\")([^\"]+)(?=\")")
_FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)
_DRAWING = re.compile(r"^!\[([^\]]*)\]\(([^)\s]+\.svg)\)$", re.MULTILINE)


def _experiments() -> dict[str, str]:
    found = sorted((ROOT / "experiments").glob("*/README.md"))
    return {_name(path): f"experiments/{path.parent.name}.md" for path in found}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the experiments into the navigation, in the order of their numbers."""
    results = [{_title(ROOT / source): page} for source, page in _experiments().items()]
    for entry in config.nav or []:
        if "Results" in entry:
            entry["Results"][1:1] = results
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose text lies elsewhere in the repository."""
    for source, page in {**PAGES, **_experiments()}.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for source, page in _notebooks().items():
        files.append(File.generated(config, page, content=_shown(ROOT / source)))
    return files


def _notebooks() -> dict[str, str]:
    found = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    return {_name(path): f"notebooks/{path.stem}.md" for path in found}


def _shown(path: Path) -> str:
    """A notebook as Markdown: its texts, code, and what the code showed when it was run."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                picture = "".join(data["image/png"].split())
                parts.append(f'<img alt="chart" src="data:image/png;base64,{picture}">')
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and lead links to where their targets are in the site."""
    uri = page.file.src_uri
    pages = {**PAGES, **_experiments(), **_notebooks()}
    sources = {target: source for source, target in pages.items()}
    source = sources.get(uri, f"docs/{uri}")
    table = ROOT / posixpath.dirname(source) / "table.md"
    if uri in _experiments().values() and table.exists():
        # Its headings, if it has any, are below the one that it gets here.
        figures = re.sub(r"^#", "##", table.read_text(encoding="utf-8"), flags=re.MULTILINE)
        pictures = [f"![{path.stem}]({path.name})" for path in sorted(table.parent.glob("*.png"))]
        markdown += "\n\n".join(["", "## Figures", figures, *pictures])
    markdown = markdown.replace(COMMANDS, _commands() if COMMANDS in markdown else "")
    parts = _FENCE.split(markdown)
    for i in range(0, len(parts), 2):
        parts[i] = _DRAWING.sub(lambda found: _drawing(source, found), parts[i])
        parts[i] = _LINK.sub(lambda found: _linked(found[0], source, uri, config, files), parts[i])
    return "".join(parts)


def on_page_content(markup: str, **_: Any) -> str:
    """Let wide tables scroll by themselves, and be reached with the keyboard."""
    opened = '<div class="wide" tabindex="0" role="region" aria-label="table"><table>'
    return markup.replace("<table>", opened).replace("</table>", "</table></div>")


def _linked(link: str, source: str, uri: str, config: MkDocsConfig, files: Files) -> str:
    """A link as it is in the site."""
    target, hash_, anchor = link.partition("#")
    if ":" in target or not target:
        return link
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if wanted.startswith("docs/"):
        found = _notebooks().get(wanted, wanted.removeprefix("docs/"))
    else:
        found = _page_of(wanted)
        if found is None:
            path = ROOT / wanted
            if not path.is_file():
                LOG.warning("%s: there is no %s", source, wanted)
                return link
            # A copied one would be taken for a page that nobody made.
            if path.suffix == ".md":
                LOG.warning("%s: %s has no page in this site to link to", source, wanted)
                return link
            found = f"files/{wanted}"
            if files.get_file_from_path(found) is None:
                files.append(File.generated(config, found, abs_src_path=str(path)))
    if wanted.endswith("/table.md") and not anchor:
        hash_, anchor = "#", "figures"
    return posixpath.relpath(found, posixpath.dirname(uri) or ".") + hash_ + anchor


def _page_of(wanted: str) -> str | None:
    pages = {**HOME, **PAGES, **_experiments()}
    if wanted.endswith("/table.md"):
        wanted = wanted.replace("table.md", "README.md")
    return pages.get(wanted, pages.get(f"{wanted}/README.md"))


def _drawing(source: str, found: re.Match[str]) -> str:
    """A drawing in the page itself, where it has the page's colours."""
    path = ROOT / posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
    if not path.is_file():
        LOG.warning("%s: there is no %s", source, found[2])
        return found[0]
    drawn = path.read_text(encoding="utf-8").strip()
    label = html.escape(found[1])
    drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    drawn = re.sub(r">\s*\n\s*<", "><", drawn)
    return f'<figure class="drawing">{drawn}</figure>'


def _commands() -> str:
    """All commands of the command line, as their own help has them."""
    sys.path[:0] = [str(ROOT), str(ROOT / "solvers")]
    try:
        import typer

        from rankopt.cli.app import app
    finally:
        del sys.path[:2]
    group: Any = typer.main.get_command(app)
    outer = typer.Context(group, info_name="rankopt")
    return "\n\n".join(
        _command(command, typer.Context(command, info_name=name, parent=outer))
        for name, command in group.commands.items()
    )


def _command(command: Any, context: Any) -> str:
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"## {context.info_name}", "", command.help.strip(), ""]
    lines += ["```text", f"{context.command_path} {usage}", "```", ""]
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is not None:
            names, said = record
            lines.append(f"- `{names}`: {_plain(said)}")
    return "\n".join([*lines, "", *_epilog(command.epilog or "")])


def _plain(text: str) -> str:
    """Text in which stars and brackets are neither Markdown nor HTML."""
    return re.sub(r"([*_\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _epilog(text: str) -> list[str]:
    """Examples as a block, the rest as text."""
    lines: list[str] = []
    inside = False
    for line in text.replace("\b\n", "").splitlines():
        if line.startswith("  ") != inside:
            inside = not inside
            lines += ["", "```bash"] if inside else ["```", ""]
        lines.append(line.removeprefix("  "))
    return [*lines, "```"] if inside else lines
