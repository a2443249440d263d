"""Mixtures: exact counts, an order of which every prefix is the mixture, every mistake named."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rankopt import Profile, profile_model
from rankopt.data import Columns, DataSource, load_batches, load_mixture, mixture
from rankopt.data.mixtures import interleaved, shares
from rankopt.errors import DataError, OptionError
from tests import tiny

CASES = [
    [random.Random(seed).randint(1, 40) for _ in range(1 + seed % 7)] for seed in range(60)
] + [[1, 1], [1, 99], [1, 1, 98], [50], [7] * 9]


@pytest.mark.parametrize(
    ("weights", "examples", "counts"),
    [
        ([1, 1], 256, [128, 128]),
        ([1, 1, 1], 256, [86, 85, 85]),
        ([3, 1], 6, [5, 1]),
        ([0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ([1e308, 1e308], 4, [2, 2]),
        ([5, 3, 1], 7, [4, 2, 1]),
    ],
)
def test_counts_are_the_largest_remainders(
    weights: list[float], examples: int, counts: list[int]
) -> None:
    assert shares(weights, [1000] * len(weights), examples) == counts


@pytest.mark.parametrize("seed", range(20))
def test_without_a_number_it_is_the_most_of_which_no_source_lacks_any(seed: int) -> None:
    drawn = random.Random(seed)
    weights = [drawn.randint(1, 4) for _ in range(3)]
    available = [drawn.randint(8, 30) for _ in range(3)]
    counts = shares(weights, available)
    assert all(count <= n for count, n in zip(counts, available, strict=True))
    for more in range(sum(counts) + 1, 100):
        assert any(map(int.__gt__, shares(weights, available, more), available))


@pytest.mark.parametrize("counts", CASES, ids=str)
def test_every_prefix_is_the_mixture_to_less_than_one_example(counts: list[int]) -> None:
    order = interleaved(counts)
    assert [order.count(n) for n in range(len(counts))] == counts
    assert order == interleaved(counts)
    bound = 1 - 1 / max(2 * len(counts) - 2, 1)
    for k in range(len(order) + 1):
        for number, count in enumerate(counts):
            share = count * k / len(order)
            assert abs(order[:k].count(number) - share) <= bound + 1e-9


def test_items_are_taken_at_equal_distances_in_their_order() -> None:
    found = mixture([range(100), range(100, 200)], [3, 1], 8)
    assert [x for x in found if x < 100] == [0, 16, 33, 50, 66, 83]
    assert [x for x in found if x >= 100] == [100, 150]
    assert mixture([[1, 2], [3, 4, 5]]) == mixture([[1, 2], [3, 4, 5]], [1, 1], 4)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1, 0], "weight=0: a weight is a number above 0"),
        ([1, -2], "weight=-2: a weight"),
        ([1, math.nan], "weight=nan: a weight"),
        ([1, math.inf], "weight=inf: a weight"),
        ([1], "1 weights for 2 sources"),
        ([1, 2, 3], "3 weights for 2 sources"),
        ([1000, 1], "source 2 gives none of 8 examples with weight 1 of 1001"),
    ],
)
def test_weights_that_are_none_are_named(weights: list[float], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        mixture([range(9), range(9)], weights, 8)
    with pytest.raises(OptionError, match="needs sources"):
        mixture([])


@pytest.fixture
def texts(tmp_path: Path) -> list[DataSource]:
    """The same kind of text in three formats, under two names of columns."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_text("the cat sees " * 40, encoding="utf-8")
    rows = [{"body": "a dog likes " * 20, "label": 0} for _ in range(3)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    datasets.Dataset.from_list([{"text": "small red bird " * 40}]).to_parquet(
        tmp_path / "c.parquet"
    )
    return [
        DataSource(str(tmp_path / "a.txt")),
        DataSource(str(tmp_path / "b.jsonl"), Columns("body")),
        DataSource(str(tmp_path / "c.parquet")),
    ]


def mixed(sources: list[DataSource], **more: Any) -> Any:
    how = {"max_length": 8, "batch_size": 3, **more}
    return load_mixture(sources, tiny.tokenizer(), "causal-lm", **how)


def test_formats_are_mixed_window_by_window(texts: list[DataSource]) -> None:
    found = mixed(texts, weights=[2, 1, 1], examples=12)
    windows = torch.cat([batch["input_ids"] for batch in found])
    assert [len(batch["input_ids"]) for batch in found] == [3, 3, 3, 3]
    for number, source in enumerate(texts):
        one = load_batches(
            source.source, tiny.tokenizer(), "causal-lm", columns=source.columns,
            max_length=8, examples=(6, 3, 3)[number],
        )  # fmt: skip
        own = windows[torch.tensor(found.order) == number]
        assert torch.equal(own, torch.cat([batch["input_ids"] for batch in one]))
    assert list(found.order) == interleaved([6, 3, 3])
    assert str(found).startswith(f"6 of {texts[0].source}, 3 of ")


def test_a_source_that_is_too_short_gives_all_and_says_so(
    texts: list[DataSource], capsys: pytest.CaptureFixture[str]
) -> None:
    found = mixed(texts[:2], weights=[4, 1], examples=40)
    assert [found.order.count(n) for n in range(2)] == [15, 8]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {texts[0].source} gives 15 examples, 32 were wanted")


def test_the_same_twice_and_an_empty_source_are_named(
    texts: list[DataSource], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"a\.txt is given twice"):
        mixed([texts[0], DataSource(f"{tmp_path}/./a.txt")])
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(DataError, match=r"d\.txt: the text has 0 tokens"):
        mixed([texts[0], DataSource(str(tmp_path / "d.txt"))])
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(DataError, match=r"e\.jsonl has no rows"):
        mixed([texts[0], DataSource(str(tmp_path / "e.jsonl"))])


def labelled(path: Path, labels: list[Any]) -> DataSource:
    rows = [{"text": "the cat " * (n + 1), "label": label} for n, label in enumerate(labels)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return DataSource(str(path))


def test_rows_are_padded_together_and_tasks_do_not_mix(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    one = labelled(tmp_path / "a.jsonl", [0, 1, 0, 1])
    two = labelled(tmp_path / "b.jsonl", [2, 2, 2, 2])
    found = load_mixture([one, two], tokenizer, "sequence-classification", examples=6)
    assert torch.cat([batch["labels"] for batch in found]).tolist() == [0, 2, 1, 2, 0, 2]
    assert found[0]["attention_mask"].sum(1).tolist() == [2, 2, 4, 4]
    names = {"bad": 0, "good": 1}
    with pytest.raises(DataError, match=r"b\.jsonl, row 1: the label 2 is not a class number"):
        load_mixture([one, two], tokenizer, "sequence-classification", label2id=names)
    (tmp_path / "c.txt").write_text("the cat")
    with pytest.raises(DataError, match=r"c\.txt has no column 'label'"):
        load_mixture([one, DataSource(str(tmp_path / "c.txt"))], tokenizer, "regression")
    several = labelled(tmp_path / "d.jsonl", [[0.5, 1.0]] * 4)
    with pytest.raises(DataError, match=r"d\.jsonl has 2 labels a row, .* has one label"):
        load_mixture([one, several], tokenizer, "regression")
    words = [
        [{"text": ["the", "cat"], "label": [0, n]}, {"text": ["a"], "label": [1]}] for n in (0, 1)
    ]
    for name, rows in zip(("e", "f"), words, strict=True):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both = [DataSource(str(tmp_path / f"{name}.jsonl")) for name in ("e", "f")]
    (batch,) = load_mixture(both, tokenizer, "token-classification")
    assert batch["labels"].shape == (4, 2)


def test_a_profile_records_what_it_has_seen_and_goes_on_with_the_same_bits(
    texts: list[DataSource], tmp_path: Path
) -> None:
    model = tiny.llama()
    found = mixed(texts, weights=[2, 1, 1], examples=24)
    whole = profile_model(model, found)
    assert [(x.name, x.weight, x.examples) for x in whole.info.sources or ()] == [
        (source.source, weight, count)
        for source, weight, count in zip(texts, (2.0, 1.0, 1.0), (12, 6, 6), strict=True)
    ]
    whole.save(tmp_path / "p.st")
    loaded = Profile.load(tmp_path / "p.st")
    assert loaded.info == whole.info and loaded.digest() == whole.digest()
    assert profile_model(model, list(found)).info.sources is None

    early = profile_model(model, found, stop=lambda *_: ([], "enough"))
    counts = [x.examples for x in early.info.sources or ()]
    assert early.examples == sum(counts) == 12 and counts == [6, 3, 3]

    class Stopped(Exception):
        pass

    class Cut(type(found)):  # type: ignore[misc]
        def __iter__(self) -> Any:
            yield from itertools.islice(iter(self.batches), 5)
            raise Stopped

    cut = Cut(found.batches, found.names, found.weights, found.order)
    checkpoint = {"checkpoint": tmp_path / "p.partial", "checkpoint_every": 2}
    with pytest.raises(Stopped):
        profile_model(model, cut, **checkpoint)
    assert (tmp_path / "p.partial").exists()
    again = profile_model(model, mixed(texts, weights=[2, 1, 1], examples=24), **checkpoint)
    assert again.digest() == whole.digest()
    other = mixed(texts, weights=[1, 1, 2], examples=24)
    profile_model(model, found, **checkpoint)
    with pytest.raises(DataError):
        profile_model(model, other, **checkpoint)
