"""Which allocation wins on a language model: perplexity of every strategy, on two texts.

    python experiments/10_language_model/run.py --folder lm-run       SmolLM2; rankopt[demo,data]
    python experiments/10_language_model/run.py --model NAME --protocol arena --folder arena-run
    python experiments/10_language_model/run.py --only closed         one sample of the calibration
    python experiments/10_language_model/run.py --backend kronecker   some of the strategies
    python experiments/10_language_model/run.py --quick               tiny random models, no figure

Raw WikiText-2 comes through the datasets library, or from text files: --held-out FILE is the test
split, --calibration FILE (arena only) the validation split. Profiles and every measured plan are
kept in the folder: the same command goes on where it was stopped. Of SmolLM2 results.json and
table.md are written beside this file, of another model into its folder.
"""

import argparse
import dataclasses
import math
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import wikitext  # noqa: E402 (beside the folders of the experiments)
from pictures import keep_pictures  # noqa: E402
from published import provenance, publish  # noqa: E402

BACKENDS = ("kronecker", "fwsvd", "fwsvd_two_sided", "whitened", "svd")
#: Of every SHARE articles of the test split, the first calibrates.
SHARE = 3
SOLVERS = ("uniform", "proportional", "threshold", "exact", "exact/layerwise", "exact/maxmin")
#: Whose ranks are planned on other samples of the calibration text, too, and how.
SAMPLED = ("kronecker", "fwsvd")
SAMPLED_SOLVERS = ("uniform", "threshold", "exact")
PAIRS = ("uniform/pairs@fwsvd", "threshold/pairs@fwsvd", "exact/pairs@kronecker")
KEEPS = (0.9, 0.8, 0.65, 0.5)
DEFAULT = "exact@kronecker"
#: The first sample of the calibration text with every strategy, and the others with some.
PARTS = ("closed", "samples")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How text is cut.

    Attributes:
        calibration: windows to calibrate, at equal distances.
        calibrated: tokens of each.
        held_out: windows to measure, at equal distances; None is all.
        length: tokens of each; they do not overlap, and nothing is put before them.
        samples: of the calibration text; the first at equal distances, the others drawn.
        backends: that are profiled.
        keeps: budgets.
        articles: some articles of the test split calibrate, and the others are measured; else the
            validation split calibrates.
    """

    calibration: int = 32
    calibrated: int = 256
    held_out: int | None = 32
    length: int = 256
    samples: int = 3
    backends: tuple[str, ...] = BACKENDS
    keeps: tuple[float, ...] = KEEPS
    articles: bool = True


PROTOCOLS = {
    "windows": Protocol(),
    # All of the test split in contiguous blocks of 2,048 tokens, as LowRankArena measures.
    "arena": Protocol(
        128, 2048, None, 2048, 1, ("kronecker", "fwsvd", "whitened"), (0.8, 0.6), articles=False
    ),
}
QUICK = Protocol(6, 16, 4, 16, 2, ("kronecker", "fwsvd"), (0.7,))


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """A model, its texts, and the folder in which everything about it is kept.

    Attributes:
        model: dense.
        tokenizer: its.
        protocol: how text is cut.
        calibration: text.
        held_out: text.
        also: batches of another domain.
        folder: profiles and results.
    """

    model: Any
    tokenizer: Any
    protocol: Protocol
    calibration: list[str]
    held_out: list[str]
    also: dict[str, Any]
    folder: Path

    def profile(self, sample: int) -> Any:
        """Of the calibration text, as the command does it; the first sample has all backends."""
        from rankopt import Compressed, Profile, profile_model
        from rankopt.data.batches import batched
        from rankopt.data.examples import windows_of

        path = self.folder / f"profile-{sample}.safetensors"
        if not path.is_file():
            cut = self.protocol
            found = windows_of("", self.calibration, self.tokenizer, cut.calibrated)
            taken = found.take(cut.calibration, sample or None)
            backends = cut.backends if not sample else SAMPLED
            batches = batched(self.tokenizer, "causal-lm", taken, 4)
            how: Any = {"cross_fit": True, "again": Compressed(needed=False)}
            how |= {"backends": backends, "form": "pivoted"}
            profile_model(self.model, batches, **how).save(path)
        return Profile.load(path)

    def measured(self, parts: Sequence[str] = PARTS, backends: Sequence[str] = BACKENDS) -> Any:
        """Results of every strategy with these backends, and what the folder has of others.

        What it has is not measured again.
        """
        from rankopt import Strategy, compare, measure_comparison, text_batches

        cut = self.protocol
        batches = text_batches(self.held_out, self.tokenizer, cut.length, 1, cut.held_out)
        begin = 0 if "closed" in parts else 1
        samples = range(begin, cut.samples if "samples" in parts else 1)
        profiles = {str(n): self.profile(n) for n in samples}
        rows = []
        for name, profile in profiles.items():
            first = name == "0"
            strategies = [
                f"{solver}@{backend}"
                for backend in (cut.backends if first else SAMPLED)
                for solver in (SOLVERS if first else SAMPLED_SOLVERS)
            ]
            strategies += PAIRS if first else ()
            asked = [Strategy.parse(text) for text in strategies if text.split("@")[1] in backends]
            rows += compare(profile, cut.keeps, asked) if asked else []
        file = self.folder / "results.json"
        return measure_comparison(self.model, profiles, rows, batches, also=self.also, file=file)


def summed_up(results: Any) -> dict[str, Any]:
    """Plain figures: the dense model, and a line for each strategy and budget."""
    from rankopt import summarise
    from rankopt.results import prediction

    lines = summarise(results, DEFAULT)
    dense = results.dense
    assert dense.loss is not None
    return {
        "dense": dense.to_dict() | {"windows": dense.examples, "predictions": dense.targets},
        "predicted": {
            name: dataclasses.asdict(its) for name, its in prediction(lines, dense.loss).items()
        },
        "lines": [line.to_dict() for line in lines],
    }


def check(found: Mapping[str, Any]) -> None:
    """What holds for every model."""
    for line in found["lines"]:
        name = f"{line['strategy']} at {line['keep']}"
        assert line["kept"] <= line["keep"] + 1e-9, f"{name}: over its budget"
        assert line["loss"] is not None and math.isfinite(line["loss"]), name
    exact = [line for line in found["lines"] if line["strategy"] == DEFAULT]
    assert all(line["against"] is None for line in exact) and exact


def table(found: Mapping[str, Any]) -> str:
    """Markdown: perplexity here / loss over dense on the other text."""
    dense, lines = found["dense"], found["lines"]
    (other,) = (name for name in dense if name.startswith("loss of "))
    keeps = sorted({line["keep"] for line in lines}, reverse=True)
    text = [
        f"Dense: perplexity {math.exp(dense['loss']):.2f} ({dense['predictions']:,} predictions "
        f"in {dense['windows']} windows); {dense[other]:.3f} nats on the other text.",
        "",
        "Perplexity, then nats over dense on the other text; bold where the loss differs from that "
        f"of `{DEFAULT}` (p below .05 after Holm's correction).",
        "",
        "| strategy | " + " | ".join(f"kept {keep:g}" for keep in keeps) + " |",
        "|---|" + "---|" * len(keeps),
    ]
    for strategy in _in_order(lines):
        by_keep = {x["keep"]: x for x in lines if x["strategy"] == strategy}
        cells = (_cell(by_keep.get(keep), dense[other], other) for keep in keeps)
        text.append(f"| {strategy} | {' | '.join(cells)} |")
    text += [
        "",
        "Spearman's correlation of predicted and measured increase: "
        + ", ".join(
            "{} {rho:.2f} [{low:.2f}, {high:.2f}]".format(name, **its)
            for name, its in found["predicted"].items()
        )
        + ".",
    ]
    text += _samples(lines, keeps)
    return "\n".join(text) + "\n"


def _in_order(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Strategies by backend, whenever they were measured."""
    named = dict.fromkeys(line["strategy"] for line in lines)
    return sorted(named, key=lambda text: BACKENDS.index(text.split("@")[1]))


