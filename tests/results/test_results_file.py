"""The results file: read strictly, written whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from rankopt.errors import RankoptError, ResultsError
from rankopt.results import Results
from tests.results.test_summary import results


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = results()
    found.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == found
    found.save(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, 'no "format": "rankopt-results"'),
        ({"format_version": 2}, "results format 2; this rankopt reads 1"),
        ({"format_version": True}, "results format True"),
        ({"extra": 1}, "extra"),
        ({"calibrations": []}, "a calibration that is not among them"),
        ({"layers": []}, "ranks of 0 layers"),
    ],
)
def test_what_is_malformed_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    content = results().model_dump(mode="json") | change
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(ResultsError, match=said):
        Results.load(tmp_path / "r.json")


def test_ranks_and_examples_must_add_up(tmp_path: Path) -> None:
    content = results().model_dump(mode="json")
    plan = content["plans"][0]
    for change, said in (
        ({"size": plan["size"] | {"planned": 1}}, "the ranks have"),
        ({"ranks": plan["ranks"][:-1]}, "ranks of 4 layers"),
        ({"measured": plan["measured"] | {"examples": 3}}, "30 values for 3 examples"),
        ({"strategy": content["plans"][1]["strategy"]}, "there twice"),
    ):
        changed = content | {"plans": [plan | change, *content["plans"][1:]]}
        (tmp_path / "r.json").write_text(json.dumps(changed))
        with pytest.raises(ResultsError, match=said):
            Results.load(tmp_path / "r.json")


def test_nothing_else_is_read_or_replaced(tmp_path: Path) -> None:
    other = tmp_path / "notes.json"
    with pytest.raises(ResultsError, match="no results at"):
        Results.load(other)
    for text in ("[1]", "{", "", "\xff\xfe"):
        other.write_text(text, encoding="latin-1")
        with pytest.raises(ResultsError, match=r"not results|is not text"):
            Results.load(other)
    other.write_text('{"mine": 1}')
    with pytest.raises(RankoptError, match="not replaced"):
        results().save(other)
    assert other.read_text() == '{"mine": 1}'
