"""What a tokenizer is given, and what it makes of it: chats, words, windows, rows left out."""

from typing import Any

import pytest
import torch

from rankopt.data.batches import load_batches, text_batches
from rankopt.errors import DataError, OptionError
from rankopt.model.tasks import IGNORED
from tests import tiny

NAMES = {"a": 0, "b": 1, "c": 2}
MULTI = "multi-label-classification"
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees"}]


def load(task: str, rows: Any, tokenizer: Any = None, **more: Any) -> list[Any]:
    return load_batches("F", tokenizer or tiny.tokenizer(), task, rows=rows, **more)


def with_affixes(before: str, behind: str = "") -> Any:
    """The tiny tokenizer, which then puts special tokens around every text."""
    from tokenizers import processors

    made = tiny.tokenizer()
    table = made.get_vocab()
    special = [(token, table[token]) for token in {*before.split(), *behind.split()}]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {behind}".strip(), special_tokens=special
    )
    return made


def slow() -> Any:
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


@pytest.mark.parametrize(("before", "count"), [("", 0), ("<unk>", 1), ("<unk> the", 2)])
def test_windows_begin_as_the_tokenizer_begins_a_text(before: str, count: int) -> None:
    plain, asked = tiny.tokenizer(), with_affixes(before, "<pad>")
    texts = [" ".join(tiny.WORDS), " ".join(tiny.WORDS[::-1])]
    first, second = (plain(text)["input_ids"] for text in texts)
    tokens = [*first, plain.eos_token_id, *second]
    size = 6 - count
    wanted = [
        [*asked(before)["input_ids"][count:-1], *tokens[start : start + size]]
        for start in range(0, len(tokens) // size * size, size)
    ]
    (batch,) = text_batches(texts, asked, 6, 99)
    assert batch["input_ids"].tolist() == wanted
    labels = batch.get("labels", batch["input_ids"])
    # The first token is never predicted; what else the tokenizer always writes is not learnt from.
    assert (labels == IGNORED).sum() == (len(wanted) * count if count > 1 else 0)


def test_window_that_only_the_tokenizer_fills_is_refused() -> None:
    with pytest.raises(OptionError, match="max_length=2 leaves no token of the text"):
        text_batches(["the cat"], with_affixes("<unk> the"), 2)


def test_separator_is_what_the_tokenizer_puts_behind_if_there_is_no_end_of_text() -> None:
    made = with_affixes("", "<unk>")
    made.eos_token = None
    (batch,) = text_batches(["the", "a"], made, 3)
    assert made.convert_ids_to_tokens(batch["input_ids"][0]) == ["the", "<unk>", "a"]


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_chat_is_written_by_the_template_and_begins_once(task: str) -> None:
    made = with_affixes("<eos>")
    made.chat_template = (
        "<eos>{% for m in messages %}{{ m['content'] }}"
        "{% if loop.last and m['role'] == 'user' %}{{ raise_exception('no answer') }}{% endif %}"
        " {% endfor %}"
    )
    (batch,) = load(task, [{"text": CHAT, "label": 0}], made, max_length=4)
    assert made.convert_ids_to_tokens(batch["input_ids"][0]) == ["<eos>", "the", "cat", "sees"]
    with pytest.raises(DataError, match=r"F, row 1: the chat template refuses.*no answer"):
        load(task, [{"text": CHAT[:1], "label": 0}], made)


@pytest.mark.parametrize(
    "chat", [CHAT, [{"from": "user", "value": "the cat"}, {"from": "gpt", "value": "sees"}]]
)
def test_chat_without_a_template_is_lines(chat: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Plain:
        """Letters are tokens."""

        eos_token_id, chat_template = None, None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(map(ord, text))}

    (batch,) = load("causal-lm", [{"text": chat}], Plain(), max_length=29)
    assert "".join(map(chr, batch["input_ids"][0])) == "user: the cat\nassistant: sees"
    assert "F, row 1: the tokenizer has no chat template" in capsys.readouterr().err


def test_surrogates_are_joined_or_replaced_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    pair = "\ud83d\ude00"
    rows = [{"text": "a \ud83d", "label": 0}, {"text": pair, "label": 0}]
    (batch,) = load("sequence-classification", rows, slow())
    expected = [slow()(text)["input_ids"] for text in ("a \ufffd", "\U0001f600")]
    assert [row[row != 0].tolist() for row in batch["input_ids"]] == expected
    assert "F, 2 rows (1, 2): surrogates are no text" in capsys.readouterr().err
    words = [{"text": ["\udc00"], "label": [0]}]
    assert load("token-classification", words, slow())[0]["input_ids"].shape == (1, 4)


def test_rows_with_nothing_to_predict_are_skipped_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = {"text": "", "label": 0}
    rows = [empty, {"text": "cat", "label": 1}, {"text": "dog", "label": 0}, empty, empty]
    for size, counts in ((1, [1, 1]), (4, [2])):
        batches = load("sequence-classification", rows, batch_size=size)
        assert [len(batch["labels"]) for batch in batches] == counts
        assert "F, 3 rows (1, 4, 5): skipped" in capsys.readouterr().err
    words: list[dict[str, Any]] = [
        {"text": ["cat"], "label": [IGNORED]},
        {"text": [], "label": []},
        {"text": ["the", "cat", "sees"], "label": ["-100", IGNORED, 1]},
        {"text": ["dog", "sees"], "label": [IGNORED, "b"]},
    ]
    (batch,) = load("token-classification", words, max_length=2, label2id=NAMES)
    assert batch["labels"].tolist() == [[IGNORED, 1]]
    assert "F, 3 rows (1, 2, 3): skipped" in capsys.readouterr().err
    with pytest.raises(DataError, match="F: none of the 3 rows taken has anything to predict"):
        load("token-classification", words[:3], max_length=2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [tiny.tokenizer, slow])
def test_labels_of_words_stay_with_their_words(make: Any, side: str) -> None:
    made = make()
    made.padding_side = made.truncation_side = side
    words = ["cat", "dog", "tree"]
    rows = [{"text": words, "label": [0, 1, 2]}, {"text": ["a"], "label": [2]}]
    longest = 2 if make is tiny.tokenizer else 8  # the last byte is the end of text
    (batch,) = load("token-classification", rows, made, max_length=longest)
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert bool((batch["labels"][batch["attention_mask"] == 0] == IGNORED).all())
    taken = [row[row != IGNORED].tolist() for row in batch["labels"]]
    if make is tiny.tokenizer:
        assert taken == [[1, 2] if side == "left" else [0, 1], [2]]
    else:
        assert taken == [[1, 2] if side == "left" else [0, 1, 2], [2]]
    at = (batch["labels"][1] != IGNORED).nonzero().item()
    assert batch["input_ids"][1, at] == made(["a"], is_split_into_words=True)["input_ids"][0]


def test_words_that_are_no_text_are_named() -> None:
    for word in (1999, None, ["x"]):
        with pytest.raises(DataError, match=r"F, row 1: word 2 is not text: "):
            load("token-classification", [{"text": ["In", word], "label": [0, 1]}])


def test_tokenizer_that_keeps_no_record_of_words_is_refused() -> None:
    class Joined:
        """Tokens of a whole text are not those of its words."""

        chat_template = None

        def __call__(self, text: Any, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [len("".join(text))]}

        def tokenize(self, word: str) -> list[str]:
            return list(word)

        def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
            return list(map(ord, tokens))

    with pytest.raises(DataError, match=r"Joined does not say which word.*fast tokenizer"):
        load("token-classification", [{"text": ["a", "b"], "label": [0, 1]}], Joined())


@pytest.mark.parametrize(
    ("label", "answers"),
    [([1, 0, 1], [1, 0, 1]), ("[0, 1.0, 0.5]", [0, 1, 0.5]), (["a", "c"], [1, 0, 1]),
     ('["b"]', [0, 1, 0]), ("b", [0, 1, 0]), ([True, False, False], [1, 0, 0])],
)  # fmt: skip
def test_several_labels_are_answers_or_names(label: Any, answers: list[float]) -> None:
    (batch,) = load(MULTI, [{"text": "cat", "label": label}], label2id=NAMES)
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [answers]


@pytest.mark.parametrize("label", [1, "x", None, [0, 1], [0, 1, 2], [0, None, 1], ["a", "x"], {}])
def test_one_class_is_no_answer_for_several(label: Any) -> None:
    wanted = "F, row 1: the label .* is not a list of 3 answers from 0 to 1, or of names among a, b"
    with pytest.raises(DataError, match=wanted):
        load(MULTI, [{"text": "cat", "label": label}], label2id=NAMES)


def test_regression_takes_several_numbers_a_row() -> None:
    rows = [{"text": "cat", "label": "[1.5, -2]"}, {"text": "dog", "label": [0, 3]}]
    (batch,) = load("regression", rows)
    assert batch["labels"].tolist() == [[1.5, -2.0], [0.0, 3.0]]
    with pytest.raises(DataError, match="F, row 3: one labels, the rows before it have 2"):
        load("regression", [*rows, {"text": "cat", "label": 1}])


@pytest.mark.parametrize("label", [1e39, 10**400, "1e400", [float("inf")], "1,5", []])
def test_number_that_float32_cannot_hold_is_refused(label: Any) -> None:
    with pytest.raises(DataError, match=r"row 1: the label .* is not a number"):
        load("regression", [{"text": "cat", "label": label}])


def test_texts_of_different_length_need_a_padding_token() -> None:
    made = tiny.tokenizer()
    made.pad_token = None
    rows = [{"text": "the cat", "label": 0}, {"text": "dog", "label": 1}]
    with pytest.raises(DataError, match=r"no padding token.*batch_size=1"):
        load("sequence-classification", rows, made)
    shapes = [b["input_ids"].shape[1] for b in load("regression", rows, made, batch_size=1)]
    assert shapes == [2, 1]
