"""The file: whole, closed to what is in it, small, and nobody else's."""

import base64
import hashlib
import html.parser
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from rankopt.errors import MissingExtraError, OptionError, RankoptError
from rankopt.report import write_pictures, write_report
from tests.report import made


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", {}))


def elements(path: Path) -> Elements:
    return Elements(path.read_text(encoding="utf-8"))


def data(path: Path) -> Any:
    return json.loads(elements(path).scripts[0])


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    profile = made.renamed(
        made.synthetic_profile(), made.HOSTILE, "</title><script>alert(0)</script>"
    )
    path = tmp_path / "hostile.html"
    named = dict(zip(made.HOSTILE, made.plans(profile).values(), strict=False))
    write_report(path, profile, named, made.results(profile, "<b>calibration</b>"))
    return path


def test_names_of_layers_and_plans_are_text_whatever_is_in_them(
    hostile: Path, tmp_path: Path
) -> None:
    profile = made.transformer(layers=4)
    write_report(tmp_path / "plain.html", profile, made.plans(profile), made.results(profile))
    found, plain = elements(hostile), elements(tmp_path / "plain.html")
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert len(found.scripts) == 3 and found.scripts[1:] == plain.scripts[1:]
    for text in (*made.HOSTILE[:2], "<svg onload", "<b>cal", "alert(0)</script"):
        assert text not in hostile.read_text(encoding="utf-8")
    names = [layer["name"] for layer in data(hostile)["layers"]]
    assert names == [*made.HOSTILE[:2], made.HOSTILE[2].replace("\u202e", "\\u202e"),
                     made.HOSTILE[3]]  # fmt: skip


def test_only_the_scripts_of_the_page_may_run_and_nothing_is_fetched(hostile: Path) -> None:
    found = elements(hostile)
    (policy,) = [
        about["content"]
        for tag, about in found.tags
        if tag == "meta" and about.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    digests = [hashlib.sha256(script.encode()).digest() for script in found.scripts[1:]]
    assert rules["script-src"].split() == [
        f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests
    ]
    assert rules["default-src"] == "'none'" and "connect-src" not in rules
    linked = [(tag, about) for tag, about in found.tags if {"src", "href"} & set(about)]
    assert {about["href"] for _, about in linked} == {"#content"}


def test_six_hundred_layers_are_below_five_megabytes(tmp_path: Path) -> None:
    profile = made.transformer(layers=600)
    write_report(tmp_path / "r.html", profile, made.plans(profile), made.results(profile))
    assert (tmp_path / "r.html").stat().st_size < 5_000_000
    assert len(data(tmp_path / "r.html")["layers"]) == 600


def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path) -> None:
    profile = made.transformer(layers=4)
    path = tmp_path / "r.html"
    path.touch()
    write_report(path, profile)
    write_report(path, profile, made.plans(profile))
    assert len(data(path)["plans"]) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["r.html"]
    for text in ("<!doctype html>\n<html><head><title>my page</title>", "notes", "<"):
        path.write_text(text)
        with pytest.raises(RankoptError, match="no such file of rankopt"):
            write_report(path, profile)
        assert path.read_text() == text


def test_pictures_are_png_in_a_folder_of_their_own(tmp_path: Path) -> None:
    profile = made.transformer(layers=8)
    folder = tmp_path / "figures"
    names = write_pictures(folder, profile, made.plans(profile), made.results(profile))
    assert names == ["frontier.png", "layer.png", "ranks_1.png", "ranks_2.png", "predicted.png"]
    for name in names:
        head = (folder / name).read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", head[16:])
        assert 300 < width < 4000 and 200 < height < 4000
    with pytest.raises(RankoptError, match="--force"):
        write_pictures(folder, profile)
    assert write_pictures(folder, profile, overwrite=True) == ["frontier.png", "layer.png"]
    assert write_pictures(folder, profile, only={"layer.png"}, overwrite=True) == ["layer.png"]
    assert [path.name for path in folder.glob("*.png")] == ["layer.png"]
    with pytest.raises(OptionError, match=r"no picture predicted\.png; there are frontier\.png"):
        write_pictures(folder, profile, only={"predicted.png"}, overwrite=True)
    (folder / "notes.txt").write_text("a week of notes")
    with pytest.raises(RankoptError, match=r"notes\.txt"):
        write_pictures(folder, profile, overwrite=True)


def test_pictures_do_not_replace_a_model_nor_a_model_pictures(tmp_path: Path) -> None:
    from rankopt.files import MODEL, PICTURES, whole_folder

    for kind, other in ((MODEL, PICTURES), (PICTURES, MODEL)):
        with whole_folder(tmp_path / kind, kind=kind) as fresh:
            (fresh / "config.json").write_text("{}")
        with (
            pytest.raises(RankoptError, match="not written by rankopt"),
            whole_folder(tmp_path / kind, True, other),
        ):
            pass


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankopt.report import vega

    vega.script.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    for write in (write_report, write_pictures):
        with pytest.raises(MissingExtraError, match=r"rankopt\[report\]"):
            write(tmp_path / "r", made.transformer(layers=4))
    assert not list(tmp_path.iterdir())
