"""Everything that rankopt reads: a sound file, how it goes wrong, and what is done with it.

Used by ``tests/test_faults.py`` and by ``experiments/08_faults``.
"""

import dataclasses
import functools
import hashlib
import json
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from rankopt import Plan, Profile, make_plan
from rankopt.errors import RankoptError
from rankopt.profile.info import ProfileInfo
from rankopt.profile.profile import _canonical
from rankopt.profile.tensors import DTYPES, sha256_of
from rankopt_solvers import Group, Problem
from tests.mutations import (
    EDITS,
    Edit,
    Tensors,
    change_bytes,
    change_data,
    change_json,
    change_lines,
    json_line,
    table_line,
    text_of,
)
from tests.synthetic import full_profile

NUMBERS = [
    struct.pack("<d", x) for x in (np.nan, np.inf, -np.inf, -1.0, 0.0, 5e-324, 1e308, -0.0)
] + [struct.pack("<q", x) for x in (-1, 0, 1, 2**62, 2**63 - 1)]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A kind of file.

    Attributes:
        suffix: of its name.
        content: of a sound one.
        wrong: strategy for contents that may be wrong.
        use: reads a file and does what a user would do with what was read.
        errors: that ``use`` may raise.
    """

    suffix: str
    content: bytes
    wrong: st.SearchStrategy[bytes]
    use: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = (RankoptError,)


def _wrong(
    content: bytes, *structured: Callable[[list[Edit]], bytes], other: bytes = b""
) -> st.SearchStrategy[bytes]:
    changes = [*structured, lambda edits: change_bytes(content, edits, other or content[::-1])]
    return st.tuples(st.sampled_from(changes), EDITS).map(lambda drawn: drawn[0](drawn[1]))


def plan() -> Reader:
    """Plans."""
    content = make_plan(full_profile(), keep=0.7).to_json().encode()

    def use(path: Path) -> None:
        found = Plan.load(path)
        str(found)
        assert Plan.from_json(found.to_json()) == found

    def structured(edits: list[Edit]) -> bytes:
        return text_of(change_json(json.loads(content), edits)).encode(errors="surrogatepass")

    return Reader(".json", content, _wrong(content, structured, structured), use)


def profile() -> Reader:
    """Profiles."""
    with tempfile.TemporaryDirectory() as folder:
        full_profile().save(Path(folder) / "p")
        content = (Path(folder) / "p").read_bytes()

    def use(path: Path) -> None:
        from rankopt.cli.tables import profile_summary

        found = Profile.load(path)
        profile_summary(found)
        for backend in found.backends:
            for layer in found.info.layers:
                for member in layer.members:
                    dict(found.kept(backend, member))
        for how in ({}, {"objective": "maxmin"}, {"solver": "uniform"}, {"solver": "threshold"}):
            made = make_plan(found, keep=0.7, **how)  # type: ignore[arg-type]
            assert made.size.planned <= made.budget.parameters
            assert Plan.from_json(made.to_json()) == made

    def sealed(parts: Tensors) -> bytes:
        try:
            info = ProfileInfo.from_json(text_of(parts.metadata["rankopt"]))
            digest = hashlib.sha256(_canonical(info).encode())
            for name, about in sorted(parts.header.items()):
                kind = name.rpartition("/")[2].partition(".")
                if not kind[1] or kind[0] in ("losses", "ranks"):
                    digest.update(bytes.fromhex(sha256_of(name, _array(parts, about))))
            parts.metadata["sha256"] = digest.hexdigest()
        except (ValueError, KeyError, TypeError, RecursionError, RankoptError):
            pass  # a description that nobody can seal
        texts = {k: v if isinstance(v, str) else text_of(v) for k, v in parts.metadata.items()}
        return parts._replace(metadata=texts).to_bytes()

    def described(edits: list[Edit]) -> bytes:
        parts = Tensors.of(content)
        about = change_json(json.loads(parts.metadata["rankopt"]), edits)
        parts.metadata["rankopt"] = about
        return sealed(parts)

    def numbers(edits: list[Edit]) -> bytes:
        parts = Tensors.of(content)
        parts.metadata["rankopt"] = json.loads(parts.metadata["rankopt"])
        change_data(parts, edits, NUMBERS)
        return sealed(parts)

    def kept(edits: list[Edit]) -> bytes:
        parts = Tensors.of(content)
        parts.metadata["kept"] = text_of(change_json(json.loads(parts.metadata["kept"]), edits))
        return parts.to_bytes()

    return Reader(
        ".safetensors",
        content,
        _wrong(content, described, described, numbers, kept, _header_of(content)),
        use,
    )


def _array(parts: Tensors, about: dict[str, Any]) -> np.ndarray[Any, Any]:
    start, end = about["data_offsets"]
    return np.frombuffer(bytes(parts.data[start:end]), DTYPES[about["dtype"]]).reshape(
        about["shape"]
    )


def _header_of(content: bytes) -> Callable[[list[Edit]], bytes]:
    def change(edits: list[Edit]) -> bytes:
        parts = Tensors.of(content)
        first = edits[0]
        if first.kind % 8 == 7:
            value = first.value if isinstance(first.value, int) else 10**18
            return parts.to_bytes(claimed=value)
        tree = change_json({"__metadata__": parts.metadata, **parts.header}, edits)
        tree = tree if isinstance(tree, dict) else {}
        return parts._replace(header=tree, metadata=tree.pop("__metadata__", {})).to_bytes()

    return change


GROUPS = tuple(Group(f"g{k}", np.array([1, 2, 3]), np.array([3.0, 1.0 + k, 0.0])) for k in range(3))


def study(path: Path, trials: int = 4) -> Any:
    """A tiny search whose journal is the file."""
    from rankopt_solvers.search import search

    return search(
        Problem(GROUPS, 6),
        lambda choice: float(sum((j - 1) ** 2 for j in choice)) + 0.5,
        trials=trials,
        plans={"first": (0, 0, 0)},
        storage=path,
        sampler="random",
    )


def journal() -> Reader:
    """Journals of searches."""
    from rankopt_solvers.search import SearchError

    with tempfile.TemporaryDirectory() as folder:
        study(Path(folder) / "j")
        content = (Path(folder) / "j").read_bytes()
    # Of a process that is gone: this one would be waited for.
    content = re.sub(rb'("owner":\["[^"]*",)\d+,"\d+"', rb'\g<1>1,"0"', content)

    def structured(edits: list[Edit]) -> bytes:
        return change_lines(content, edits, json_line)

    def use(path: Path) -> None:
        found = study(path)
        assert np.isfinite(found.loss)

    return Reader(".journal", content, _wrong(content, structured, structured), use, (SearchError,))


def checkpoint() -> Reader:
    """Checkpoints of profiles."""
    import torch

    from rankopt import profile_model

    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([torch.nn.Linear(6, 6, bias=False) for _ in range(2)])}
    )
    batches = [torch.randn(2, 6) for _ in range(4)]

    def loss(model: Any, batch: Any) -> Any:
        hidden = batch
        for layer in model["layers"]:
            hidden = torch.tanh(layer(hidden))
        return hidden.square().sum(-1)

    def measure(path: Path, count: int) -> Profile:
        return profile_model(
            model,
            batches[:count],
            loss_fn=loss,
            backends=("kronecker",),
            checkpoint=path,
            checkpoint_every=1,
            progress=False,
        )

    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder) / "c", 2)
        content = (Path(folder) / "c").read_bytes()

    def sealed(parts: Tensors) -> bytes:
        digest = hashlib.sha256(parts.metadata["about"].encode(errors="replace"))
        for name in sorted(parts.header):
            digest.update(f" {name} ".encode())
            start, end = parts.header[name]["data_offsets"]
            digest.update(bytes(parts.data[start:end]))
        parts.metadata["sha256"] = digest.hexdigest()
        return parts.to_bytes()

    def about(edits: list[Edit]) -> bytes:
        parts = Tensors.of(content)
        parts.metadata["about"] = text_of(change_json(json.loads(parts.metadata["about"]), edits))
        return sealed(parts)

    def numbers(edits: list[Edit]) -> bytes:
        parts = Tensors.of(content)
        change_data(parts, edits, NUMBERS)
        return sealed(parts)

    def renamed(edits: list[Edit]) -> bytes:
        parts = Tensors.of(content)
        names = list(parts.header)
        for edit in edits:
            name = names[int(edit.where * (len(names) - 1))]
            twin = names[edit.length % len(names)]
            if edit.kind % 2 and name in parts.header:
                parts.header[str(edit.value)] = parts.header.pop(name)
            elif name in parts.header and twin in parts.header:
                parts.header[name], parts.header[twin] = parts.header[twin], parts.header[name]
        return sealed(parts)

    def use(path: Path) -> None:
        measure(path, 3)

    changes = (about, about, numbers, renamed, _header_of(content))
    return Reader(".partial", content, _wrong(content, *changes), use)


SENTENCES = ["the cat sees a dog", "a small bird likes the tree", "red and red", "the dog"]
ROWS = {
    "sequence-classification": [
        {"text": s, "label": n % 2, "other": None} for n, s in enumerate(SENTENCES)
    ],
    "regression": [{"text": s, "label": 0.5 * n} for n, s in enumerate(SENTENCES)],
    "token-classification": [
        {"text": s.split(), "label": [k % 3 for k, _ in enumerate(s.split())]} for s in SENTENCES
    ],
    "causal-lm": [{"text": s} for s in SENTENCES],
}


def data(task: str, suffix: str) -> Reader:
    """Data files of a task."""
    from rankopt.data import load_batches
    from tests import tiny

    tokenizer = tiny.tokenizer()
    rows = ROWS[task]
    separator = {".tsv": "\t", ".csv": ","}.get(suffix, "")

    def cell(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return '"' + text.replace('"', '""') + '"' if suffix == ".csv" else text

    if suffix == ".txt":
        content = "\n".join(SENTENCES).encode()
    elif suffix == ".jsonl":
        content = "\n".join(json.dumps(row) for row in rows).encode()
    elif suffix == ".json":
        content = json.dumps(rows).encode()
    else:
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        content = "\n".join(separator.join(map(cell, line)) for line in lines).encode()

    def structured(edits: list[Edit]) -> bytes:
        if suffix == ".json":
            tree = change_json(json.loads(content), edits)
            return text_of(tree).encode(errors="surrogatepass")
        change = {".jsonl": json_line, ".txt": table_line(" ")}.get(suffix)
        return change_lines(content, edits, change or table_line(separator))

    def use(path: Path) -> None:
        names = {"x": 0, "y": 1, "z": 2}
        load_batches(str(path), tokenizer, task, max_length=4, batch_size=2, label2id=names)

    return Reader(suffix, content, _wrong(content, structured, structured), use)


#: Name -> what makes the reader; those without torch come first.
READERS: dict[str, Callable[[], Reader]] = {
    "plan": plan,
    "profile": profile,
    "journal": journal,
    "checkpoint": checkpoint,
    **{
        f"{task}{suffix}": functools.partial(data, task, suffix)
        for task in ROWS
        for suffix in (".jsonl", ".tsv", ".csv")
    },
    "causal-lm.txt": functools.partial(data, "causal-lm", ".txt"),
}
