"""The data options are written once: every command has all of them, with a few differences."""

import gzip
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from rankopt.cli import app
from rankopt.cli.data import READING, DataOptions, with_data
from rankopt.errors import DataError
from tests import tiny

GROUP: Any = typer.main.get_command(app)
DEFAULTS = {"split": None, "text_column": ["text"], "pair_column": None,
            "label_column": ["label"], "examples": None, "max_length": None,
            "batch_size": 4}  # fmt: skip
MIXED = {"weight": None, "resample": None}
BESIDE = {"also": None, "no_also": False}


@pytest.mark.parametrize(
    ("command", "needed", "examples", "more"),
    [("profile", True, 256, MIXED), ("plan", False, None, MIXED),
     ("compare", False, None, BESIDE), ("evaluate", True, None, BESIDE),
     # A batch is a step.
     ("refine", True, 256, {**MIXED, "batch_size": 1})],
)  # fmt: skip
def test_every_command_has_the_data_options(
    command: str, needed: bool, examples: int | None, more: dict[str, Any]
) -> None:
    params = {param.name: param for param in GROUP.commands[command].params}
    assert params["data"].required is needed
    found = {name: params[name].default for name in READING if name in params}
    assert found == {**DEFAULTS, **more, "examples": examples}
    for name in found:
        assert params[name].opts == [f"--{name.replace('_', '-')}"] and params[name].help
    assert "asked" not in params


def test_a_command_is_handed_one_value_in_the_place_of_its_parameter() -> None:
    seen: list[Any] = []

    @with_data(needed=False, about="What for.", examples=3)
    def command(first: int, asked: DataOptions, *, last: str = "z") -> None:
        """What it does."""
        seen.append((first, asked, last))

    names = list(inspect.signature(command).parameters)
    assert names == ["first", "data", *(x for x in READING if x not in MIXED), "last"]
    assert command.__doc__ == "What it does."
    command(first=1, data=["d.txt"], last="y", **{**DEFAULTS, **BESIDE, "examples": 3})
    assert seen == [(1, DataOptions(data=("d.txt",), examples=3), "y")]


def test_the_model_is_looked_at_before_the_data(tmp_path: Path) -> None:
    from rankopt.errors import ModelError

    with pytest.raises(ModelError, match="does not exist"):
        DataOptions(data=(str(tmp_path / "none.txt"),)).read(str(tmp_path / "none"))


def test_data_is_cut_and_padded_as_the_model_takes_it(tmp_path: Path) -> None:
    tiny.roberta(pad_token_id=1, max_position_embeddings=20).save_pretrained(tmp_path / "m")
    tiny.tokenizer(tmp_path / "m")
    data = tmp_path / "d.jsonl.gz"
    rows = [{"text": "cat " * count, "label": count % 2} for count in (50, 3)]
    data.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    _, (batch,) = DataOptions(data=(str(data),)).read(str(tmp_path / "m")).load("float32")
    assert batch["input_ids"].shape == (2, 18)
    # The model's own padding, by which it counts positions; the tokenizer's is another.
    assert batch["input_ids"][1].tolist() == [5, 5, 5, *[1] * 15]
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, *[0] * 15]
    with pytest.raises(DataError, match="max_length=19: the model takes at most 18 tokens"):
        DataOptions(data=(str(data),), max_length=19).read(str(tmp_path / "m")).load("float32")


def test_tokenizer_of_another_model_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    tiny.llama(vocab_size=14).save_pretrained(tmp_path / "m")
    tiny.tokenizer(tmp_path / "m")
    (tmp_path / "d.txt").write_text("the cat sees and " * 40)
    asked = DataOptions(data=(str(tmp_path / "d.txt"),), max_length=8)
    _, batches = asked.read(str(tmp_path / "m")).load("float32")
    assert batches[0]["input_ids"].shape == (4, 8)
    (tmp_path / "d.txt").write_text("the cat under " * 40)
    with pytest.raises(DataError, match=r"token 14 \('under'\), the model's embedding has 14 rows"):
        asked.read(str(tmp_path / "m")).load("float32")
