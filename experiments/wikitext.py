"""The protocol that several experiments share: SmolLM2-135M on WikiText-2.

32 windows of 256 tokens of the validation split to calibrate, 16 of the test split to measure.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: The data set, through the datasets library.
HUB = "Salesforce/wikitext:wikitext-2-raw-v1"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the texts come from, if not through the datasets library."""
    files = "valid.KIND.txt and test.KIND.txt, raw or tokens"
    parser.add_argument("--data", type=Path, help=f"a folder with wikitext2/{files}")
    parser.add_argument("--calibration", type=Path, help="a text file instead of the data set")
    parser.add_argument("--held-out", type=Path, help="a text file instead of the data set")


def parsed(
    parser: argparse.ArgumentParser, splits: Sequence[str] = ("valid", "test")
) -> argparse.Namespace:
    """The arguments; of a folder with data, those files that are not given one by one.

    Args:
        parser: with the options.
        splits: that are measured; all are raw, or all are tokens.
    """
    given = parser.parse_args()
    if given.data is not None:
        found = files_in(given.data / "wikitext2", splits)
        if found is None:
            names = " and ".join(f"wikitext2/{split}.raw.txt" for split in splits)
            parser.error(f"{given.data}: wanted are {names}, or .tokens.txt instead of .raw.txt")
        given.calibration = given.calibration or found.get("valid")
        given.held_out = given.held_out or found["test"]
    return given


def files_in(folder: Path, splits: Sequence[str]) -> dict[str, Path] | None:
    """The raw text of the splits if all of them are there, else their tokens, else None."""
    for kind in ("raw", "tokens"):
        found = {split: folder / f"{split}.{kind}.txt" for split in splits}
        if all(file.is_file() for file in found.values()):
            return found
    return None


def run(
    parser: argparse.ArgumentParser,
    quick: Callable[[], None],
    full: Callable[[argparse.Namespace, Path], None],
    splits: Sequence[str] = ("valid", "test"),
) -> None:
    """Parse the arguments and run; without --folder what is kept is in a temporary one.

    Args:
        parser: with the experiment's own options.
        quick: on a tiny random model.
        full: arguments and the folder of the model -> the figures.
        splits: see parsed.
    """
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the model and what is measured there")
    add_options(parser)
    arguments = parsed(parser, splits)
    if arguments.quick:
        quick()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            full(arguments, arguments.folder or Path(temporary))
    print("ok")


def texts(file: Path | None, split: str) -> list[str]:
    """A text file, or the lines of a split of WikiText-2."""
    if file is not None:
        return [file.read_text(encoding="utf-8")]
    from rankopt.data.rows import read_rows

    rows = read_rows(HUB, split)
    return [str(row["text"]) for row in rows if str(row["text"]).strip()]


def named(file: Path | None, split: str) -> str:
    """What texts of it are called in results.json."""
    return f"{HUB} {split}" if file is None else file.name


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A model and its texts.

    Attributes:
        model: SmolLM2-135M in float32.
        tokenizer: its.
        text: to calibrate on.
        calibration: batches of it.
        held_out: batches of the other text.
        texts: where both are from, for results.json.
    """

    model: Any
    tokenizer: Any
    text: list[str]
    calibration: list[Any]
    held_out: list[Any]
    texts: list[str]


def protocol(folder: Path, calibration: Path | None, held_out: Path | None) -> Protocol:
    """Load the model, which is kept in the folder, and cut the texts."""
    from rankopt.data.batches import text_batches
    from rankopt.demo import smollm2
    from rankopt.model.loading import load_model, load_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    source = str(smollm2(folder / "model"))
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    text = texts(calibration, "validation")
    return Protocol(
        model,
        tokenizer,
        text,
        text_batches(text, tokenizer, 256, 4, 32),
        text_batches(texts(held_out, "test"), tokenizer, 256, 4, 16),
        [named(calibration, "validation"), named(held_out, "test")],
    )
