"""Batches of every type people have are read, or refused in a line that says what a batch is."""

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from rankopt import DataError, evaluate, profile_model
from rankopt.data.digest import data_digest
from tests import tiny

IDS = torch.randint(3, tiny.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Tokens:
    """A batch as somebody's own class."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None


READ: dict[str, Callable[[], Any]] = {
    "dictionary": lambda: [{"input_ids": IDS}],
    "lists of numbers": lambda: [{"input_ids": IDS.tolist()}],
    "numpy": lambda: [{"input_ids": IDS.numpy(), "labels": IDS.numpy().astype("int32")}],
    "rows": lambda: [{"input_ids": list(IDS)}],
    "encoding": lambda: [BatchEncoding({"input_ids": IDS})],
    "user's dictionary": lambda: [collections.UserDict({"input_ids": IDS})],
    "dataclass": lambda: [Tokens(IDS)],
    "generator": lambda: ({"input_ids": ids} for ids in [IDS]),
    "loader": lambda: DataLoader([{"input_ids": ids} for ids in IDS], batch_size=3),  # type: ignore[arg-type]
    "nothing of a name": lambda: [{"input_ids": IDS, "attention_mask": None}],
}


@pytest.mark.parametrize("kind", READ)
def test_batches_of_every_type_give_the_same(kind: str) -> None:
    model = tiny.llama()
    wanted = evaluate(model, READ["dictionary"](), progress=False)
    assert evaluate(model, READ[kind](), progress=False) == wanted
    assert wanted.targets == 3 * 8


def test_a_digest_of_numbers_is_that_of_tensors() -> None:
    model = tiny.llama()
    profile = profile_model(model, READ["lists of numbers"](), progress=False, keep_bases=False)
    assert profile.info.data_digest == data_digest(model, READ["dictionary"]())


REFUSED: dict[str, tuple[Any, str]] = {
    "one batch": ({"input_ids": IDS}, "give a list of them"),
    "one encoding": (BatchEncoding({"input_ids": IDS}), "give a list of them"),
    "text": ("train.jsonl", "list of dictionaries of tensors"),
    "path": (Path("train.jsonl"), "list of dictionaries of tensors"),
    "none": (None, "given as None"),
    "number": (3, "give a list of batches"),
    "tuple": ([(IDS, IDS)], "batch 1 is a value of type tuple: a batch is a dictionary"),
    "tensor": ([IDS], r"batch 1 is a Tensor of shape \(3, 9\): a batch is a dictionary"),
    "tensor alone": (IDS, "batch 1 is a Tensor"),
    "texts": ([{"input_ids": IDS, "text": ["a", "b", "c"]}], "'text' holds texts: tokenise"),
    "ragged": ([{"input_ids": [[3, 4, 5], [3, 4]]}], "no rectangle of numbers: pad"),
    "one row": ([{"input_ids": IDS[0]}], r"\(9,\); \(B, T\) is wanted"),
    "no rows": ([{"input_ids": IDS[:0]}], "batch 1 has no examples"),
    "other rows": ([{"input_ids": IDS, "labels": IDS[:1]}], "of 1 examples for input_ids of 3"),
    "other length": ([{"input_ids": IDS, "labels": IDS[:, 1:]}], r"\(3, 8\); a label for each"),
    "moved": (
        [{"input_ids": IDS, "labels": torch.cat([IDS[:, 1:], IDS[:, :1] * 0 - 100], 1)}],
        "the token after the next",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_batch_is_refused(kind: str) -> None:
    given, complaint = REFUSED[kind]
    model = tiny.llama()
    for measure in (profile_model, evaluate):
        with pytest.raises(DataError, match=complaint):
            measure(model, given, progress=False)


def out_of(place: tuple[int, int], value: int) -> torch.Tensor:
    changed = IDS.clone()
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("batch", "complaint"),
    [
        (
            {"input_ids": out_of((1, 2), 64)},
            "token 64 in example 2; the embedding has rows 0 to 63",
        ),
        ({"input_ids": out_of((2, 0), -1)}, "token -1 in example 3"),
        ({"input_ids": IDS, "labels": out_of((1, 2), 900)}, "label 900 in example 2; .* 0 to 63"),
        (
            {"input_ids": IDS, "labels": IDS.masked_fill(torch.arange(3)[:, None] == 1, -100)},
            "example 2 has nothing to predict",
        ),
        (
            {"input_ids": IDS, "attention_mask": (torch.arange(9) < 1).expand(3, -1)},
            "example 1 has nothing to predict",
        ),
    ],
)
def test_what_is_out_of_range_is_named_with_batch_and_example(
    batch: dict[str, Any], complaint: str
) -> None:
    model = tiny.llama()
    for measure in (profile_model, evaluate):
        with pytest.raises(DataError, match=f"batch 2.*{complaint}"):
            measure(model, [{"input_ids": IDS}, batch], progress=False)


MULTI = {"num_labels": 3, "problem_type": "multi_label_classification"}
ANSWERS = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize("labels", [ANSWERS, ANSWERS.bool(), ANSWERS.double(), ANSWERS.tolist()])
def test_yes_or_no_answers_may_be_whole_numbers(labels: Any) -> None:
    model = tiny.bert(**MULTI)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, ANSWERS.float())
    found = evaluate(model, [{"input_ids": IDS, "labels": labels}], progress=False)
    assert found.task == "multi-label-classification" and found.targets == 9
    assert found.loss == pytest.approx(float(wanted), rel=1e-6)


def test_what_a_classifiers_labels_are_is_decided_anew_by_each_data_set() -> None:
    model = tiny.bert(num_labels=3)
    several = [{"input_ids": IDS, "labels": ANSWERS.float()}]
    one = [{"input_ids": IDS, "labels": torch.tensor([0, 2, 1])}]
    first = evaluate(model, several, progress=False)
    assert model.config.problem_type is None
    assert (first.task, first.targets) == ("multi-label-classification", 9)
    other = evaluate(model, one, progress=False)
    assert (other.task, other.targets) == ("sequence-classification", 3)
    profile = profile_model(model, several, progress=False, keep_bases=False)
    assert (profile.info.task, profile.info.targets) == ("multi-label-classification", 9)
    assert evaluate(model, several, progress=False) == first
    assert model.config.problem_type is None


@pytest.mark.parametrize(
    ("settings", "labels", "complaint"),
    [
        (MULTI, ANSWERS[:, 0], r"\(3,\): 3 yes-or-no answers .* not class numbers"),
        (MULTI, ANSWERS[:, :2], r"\(3, 2\): 3 yes-or-no answers"),
        (MULTI, 2 * ANSWERS, "2 in example 1; an answer is 0 or 1"),
        (MULTI, -100 * ANSWERS, "-100 in example 1"),
        ({"num_labels": 3}, ANSWERS, "one class an example is wanted"),
        ({"num_labels": 3}, torch.tensor([0.0, 0.5, 1.0]), "no whole numbers"),
        ({"num_labels": 3}, torch.tensor([0, 3, 1]), "label 3 in example 2; .* 0 to 2"),
        ({"num_labels": 3}, torch.tensor([0, -100, 1]), "example 2 has nothing to predict"),
        ({"num_labels": 1}, ANSWERS, "for 1 numbers an example"),
    ],
)
def test_labels_of_another_shape_or_value_are_refused(
    settings: dict[str, Any], labels: torch.Tensor, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        evaluate(tiny.bert(**settings), [{"input_ids": IDS, "labels": labels}], progress=False)


def test_numbers_of_half_the_bits_are_numbers() -> None:
    labels = np.array([1, 2, 4], dtype="int16")
    model = tiny.bert(num_labels=1)
    found = evaluate(model, [{"input_ids": IDS, "labels": labels}], progress=False)
    with torch.no_grad():
        wanted = (model(input_ids=IDS).logits[:, 0] - torch.tensor([1.0, 2.0, 4.0])).square().mean()
    assert found.loss == pytest.approx(float(wanted), rel=1e-6)