def _cell(line: Mapping[str, Any] | None, dense: float, other: str) -> str:
    if line is None:
        return ""
    shown = f"{math.exp(line['loss']):.2f} / {line[other] - dense:+.2f}"
    sure = line["against"] is not None and line["against"]["corrected"] < 0.05
    return f"**{shown}**" if sure else shown


def _samples(lines: Iterable[Mapping[str, Any]], keeps: Sequence[float]) -> list[str]:
    """How much the sample decides."""
    chosen = [line for line in lines if line["half_width"] is not None]
    if not chosen:
        return []
    text = [
        "",
        "Under several samples of the calibration text: loss and half of its 95 % interval; "
        "correlation of ranks.",
        "",
        "| strategy | " + " | ".join(f"kept {keep:g}" for keep in keeps) + " |",
        "|---|" + "---|" * len(keeps),
    ]
    for strategy in _in_order(chosen):
        by_keep = {x["keep"]: x for x in chosen if x["strategy"] == strategy}
        cells = []
        for x in (by_keep[keep] for keep in keeps):
            stable = "-" if x["stability"] is None else f"{x['stability']:.2f}"
            cells.append(f"{x['loss']:.3f} ± {x['half_width']:.3f}; {stable}")
        text.append(f"| {strategy} | {' | '.join(cells)} |")
    return text


