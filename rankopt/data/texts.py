"""Texts and words of rows, as a tokenizer can take them, and the tokens it makes of them."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

from rankopt.errors import DataError, first_line

#: What was done with rows that could not be taken as they are -> their numbers, from 1.
Notes = defaultdict[str, list[int]]

REPLACED = "surrogates are no text: pairs are read as their character, halves as U+FFFD"
NO_TEMPLATE = "the tokenizer has no chat template, messages are read as lines 'role: content'"
_ROLES = {"human": "user", "gpt": "assistant"}


def say(source: str, notes: Mapping[str, list[int]]) -> None:
    """One line on stderr for each kind of note."""
    for what, rows in notes.items():
        tqdm.write(f"note: {source}, {_counted(rows)}: {what}", file=sys.stderr)


def _counted(rows: list[int]) -> str:
    listed = ", ".join(map(str, rows[:8]))
    if len(rows) == 1:
        return f"row {listed}"
    return f"{len(rows)} rows ({listed}{', ...' if len(rows) > 8 else ''})"


def texts_of(
    source: str, values: Iterable[tuple[int, Any]], name: str, tokenizer: Any, notes: Notes
) -> list[str]:
    """Texts of a column; chats through the tokenizer's template.

    Args:
        source: for errors.
        values: of the column, with their rows, from 0.
        name: of the column, for errors.
        tokenizer: its chat template is used.
        notes: of what was replaced.

    Raises:
        DataError: a value is neither, or its template refuses a chat.
    """
    texts = []
    for row, value in values:
        where = f"{source}, row {row + 1}"
        text = _chat(where, value, tokenizer, row, notes) if _is_chat(value) else value
        if not isinstance(text, str):
            raise DataError(f"{where}: {name!r} is not text: {value!r:.60}")
        texts.append(_noted(text, row, notes))
    return texts


def words_of(where: str, values: list[Any], row: int, notes: Notes) -> list[str]:
    """Words of a row, from 0.

    Raises:
        DataError: one is no text.
    """
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise DataError(f"{where}: word {number} is not text: {value!r:.60}")
    return [_noted(value, row, notes) for value in values]


def valid(text: str) -> str:
    """Text without halves of surrogate pairs, which no encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _noted(text: str, row: int, notes: Notes) -> str:
    clean = valid(text)
    if clean != text and row + 1 not in notes[REPLACED]:
        notes[REPLACED].append(row + 1)
    return clean


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(
            isinstance(each, Mapping) and ("role" in each or {"from", "value"} <= each.keys())
            for each in value
        )
    )


def _chat(where: str, value: Any, tokenizer: Any, row: int, notes: Notes) -> str:
    messages = [
        dict(each)
        if "role" in each
        else {"role": _ROLES.get(str(each["from"]), each["from"]), "content": each["value"]}
        for each in value
    ]
    # Tokenizers that keep their template elsewhere have no such attribute.
    if getattr(tokenizer, "chat_template", tokenizer) is None:
        notes[NO_TEMPLATE].append(row + 1)
        return "\n".join(f"{each['role']}: {_content(where, each)}" for each in messages)
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        # A template is a program of the tokenizer's author.
        said = first_line(error)
        raise DataError(f"{where}: the chat template refuses the messages: {said}") from error
    # Most templates write what the tokenizer puts before every text itself.
    for token in tokenizer.convert_ids_to_tokens(affixes(tokenizer)[0]):
        text = text.removeprefix(token)
    return text


def _content(where: str, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list | tuple) and all(isinstance(each, Mapping) for each in content):
        content = "".join(str(each.get("text", "")) for each in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: the content of a message is not text: {content!r:.60}")
    return content


def affixes(tokenizer: Any, sample: str = "") -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer itself puts before and behind every text: it is asked.

    Args:
        tokenizer: of the model.
        sample: a text to ask with; a letter if it is empty, or the tokenizer knows none of it.
    """
    for text in (sample, "x"):
        bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        whole = list(tokenizer(text, verbose=False)["input_ids"])
        for start in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
    return [], []


def tokenized(where: str, tokenizer: Any, *texts: Any, **how: Any) -> Any:
    """What the tokenizer makes of texts.

    Raises:
        DataError: it refuses them.
    """
    try:
        return tokenizer(*texts, **how)
    except Exception as error:
        # Tokenizers are written in several languages, each with errors of its own.
        raise DataError(f"{where}: the tokenizer cannot take it: {first_line(error)}") from error


def words_tokenized(
    where: str, tokenizer: Any, words: list[str], max_length: int
) -> tuple[dict[str, Any], list[int | None]]:
    """The encoding of words, and the word that each token is of; None for the tokenizer's own.

    Raises:
        DataError: the tokenizer refuses them, or does not say which word a token is of.
    """
    encoding = tokenized(
        where, tokenizer, words, is_split_into_words=True, truncation=True, max_length=max_length
    )
    if getattr(tokenizer, "is_fast", False):
        return dict(encoding), list(encoding.word_ids())
    # Tokenizers written in Python go word by word and keep no record of it.
    before, behind = affixes(tokenizer, words[0])
    pieces = [
        (piece, number)
        for number, word in enumerate(words)
        for piece in tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))
    ]
    ids = list(encoding["input_ids"])
    kept = max(len(ids) - len(before) - len(behind), 0)
    left = getattr(tokenizer, "truncation_side", "right") == "left"
    pieces = pieces[max(len(pieces) - kept, 0) :] if left else pieces[:kept]
    if ids != [*before, *(piece for piece, _ in pieces), *behind]:
        raise DataError(
            f"{where}: {type(tokenizer).__name__} does not say which word a token is of: token "
            "classification needs a fast tokenizer (one with a tokenizer.json)"
        )
    of = [number for _, number in pieces]
    return dict(encoding), [*(None for _ in before), *of, *(None for _ in behind)]
