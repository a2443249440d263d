"""Files that went wrong: edits of bytes, JSON, safetensors and tables, drawn by hypothesis.

An edit is a few small numbers and an odd value; what it does depends on what it is applied to, so
one strategy serves all files. A structured file is sealed again (lengths, sha256) after an edit, so
that the edit gets past the first check.
"""

import copy
import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st


class Edit(NamedTuple):
    """One change.

    Attributes:
        kind: which change; taken modulo the number of kinds there are.
        where: position, as a share of what there is.
        length: of what is cut, copied or inserted.
        value: to put there.
    """

    kind: int
    where: float
    length: int
    value: Any


#: Text of JSON values that ``json.dumps`` does not write; standing in for them is @RAW n@.
RAW = (
    "NaN", "-Infinity", "1e999", "-0", "1e-400", "9" * 5000, "1" + "0" * 400, "01", "0.1.2",
    "[" * 100_000, "[" * 2000 + "]" * 2000, '{"a":' * 2000 + "1" + "}" * 2000, '"\\ud800"',
    '"\\u0000"', '"' + "x" * 100_000 + '"', "true", "", "'a'",
)  # fmt: skip
ODD = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**53 + 1, 2**62, 2**63, -(2**63), 2**64, 10**30, 0.5,
    1e308, -1e308, 5e-324, 1e-300, -0.0, "", "0", " ", "\x00", "\u2028", "../../escaped", "/etc/x",
    "a\nb", "[bold]", "\x1b[31m", "é", "\U0001f600", [], {}, [[]], [None], {"": 0}, "BF16",
    "F8_E4M3", "I64", "F64", "BOOL", [0, 0], [0, 8], [8, 0], [2**40], [2**62, 2**62], "nan",
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.integers(0, len(RAW) - 1).map("@RAW {}@".format),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12).filter(lambda text: "@" not in text),
)


def _edits(high: int, low: int, value: Any) -> list[Edit]:
    """One to three edits, evenly drawn; of hypothesis's value one makes use, or none."""
    drawn = random.Random(high << 24 | low)

    def other() -> Any:
        odd, raw = drawn.choice(ODD), f"@RAW {drawn.randrange(len(RAW))}@"
        number = drawn.choice(
            [drawn.randrange(-9, 99), drawn.random(), 10.0 ** drawn.randrange(300)]
        )
        return drawn.choice([value, value, odd, odd, raw, number])

    return [
        Edit(drawn.randrange(256), drawn.random(), drawn.choice([0, 1, 2, 7, 64, 999]), other())
        for _ in range(drawn.randint(1, 3))
    ]


#: Hypothesis draws numbers of up to 24 bits evenly, and prefers what it has drawn before to larger.
_HALF = st.integers(0, 2**24 - 1)
EDITS = st.builds(_edits, _HALF, _HALF, VALUES)


def change_bytes(content: bytes, edits: list[Edit], other: bytes) -> bytes:
    """Flipped, cut, inserted, copied, truncated, spliced with another file."""
    for edit in edits:
        at = int(edit.where * len(content))
        head, tail, n = content[:at], content[at:], edit.length
        changed = (
            head + bytes([tail[0] ^ (1 << n % 8)]) + tail[1:] if tail else head,
            head + tail[n:],
            head + text_of(edit.value).encode(errors="surrogatepass") + tail[n:],
            head + tail[:n] * 3 + tail[n:],
            head,
            tail,
            head + other[at : at + n] + tail,
            head + b"\x00" * n + tail,
            head + b"\xff\xfe\xef\xbb\xbf\r\n\x0c"[n % 8 :] + tail,
            head + b'"\\[{,:\t'[n % 7 :][:1] + tail[1:],
        )
        content = changed[edit.kind % len(changed)]
    return content


