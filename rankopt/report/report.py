"""The report: one HTML file with everything in it, and its charts as pictures.

The page needs no network: script, style and data lie in it, and its content security policy
forbids the rest. Scripts run only if they have the sha256 that the policy names, so that whatever
a layer or a strategy is called, it is never run. The data are JSON, in which no ``<`` is left that
could end their element; the page's script makes text of them, never HTML.

A file is taken for a report of ours, which may be replaced, by its first lines: they are always
the same.
"""

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path

from rankopt.errors import OptionError
from rankopt.files import PICTURES, whole_file, whole_folder
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from rankopt.report import vega
from rankopt.report.charts import PAPER, Spec
from rankopt.report.content import Content, content_of, layer_data, ranks_data
from rankopt.results.results import Results

#: What every report begins with.
HEAD = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="generator" content="rankopt-report">\n'
)
#: Width of a picture in points.
_WIDTH = 620


def write_report(
    path: str | os.PathLike[str],
    profile: Profile,
    plans: Mapping[str, Plan] | None = None,
    results: Results | None = None,
    *,
    against: str | None = None,
    layer: str | None = None,
) -> None:
    """Write one HTML file that can be opened, sent and printed; it needs no network.

    Args:
        path: of the file; one that is there is replaced if it is a report.
        profile: what was measured.
        plans: name -> plan that was made from the profile.
        results: what was measured of plans of the same model.
        against: the strategy of the results that all others are compared with.
        layer: whose losses are shown first; by default the first plan's worst.

    Raises:
        PlanError: a plan of another model, or of another profile.
        ResultsError: results of another model, or no such strategy.
        OptionError: no such layer, or ``against`` without results.
        MissingExtraError: the library that draws is not there, or scipy is not.
        RankoptError: something is there that is no report, or the system refuses.
    """
    script = vega.script()
    content = content_of(profile, plans or {}, results, against, layer)
    text = _page(content, script)
    with whole_file(path, is_report) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_pictures(
    folder: str | os.PathLike[str],
    profile: Profile,
    plans: Mapping[str, Plan] | None = None,
    results: Results | None = None,
    *,
    layer: str | None = None,
    only: Collection[str] | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write the charts of a report as PNG, for papers; without a browser.

    Args:
        folder: new or empty, or pictures of before if ``overwrite`` is set.
        profile: see write_report, as all that follow.
        plans: see write_report.
        results: see write_report.
        layer: whose losses are drawn.
        only: names of the files that are wanted; all if None.
        overwrite: replace a folder of such pictures.

    Returns:
        Names of the files: ``frontier.png``, ``layer.png``, ``ranks_N.png`` of each plan (of each
        row of the results, if there are no plans), ``predicted.png`` if there are results.

    Raises:
        OptionError: a name that no picture has.
        RankoptError: see write_report; and the folder has something else in it.
    """
    vega.require_library()
    drawn = _drawn(content_of(profile, plans or {}, results, None, layer, PAPER))
    if only is not None:
        if unknown := sorted(set(only) - drawn.keys()):
            raise OptionError(f"no picture {', '.join(unknown)}; there are {', '.join(drawn)}")
        drawn = {name: spec for name, spec in drawn.items() if name in only}
    with whole_folder(folder, overwrite, PICTURES) as fresh:
        for name, spec in drawn.items():
            (fresh / name).write_bytes(vega.picture(spec))
    return list(drawn)


def is_report(path: Path) -> bool:
    """Whether a file is a report, or empty."""
    with open(path, "rb") as file:
        return file.read(len(HEAD)) in (b"", HEAD.encode())


def _drawn(content: Content) -> dict[str, Spec]:
    """Each chart with its data, by the name of its picture."""
    charts, views, first = content["charts"], content["views"], content["first"]
    plans = [k for k, plan in enumerate(content["plans"]) if plan["given"]]
    found = {
        "frontier.png": charts["frontier"][0]["log"]
        | {"width": _WIDTH, "datasets": views[0]["frontier"]},
        "layer.png": charts["layer"][0]["log"]
        | {
            "width": _WIDTH,
            "title": content["layers"][first]["name"],
            "datasets": layer_data(content, 0, first),
        },
    }
    for number, plan in enumerate(plans or range(len(content["plans"])), start=1):
        found[f"ranks_{number}.png"] = charts["ranks"] | {
            "title": content["plans"][plan]["name"],
            "datasets": ranks_data(content, plan),
        }
    if content.get("points"):
        found["predicted.png"] = charts["predicted"]["log"] | {
            "width": _WIDTH,
            "datasets": {"points": content["points"], "diagonal": content["diagonal"]["log"]},
        }
    return found


def _page(content: Content, library: str) -> str:
    files = resources.files("rankopt.report")
    style, script, page = (
        (files / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html")
    )
    library = _closed(library)
    filled = {
        "policy": _policy(library, script),
        "title": html.escape(content["title"]),
        "style": style,
        "library": library,
        "script": script,
        "data": _data(content),
    }
    # In one pass: what is filled in is not looked at again.
    return HEAD + re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], page)


def _policy(*scripts: str) -> str:
    """Only these scripts run, and nothing is fetched from anywhere."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    named = " ".join(f"'sha256-{base64.b64encode(each).decode()}'" for each in digests)
    return (
        f"default-src 'none'; script-src {named}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _closed(script: str) -> str:
    """A library's script without what would end its element, or hide its end, in strings of it."""
    ended = re.sub(r"</(?=script)", r"<\\/", script, flags=re.IGNORECASE)
    # The parser makes line ends of carriage returns, which are not what was hashed.
    return ended.replace("<!--", r"\x3c!--").replace("\r", "\n")


def _data(content: Content) -> str:
    """JSON in which nothing ends its element or begins another."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
