"""Measured latencies: what a layer takes at some ranks, from a table, and in between.

A row says for which layers it holds (``layer``, a name or a glob; ``kind``; ``out_features`` and
``in_features``; what it does not say is any), the ``form`` and ``rank`` (or rank ``dense``, which
has no form), and ``microseconds``. Of several rows that hold for a layer those count that name it,
then those that name its kind, then its shape; of equals those of the last in the file.

Between two listed ranks the latency is interpolated linearly and rounded up to a nanosecond. Ranks
below the smallest that is listed take as long as that. Of ranks above the largest nothing is known:
they are not on offer.
"""

import csv
import dataclasses
import fnmatch
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rankopt.errors import DataError, few
from rankopt.layers import DENSE, FORMS, Form, IntArray, Layer
from rankopt.schema import parse

#: A table of every rank of every layer of the largest models is smaller.
LARGEST_TABLE = 256 * 2**20
COLUMNS = ("layer", "kind", "out_features", "in_features", "form", "rank", "microseconds")
#: Longer would not fit sums of nanoseconds.
_LONGEST = 10**12

#: Which layers a row is for: name or glob, kind, rows, columns; None is any.
_Selector = tuple[str | None, str | None, int | None, int | None]


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Latencies of layers at ranks.

    Attributes:
        points: which layers, and in which form (None is dense) -> rank -> microseconds.
        source: named in errors.
        digest: sha256 of what was read.
    """

    points: Mapping[tuple[_Selector, Form | None], Mapping[int, float]]
    source: str
    digest: str

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LatencyTable":
        """Read a ``.csv`` file with a header, or ``.json``: a list of objects with the same names.

        Raises:
            DataError: missing, neither, or a row that is none; names the row.
        """
        source = Path(path)
        if not source.is_file():
            raise DataError(f"no latency table at {source}: wanted is a .csv or .json file")
        if source.stat().st_size > LARGEST_TABLE:
            raise DataError(f"{source} is larger than {LARGEST_TABLE >> 20} MiB: no latency table")
        try:
            text = source.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{source} is not text: {error}") from error
        if source.suffix.lower() == ".json":
            try:
                rows = parse(text)
            except ValueError as error:
                raise DataError(f"{source}: not JSON: {error}") from error
        elif source.suffix.lower() == ".csv":
            rows = _csv_rows(text, str(source))
        else:
            raise DataError(f"{source}: a latency table ends in .csv or .json")
        if not isinstance(rows, list):
            raise DataError(f"{source}: wanted is a list of rows, each with {', '.join(COLUMNS)}")
        return cls.of(rows, str(source))

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], source: str = "latency table") -> "LatencyTable":
        """From rows with some of the names of a file's columns; what is empty or None is not given.

        Raises:
            DataError: a row that is none, or two that contradict each other.
        """
        points: dict[tuple[_Selector, Form | None], dict[int, float]] = {}
        digest = hashlib.sha256()
        for number, row in enumerate(rows, 1):
            place = f"{source}: row {number}"
            if not isinstance(row, Mapping):
                raise DataError(f"{place}: wanted is an object with {', '.join(COLUMNS)}")
            selector, form, rank, latency = _read(row, place)
            listed = points.setdefault((selector, form), {})
            if rank in listed:
                shown = "dense" if form is None else f"rank {rank} in the form {form}"
                raise DataError(f"{place}: {shown} is listed twice for the same layers")
            listed[rank] = latency
            said = [*selector, form, rank, latency]
            digest.update(json.dumps(said).encode() + b"\n")
        if not points:
            raise DataError(f"{source}: a latency table without rows")
        return cls(points, source, digest.hexdigest())

    def require(self, layers: Iterable[Layer], form: Form) -> None:
        """Check that every layer has a latency dense and in the form.

        Raises:
            DataError: names the layers that lack one, and what they lack.
        """
        missing = []
        for layer in layers:
            lacks = [
                "dense" if wanted is None else f"form {wanted}"
                for wanted in (None, form)
                if not self._listed(layer, wanted) and not (wanted and not layer.largest_rank(form))
            ]
            if lacks:
                shape = f"{layer.out_features} x {layer.in_features}"
                missing.append(f"{layer.name} ({layer.kind}, {shape}: {' and '.join(lacks)})")
        if missing:
            raise DataError(
                f"{self.source} has no latency for {few(missing)}: add rows that name the layer, "
                "its kind or its shape"
            )

    def known(self, layer: Layer, ranks: IntArray, form: Form) -> np.ndarray:
        """Mask of the ranks that the table reaches."""
        largest = max(self._listed(layer, form), default=0)
        return np.asarray((ranks == DENSE) | (ranks <= largest))

    def nanoseconds(self, layer: Layer, ranks: IntArray, form: Form) -> IntArray:
        """Of ranks that are known, the same shape, for all modules that share the matrix."""
        listed = sorted(self._listed(layer, form).items()) or [(0, 0.0)]
        at, took = np.array(listed).T
        (dense,) = self._listed(layer, None).values()
        microseconds = np.where(ranks == DENSE, dense, np.interp(ranks, at, took))
        # A decimal that binary cannot hold must not become one nanosecond more.
        one = np.ceil(np.round(microseconds * 1000.0, 6)).astype(np.int64)
        return np.asarray(one * len(layer.members))

    def _listed(self, layer: Layer, form: Form | None) -> Mapping[int, float]:
        best: Mapping[int, float] = {}
        most: tuple[bool, ...] = ()
        for (selector, of), listed in self.points.items():
            said = tuple(each is not None for each in selector)
            if of == form and said >= most and _holds(selector, layer):
                best, most = listed, said
        return best


def _holds(selector: _Selector, layer: Layer) -> bool:
    name, kind, rows, columns = selector
    return (
        (name is None or any(fnmatch.fnmatchcase(member, name) for member in layer.members))
        and kind in (None, layer.kind)
        and rows in (None, layer.out_features)
        and columns in (None, layer.in_features)
    )


def _csv_rows(text: str, source: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        unknown = [name for name in names if name not in COLUMNS]
        if unknown or not {"rank", "microseconds"} <= set(names) or len(set(names)) != len(names):
            raise DataError(
                f"{source}: the columns are {', '.join(map(str, names)) or 'none'}; wanted are "
                f"rank and microseconds, and of the others what is known: {', '.join(COLUMNS)}"
            )
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{source}: not CSV: {error}") from error
    return rows


def _read(row: Mapping[Any, Any], place: str) -> tuple[_Selector, Form | None, int, float]:
    given = {name: value for name, value in row.items() if value not in (None, "")}
    unknown = [str(name) for name in given if name not in COLUMNS]
    if unknown:
        raise DataError(f"{place}: has {few(unknown)}; known: {', '.join(COLUMNS)}")
    names = [given.get(name) for name in ("layer", "kind")]
    if any(name is not None and not isinstance(name, str) for name in names):
        raise DataError(f"{place}: layer and kind are names, got {names}")
    shape = [
        _whole(given[name], f"{place}: {name}") if name in given else None
        for name in ("out_features", "in_features")
    ]
    form, rank = given.get("form"), given.get("rank")
    if rank == "dense":
        form, at = None, DENSE
    else:
        at = _whole(rank, f"{place}: rank (or dense)")
        if form not in FORMS:
            raise DataError(f"{place}: form must be {' or '.join(FORMS)}, got {form!r}")
    try:
        latency = float(given.get("microseconds", math.nan))
    except (TypeError, ValueError):
        latency = math.nan
    if isinstance(given.get("microseconds"), bool) or not 0.0 <= latency <= _LONGEST:
        raise DataError(
            f"{place}: microseconds must be a number from 0 to {_LONGEST:.0e}, "
            f"got {given.get('microseconds')!r}"
        )
    return (names[0], names[1], shape[0], shape[1]), form, at, latency


def _whole(value: Any, place: str) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise DataError(f"{place} must be a whole number above 0, got {value!r}")
    return int(text)
