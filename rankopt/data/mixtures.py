"""Several sources in one: how much of each, and in which order.

Of N examples the source i with weight w_i gives N w_i / Σw, in whole examples: the integer part
each, and the rest to the largest remainders. They stand so that after any k examples every source
has given its share of k up to less than one example (R. Tijdeman, "The chairman assignment
problem", Discrete Mathematics 32, 1980): measuring that stops early, or is shared among processes,
has seen the mixture too.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar, overload

from tqdm import tqdm

from rankopt.data.batches import batched, require_sizes
from rankopt.data.examples import Examples, examples_of, say_affixes, spread
from rankopt.data.rows import DataSource
from rankopt.errors import DataError, OptionError, printable
from rankopt.model.tasks import Batch
from rankopt.profile.info import SourceInfo

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture(Sequence[Batch]):
    """Batches of several sources, and which of them every example is of.

    A profile of them records the sources, and how much of each it has seen.

    Attributes:
        batches: in their order.
        names: of the sources.
        weights: one for each source.
        order: for every example, the number of its source.
    """

    batches: Sequence[Batch]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    order: tuple[int, ...]

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        return self.batches[index]

    def __len__(self) -> int:
        return len(self.batches)

    def __str__(self) -> str:
        counts = [self.order.count(n) for n in range(len(self.names))]
        return ", ".join(
            f"{count} of {name}" for count, name in zip(counts, self.names, strict=True)
        )

    def sources(self, examples: int) -> tuple[SourceInfo, ...]:
        """What each source gave to the first so many examples."""
        seen = self.order[:examples]
        return tuple(
            SourceInfo(name=printable(name), weight=weight, examples=seen.count(number))
            for number, (name, weight) in enumerate(zip(self.names, self.weights, strict=True))
        )


def mixture(
    items: Sequence[Sequence[T]],
    weights: Sequence[float] | None = None,
    examples: int | None = None,
) -> list[T]:
    """Rows, texts, windows or batches of several sources in one list, in the order stated above.

    Args:
        items: those of each source; what is taken of one is taken at equal distances, in its order.
        weights: of the sources; equal if not given.
        examples: items in all; if not given, the most that there are in these proportions. A source
            that has fewer than its share gives all, and the others no more than theirs.

    Raises:
        OptionError: no source, a weight for some only, or one that is not above 0; so small a
            weight that a source gives nothing.
    """
    weights = _weights(weights, len(items))
    counts = shares(weights, [len(each) for each in items], examples)
    taken = [[each[k] for k in spread(len(each), n)] for each, n in zip(items, counts, strict=True)]
    order = interleaved([len(each) for each in taken])
    return _merged(taken, order)


def load_mixture(
    sources: Sequence[DataSource],
    tokenizer: Any,
    task: str,
    *,
    weights: Sequence[float] | None = None,
    max_length: int = 256,
    batch_size: int = 4,
    examples: int | None = None,
    label2id: Mapping[str, int] | None = None,
    resample: int | None = None,
) -> Mixture:
    """Read several sources for one task, each in its own format, into batches of all of them.

    Args:
        sources: two or more files or data sets.
        tokenizer: of the model.
        task: see ProfileInfo; of all sources.
        weights: of the sources; equal if not given.
        max_length: tokens of a window, or at most of an example.
        batch_size: examples of a batch.
        examples: windows or rows in all; if not given, the most that there are in these
            proportions. A source that has fewer than its share gives all, which is said on stderr.
        label2id: for labels given as names.
        resample: seed with which each source's examples are drawn, see load_batches.

    Raises:
        DataError: see load_batches; or labels of one source have another form than the others'.
        OptionError: see load_batches and mixture; or a source is there twice.
    """
    require_sizes(max_length, batch_size, examples)
    _require_different(sources)
    names = [each.source for each in sources]
    weights = _weights(weights, len(sources))
    opened = [examples_of(each, tokenizer, task, max_length, label2id or {}) for each in sources]
    say_affixes(tokenizer, opened[0].before)
    wanted = shares(weights, [each.available for each in opened], examples, names)
    encoded = [_taken(*each, resample) for each in zip(names, opened, wanted, strict=True)]
    if task != "token-classification":
        _require_one_form(names, encoded)
    order = interleaved([len(each) for each in encoded])
    batches = batched(tokenizer, task, _merged(encoded, order), batch_size)
    return Mixture(batches, tuple(names), weights, tuple(order))


def shares(
    weights: Sequence[float],
    available: Sequence[int],
    examples: int | None = None,
    names: Sequence[str] | None = None,
) -> list[int]:
    """How many examples each source is to give; more than it has, if it has too few.

    Args:
        weights: finite and above 0.
        available: examples of each source.
        examples: in all; if not given, the most in these proportions of which no source lacks any.
        names: of the sources, for errors.

    Raises:
        OptionError: a weight is so small that its source gives nothing.
    """
    whole = sum(map(Fraction, weights))
    parts = [Fraction(weight) / whole for weight in weights]
    most = examples
    if most is None:
        # Rounding up may ask for one more than there is: fewer by one each are few enough.
        most = min(math.floor((n + 1) / part) for n, part in zip(available, parts, strict=True))
        while most and any(map(int.__gt__, _rounded(parts, most), available)):
            most -= 1
    counts = _rounded(parts, most)
    for number, count in enumerate(counts):
        if not count:
            name = names[number] if names else f"source {number + 1}"
            raise OptionError(
                f"{name} gives none of {most} examples with weight {weights[number]:g} of "
                f"{float(whole):g}: take more examples, give it more weight, or leave it out"
            )
    return counts


def _rounded(parts: Sequence[Fraction], examples: int) -> list[int]:
    """Whole numbers that add up to the examples: the largest remainders, the first of equals."""
    counts = [math.floor(part * examples) for part in parts]
    rests = sorted(range(len(parts)), key=lambda n: counts[n] - parts[n] * examples)
    for number in rests[: examples - sum(counts)]:
        counts[number] += 1
    return counts


def interleaved(counts: Sequence[int]) -> list[int]:
    """Which source every example is of, by Tijdeman's rule.

    Among the sources that are behind their share by 1/(2S - 2) or more, S of them in all, comes the
    one that would first be behind by 1 - 1/(2S - 2). No prefix is further from the shares than
    that.
    """
    whole, several = sum(counts), max(2 * len(counts) - 2, 1)
    given, order = [0] * len(counts), list[int]()
    for position in range(1, whole + 1):
        # All in units of 1/(whole * several), so that no rounding decides.
        behind = [
            several * (count * position - whole * n) for count, n in zip(counts, given, strict=True)
        ]
        late = whole * (several - 1)
        due = [n for n, each in enumerate(behind) if each >= whole or several == 1]
        chosen = min(due, key=lambda n: Fraction(late - behind[n], counts[n]))
        given[chosen] += 1
        order.append(chosen)
    return order


def _merged(taken: Sequence[Sequence[T]], order: Sequence[int]) -> list[T]:
    rests = [iter(each) for each in taken]
    return [next(rests[number]) for number in order]


def _taken(name: str, opened: Examples, wanted: int, resample: int | None) -> list[dict[str, Any]]:
    found = opened.take(wanted, resample)
    if len(found) < wanted:
        tqdm.write(
            f"warning: {name} gives {len(found)} examples, {wanted} were wanted of it for the "
            "mixture: the other sources give what they were to",
            file=sys.stderr,
        )
    return found


def _weights(weights: Sequence[float] | None, sources: int) -> tuple[float, ...]:
    if not sources:
        raise OptionError("a mixture needs sources, none was given")
    if weights is None:
        return (1.0,) * sources
    if len(weights) != sources:
        raise OptionError(
            f"{len(weights)} weights for {sources} sources: give one for each, in their order, or "
            "none for equal shares"
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise OptionError(
                f"weight={weight:g}: a weight is a number above 0; leave a source out to take "
                "nothing of it"
            )
    return tuple(map(float, weights))


def _require_different(sources: Sequence[DataSource]) -> None:
    seen = set()
    for each in sources:
        path = os.path.realpath(each.source) if os.path.exists(each.source) else each.source
        if (path, each.columns, each.split) in seen:
            raise OptionError(f"{each.source} is given twice: give it once, with twice the weight")
        seen.add((path, each.columns, each.split))


def _require_one_form(names: Sequence[str], encoded: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Classes, numbers, or lists of so many: else they are labels of different tasks."""
    forms = [_form(rows[0].get("labels")) for rows in encoded]
    for name, form in zip(names, forms, strict=True):
        if form != forms[0]:
            raise DataError(
                f"{name} has {form} a row, {names[0]} has {forms[0]}: all sources of a mixture "
                "are of one task"
            )


def _form(labels: Any) -> str:
    return "one label" if not isinstance(labels, list) else f"{len(labels)} labels"