def change_json(tree: Any, edits: list[Edit]) -> Any:
    """Values replaced, keys renamed, repeated, removed, parts exchanged; the tree is its own."""
    for kind, where, length, drawn in edits:
        value, places = copy.deepcopy(drawn), list(_places(tree))
        if not places:
            return value
        holder, key = places[min(int(where * len(places)), len(places) - 1)]
        there, twin = places[(int(where * len(places)) + length) % len(places)]
        match kind % 8:
            case 0 | 1:
                holder[key] = value
            case 2:
                holder[key] = _near(holder[key], length, value)
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[str(value)] = holder.pop(key)
            case 4 | 5 if isinstance(holder, list):
                holder[key:key] = [holder[key]] * (1 + length)
            case 5:
                holder[f"@AGAIN@{key}"] = holder[key]
            case 6:
                holder[key] = json.loads(json.dumps(there[twin]))
            case _:
                holder[key] = [holder[key]] if length % 2 else {"": holder[key]}
    return tree


def _near(there: Any, how: int, value: Any) -> Any:
    """A number that is a little or a lot off; of what is no number, another value."""
    if isinstance(there, bool) or not isinstance(there, int | float):
        return value
    return {0: -there, 1: there + 1, 2: there * 2, 7: there * 2**62, 64: there - 1}.get(how, 0)


def _places(tree: Any) -> Any:
    inside = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
    for key, value in inside:
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def text_of(tree: Any) -> str:
    """JSON, with what only a broken writer writes."""
    text = json.dumps(tree, ensure_ascii=False).replace('"@AGAIN@', '"')
    for n, raw in enumerate(RAW):
        text = text.replace(f'"@RAW {n}@"', raw)
    return text


def change_lines(content: bytes, edits: list[Edit], change: Callable[[str, Edit], str]) -> bytes:
    """Lines removed, repeated, exchanged, or changed one by one."""
    lines = content.decode().split("\n")
    for edit in edits:
        at = min(int(edit.where * len(lines)), len(lines) - 1)
        match edit.kind % 6:
            case 0:
                del lines[at : at + 1 + edit.length % 3]
            case 1:
                lines[at:at] = [lines[at]] * (1 + edit.length % 8)
            case 2:
                lines[at], lines[at // 2] = lines[at // 2], lines[at]
            case _:
                lines[at] = change(lines[at], edit)
        lines = lines or [""]
    return "\n".join(lines).encode(errors="surrogatepass")


def json_line(line: str, edit: Edit) -> str:
    """A line of JSON, changed as JSON; one that an edit has spoilt stays as it is."""
    try:
        return text_of(change_json(json.loads(line), [edit]))
    except (ValueError, RecursionError, TypeError):
        return line


def table_line(separator: str) -> Callable[[str, Edit], str]:
    """A line of a table, with another cell, one cell more or one less."""

    def change(line: str, edit: Edit) -> str:
        cells = line.split(separator)
        at = edit.length % len(cells)
        cells[at : at + edit.kind % 2 + (edit.length == 2)] = [text_of(edit.value)]
        return separator.join(cells)

    return change


class Tensors(NamedTuple):
    """A safetensors file in its parts: the header, without its metadata, these, and the data."""

    header: dict[str, Any]
    metadata: dict[str, Any]
    data: bytearray

    @classmethod
    def of(cls, content: bytes) -> "Tensors":
        """Take a sound file apart."""
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        metadata = header.pop("__metadata__", {})
        return cls(header, metadata, bytearray(content[8 + size :]))

    def to_bytes(self, claimed: int | None = None) -> bytes:
        """Put them together, perhaps under a wrong length of the header."""
        header = text_of({"__metadata__": self.metadata, **self.header}).encode(errors="replace")
        size = len(header) if claimed is None else claimed % 2**64
        return size.to_bytes(8, "little") + header + bytes(self.data)


def change_data(parts: Tensors, edits: list[Edit], numbers: list[bytes]) -> None:
    """Numbers of the tensors replaced, aligned to eight bytes."""
    for edit in edits:
        at = int(edit.where * (len(parts.data) // 8)) * 8
        number = numbers[edit.kind % len(numbers)]
        for k in range(1 + edit.length % 64):
            if at + 8 * k + 8 <= len(parts.data):
                parts.data[at + 8 * k : at + 8 * k + 8] = number