def parted(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Lines of the articles that calibrate, and of the others."""
    parts: tuple[list[str], list[str]] = ([], [])
    article = -1
    for line in (line for text in texts for line in text.splitlines() if line.strip()):
        # "= Title =" begins an article, "= = Section = =" does not.
        article += bool(re.fullmatch(r" = [^=].* = ?", line))
        parts[bool(article % SHARE)].append(line)
    return parts


def full(given: argparse.Namespace, folder: Path) -> None:
    """SmolLM2-135M, or another model."""
    from rankopt.data.domains import python_help
    from rankopt.demo import smollm2
    from rankopt.model.loading import load_model, load_tokenizer

    how = provenance(HERE, folder=folder)
    source = given.model or str(smollm2(folder / "model"))
    model, tokenizer = load_model(source, given.dtype), load_tokenizer(source)
    cut = PROTOCOLS[given.protocol]
    held_out = wikitext.texts(given.held_out, "test")
    if cut.articles:
        calibration, held_out = parted(held_out)
    else:
        calibration = wikitext.texts(given.calibration, "validation")
    work = Work(
        model.to(given.device),
        tokenizer,
        cut,
        calibration,
        held_out,
        {"python-help": python_help(tokenizer, cut.length)},
        folder,
    )
    results = work.measured(given.only or PARTS, given.backend or BACKENDS)
    found = summed_up(results)
    check(found)
    settings = {
        "model": given.model or "SmolLM2-135M-Instruct",
        "protocol": dataclasses.asdict(cut),
        "dtype": given.dtype,
        "held_out": wikitext.named(given.held_out, "test"),
    }
    place = folder if given.model else HERE
    # The measured plans themselves are results.json of the folder.
    name = "figures.json" if given.model else "results.json"
    publish(place, how, {"settings": settings, **found}, table(found), names=(name, "table.md"))
    shown = {"predicted.png": place / "predicted.png"}
    keep_pictures(shown, work.profile(0), None, results)
    print(table(found))


def quick() -> None:
    """The same lines on a tiny random model, twice, and the other protocol from a local folder."""
    sys.path.insert(0, str(HERE.parents[1]))
    from tests import tiny

    titled = [" = A = ", "1", " = = B = = ", "2", " = C = ", "3", " = D = ", " = E = ", "4"]
    assert parted(["\n".join(titled)]) == ([*titled[:4], *titled[7:]], titled[4:7])
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    text = [" ".join(tiny.WORDS * 30)]
    with tempfile.TemporaryDirectory() as temporary:
        also = {"python-help": tiny.batches(model, count=2)}
        work = Work(model, tokenizer, QUICK, text, text, also, Path(temporary))
        first, again = (summed_up(work.measured()) for _ in range(2))
        assert first == again, "what was kept is not what was measured"
        check(first)
        print(len(table(first).splitlines()), "lines")
        local = Path(temporary) / "local"
        tiny.llama(max_position_embeddings=4096).save_pretrained(local)
        tiny.tokenizer(local)
        words = Path(temporary) / "words.txt"
        words.write_text(" ".join(tiny.WORDS * 600), encoding="utf-8")
        given = argparse.Namespace(
            model=str(local),
            protocol="arena",
            dtype="float32",
            device="cpu",
            calibration=words,
            held_out=words,
            only=["closed"],
            backend=["kronecker"],
        )
        full(given, Path(temporary) / "arena")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="a folder or a hub name; SmolLM2-135M-Instruct if not given"
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="windows")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part of the strategies")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="whose strategies")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    wikitext.run(parser, quick, full, ("test",))


if __name__ == "__main__":
    main()
