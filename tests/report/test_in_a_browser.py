"""The page in a browser: it draws, sorts, searches, fits a phone, and fetches nothing."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankopt.report import write_report
from tests.report import made

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to open a report in")
#: No sandbox, which containers do not have, and nothing that a browser does by itself.
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclasses.dataclass
class Opened:
    """A page that is open, and what happened in it."""

    page: Any
    said: list[str]
    asked: list[str]

    def texts(self, selector: str) -> list[str]:
        return [each.strip() for each in self.page.locator(selector).all_inner_texts()]

    def value(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    profile = made.transformer()
    write_report(folder / "r.html", profile, made.plans(profile), made.results(profile))
    write_report(folder / "bare.html", profile)
    large = made.transformer(layers=600)
    write_report(folder / "large.html", large, made.plans(large))
    hostile = made.renamed(made.synthetic_profile(), made.HOSTILE, "<script>alert(0)</script>")
    named = dict(zip(made.HOSTILE, made.plans(hostile).values(), strict=False))
    write_report(folder / "hostile.html", hostile, named, made.results(hostile, made.HOSTILE[0]))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    # Settings of a display or a session bus are somebody else's.
    left = ("PATH", "HOME", "TMPDIR", "LANG")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=BROWSER,
            args=list(OPTIONS),
            env={name: os.environ[name] for name in left if name in os.environ},
        )
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Any, files: Path) -> Iterator[Any]:
    contexts = []

    def open_page(name: str = "r.html", width: int = 1280, **settings: Any) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 800}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        found = Opened(page, [], [])
        page.on("console", lambda message: found.said.append(message.text))
        page.on("pageerror", lambda error: found.said.append(str(error)))
        page.on("dialog", lambda dialog: (found.said.append("a dialog"), dialog.dismiss()))
        page.on("request", lambda request: found.asked.append(request.url))
        page.goto((files / name).as_uri())
        page.wait_for_selector("html[data-ready=yes]")
        return found

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", ["r.html", "bare.html", "hostile.html", "large.html"])
def test_pages_draw_without_a_word_and_without_a_request(
    opened: Any, files: Path, name: str
) -> None:
    found = opened(name)
    assert found.said == []
    assert found.asked == [(files / name).as_uri()]
    drawn = ["frontier-chart", "layer-chart"] + ["ranks-chart"] * (name != "bare.html")
    for chart in drawn:
        assert found.value(f"document.querySelectorAll('#{chart} svg path').length") > 5
    hidden = found.texts("section[hidden]")
    assert (len(hidden) > 0) == (name in ("bare.html", "large.html"))


def test_hostile_names_are_shown_as_they_are(opened: Any) -> None:
    found = opened("hostile.html")
    assert found.value("document.querySelectorAll('img, main i, main b').length") == 0
    names = found.texts("#layers-table tbody th")
    assert names[:2] == list(made.HOSTILE[:2])
    for number in range(4):
        found.page.select_option("select[data-state=layer]", str(number))
    found.page.locator("#ranks-chart svg .mark-rect path").first.hover()
    found.page.wait_for_selector("#vg-tooltip-element.visible")
    assert made.HOSTILE[0] in found.page.locator("#vg-tooltip-element").inner_text()
    assert found.said == []


def test_the_table_sorts_by_every_column_both_ways(opened: Any) -> None:
    found = opened()
    heads = found.texts("#layers-table thead button")
    assert heads == ["layer", "kind", "shape", "parameters", "rank", "kept", "retained", "margin"]
    kept = heads.index("kept")
    for way, order in (("ascending", False), ("descending", True)):
        found.page.locator("#layers-table thead button").nth(kept).click()
        ways = found.value(
            "[...document.querySelectorAll('#layers-table thead th')].map(h => h.ariaSort)"
        )
        assert ways == ["none"] * kept + [way] + ["none"] * (len(heads) - kept - 1)
        cells = found.texts(f"#layers-table tbody tr td:nth-child({kept + 1})")
        shares = [float(cell.rstrip(" %")) for cell in cells]
        assert shares == sorted(shares, reverse=order) and len(set(shares)) > 2
    # By the keyboard, and the focus stays.
    found.page.keyboard.press("Enter")
    assert found.value("document.activeElement.closest('th').ariaSort") == "ascending"


def test_the_search_filters_and_the_plan_changes_the_table(opened: Any) -> None:
    found = opened()
    found.page.get_by_label("Search").fill("MLP.up")
    shown = found.texts("#layers-table tbody tr:not([hidden]) th")
    assert len(shown) == 4 and all("mlp.up_proj" in name for name in shown)
    assert found.texts("#found") == ["4 of 16 layers"]
    before = found.texts("#layers-table tbody tr:not([hidden]) td:nth-child(5)")
    found.page.locator("#layers select").select_option(label="even")
    assert len(found.texts("#layers-table tbody tr:not([hidden]) th")) == 4
    assert found.texts("#layers-table tbody tr:not([hidden]) td:nth-child(5)") != before
    assert found.page.locator("#ranks select").input_value() == "1"


def test_a_layer_is_chosen_by_list_map_and_table(opened: Any) -> None:
    found = opened()
    line = "document.querySelector('#layer-chart svg .mark-line path').getAttribute('d')"
    curves, words = set(), []

    def look(name: str) -> None:
        found.page.wait_for_function(
            "name => document.querySelector('#layer-words').textContent.startsWith(name + ':')",
            arg=name,
        )
        found.page.wait_for_function("before => !before.includes(" + line + ")", arg=list(curves))
        curves.add(found.value(line))
        words.append(found.texts("#layer-words")[0])

    found.page.locator("#layer select").first.select_option(label="model.layers.1.mlp.up_proj")
    look("model.layers.1.mlp.up_proj")
    found.page.locator("#ranks-chart svg .mark-rect path").nth(0).click()
    look("model.layers.0.self_attn.q_proj")
    found.page.get_by_role("button", name="lm_head").click()
    look("lm_head")
    assert len(curves) == 3 and len(set(words)) == 3
    assert [text.split(":")[0] for text in found.texts("#layer-ranks li")] == ["best", "even"]
    assert found.said == []


def test_scales_and_views_redraw(opened: Any) -> None:
    found = opened()
    drawn = "document.querySelector('#frontier-chart svg').outerHTML"
    seen = [found.value(drawn)]
    for section, select, label in (
        ("frontier", "select[data-scale=frontier]", "linear"),
        ("layer", "select[data-state=view]", "svd, scale frobenius"),
    ):
        found.page.locator(f"#{section} {select}").select_option(label=label)
        found.page.wait_for_function("before => " + drawn + " !== before", arg=seen[-1])
        seen.append(found.value(drawn))
    assert len(set(seen)) == 3
    assert "squared weights" in seen[-1] and found.said == []


@pytest.mark.parametrize("name", ["r.html", "bare.html", "hostile.html", "large.html"])
def test_a_phone_never_scrolls_sideways(opened: Any, name: str) -> None:
    found = opened(name, width=390)
    assert found.value("document.documentElement.scrollWidth") == 390
    # What is wide scrolls in a box of its own, which the keyboard reaches.
    assert found.value("[...document.querySelectorAll('.scroll')].every(b => b.tabIndex === 0)")


def test_what_is_pointed_at_on_a_phone_is_told_on_the_screen(opened: Any) -> None:
    found = opened(width=390)
    found.page.locator("#ranks-chart svg .mark-rect path").nth(2).hover()
    found.page.wait_for_selector("#vg-tooltip-element.visible")
    box = found.page.locator("#vg-tooltip-element").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_dark_and_light_by_the_system_and_by_the_button(opened: Any) -> None:
    def colours(found: Opened) -> tuple[str, str, str]:
        style = "getComputedStyle(document.querySelector('{}')).{}"
        label = "#frontier-chart svg .role-axis-title text"
        return (
            found.value(style.format("body", "backgroundColor")),
            found.value(style.format("h1", "color")),
            found.value(style.format(label, "fill")),
        )

    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    by_day, by_night = colours(light), colours(dark)
    assert all(a != b for a, b in zip(by_day, by_night, strict=True))
    assert by_day[1] == by_day[2] and by_night[1] == by_night[2]
    light.page.get_by_role("button", name="Show in dark colours").click()
    dark.page.get_by_role("button", name="Show in light colours").click()
    assert (colours(light), colours(dark)) == (by_night, by_day)
    # Paper is white, whatever the screen is.
    light.page.emulate_media(media="print")
    assert colours(light) == by_day


def test_headings_labels_and_heads_of_tables_are_there(opened: Any) -> None:
    found = opened()
    assert found.value("document.querySelectorAll('h1').length") == 1
    assert found.value(
        "[...document.querySelectorAll('section')].every(s => s.querySelector('h2'))"
    )
    assert found.value(
        "[...document.querySelectorAll('select, input')].every(s => s.labels.length)"
    )
    assert found.value("[...document.querySelectorAll('th')].every(h => h.scope)")
    assert found.value("document.documentElement.lang") == "en"
