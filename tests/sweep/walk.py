"""One architecture all the way: measured, planned, applied, saved, loaded, saved again, made dense.

What is compared with is written here and in inputs, by the definitions: nothing of rankopt.
"""

import copy
import dataclasses
import re
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankopt import (
    Profile,
    RankoptError,
    apply_plan,
    evaluate,
    make_plan,
    profile_model,
    save_model,
)
from rankopt.measure.estimators import Kind
from rankopt.model.lowrank import LowRank
from rankopt.model.size import model_size
from tests.sweep.configs import tiny
from tests.sweep.inputs import (
    LABELS,
    LeftOut,
    example,
    likelihood,
    make_batches,
    predicts,
    terms_by_hand,
    with_pictures,
)

PARAMETERS = 3_000_000
#: Of Fisher rows, relative, layer by layer.
TOLERANCE = 1e-3
Batch = dict[str, Tensor]


@dataclasses.dataclass
class Outcome:
    """What came of one architecture.

    Attributes:
        architecture: name of the class.
        head: transformers' list that names it.
        outcome: ``ok``, ``left out``, ``refused`` (by a RankoptError) or ``FAULT``.
        stage: the last that was begun.
        reason: why it is not ok.
        remedy: of rankopt's own errors, that were followed.
        pictures: whether there were any beside the text.
        parameters: of the tiny model.
        layers: planned.
        targets: that the profile counted.
        rows: largest relative error of a layer's Fisher rows.
        seconds: of all.
    """

    architecture: str
    head: str
    outcome: str = "ok"
    stage: str = "build"
    reason: str = ""
    remedy: str = ""
    pictures: bool = False
    parameters: int = 0
    layers: int = 0
    targets: int = 0
    rows: float = 0.0
    seconds: float = 0.0


def build(architecture: str, head: str) -> Any:
    """A tiny model with random weights of moderate size, in eval mode.

    Raises:
        LeftOut: it cannot be built, or is too large.
    """
    import transformers

    try:
        kind = getattr(transformers, architecture)
        changes = {"num_labels": LABELS} if head.endswith("CLASSIFICATION") else {}
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(_config(kind, changes)).parameters())
        if size > PARAMETERS:
            raise LeftOut(f"too large: {size} parameters")
        torch.manual_seed(0)
        model = kind(_config(kind, changes))
    except LeftOut:
        raise
    except Exception as error:
        raise LeftOut(f"cannot be built: {_line(error)}") from error
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * min(0.3, parameter[0].numel() ** -0.5))
        for module in model.modules():
            # Loading makes it zero, so it is from the beginning.
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0
    return model.eval()


def _config(kind: Any, changes: dict[str, Any]) -> Any:
    config = tiny(kind.config_class, changes)
    texts = [config, config.get_text_config(), config.get_text_config(decoder=True)]
    for each in texts:
        if getattr(each, "pad_token_id", None) is None:
            each.pad_token_id = 0
        if config.is_encoder_decoder and getattr(each, "decoder_start_token_id", None) is None:
            each.decoder_start_token_id = 1
    return config


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error, and whose; beside the rest, all but zero counts as zero."""
    floor = 1e-12 * max(float(rows.norm()) for rows in wanted.values())
    return max(
        (float((found[name] - rows).norm()) / max(float(rows.norm()), floor), name)
        for name, rows in wanted.items()
    )


class Walk:
    """The steps of one architecture, in order."""

    def __init__(self, found: Outcome, folder: Path) -> None:
        self.found, self.folder = found, folder
        self.model = build(found.architecture, found.head)
        found.parameters = sum(p.numel() for p in self.model.parameters())
        self.what = predicts(found.head, self.model)
        self.batches: list[Batch]
        self.dense_loss: float
        self.exclude: list[str] = []

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """Of a batch; labels are given only where a decoder reads them."""
        torch.manual_seed(3)
        given = (
            dict(batch)
            if self.what == "text"
            else {k: v for k, v in batch.items() if k != "labels"}
        )
        found: Tensor = model(**given).logits
        return found

    def outputs(self, model: Any) -> Tensor:
        """Of the first batch, from a copy, whose weights are aligned in memory."""
        with torch.no_grad():
            # What some models keep of their last pass has no graph then, and can be copied.
            self.logits(model, self.batches[0])
            return self.logits(copy.deepcopy(model).eval(), self.batches[0])

    def mean_loss(self, model: Any) -> float:
        """Of all batches, by the likelihood."""
        with torch.no_grad():
            total = sum(
                float(likelihood(self.what, self.logits(model, b), b).sum()) for b in self.batches
            )
        return total / self.targets()

    def targets(self) -> int:
        """Of all batches."""
        return int(sum(int(terms_by_hand(self.what, batch).sum()) for batch in self.batches))

    def inputs(self) -> None:
        """The dense model runs and says something."""
        try:
            self.batches = make_batches(self.found.head, self.model)
            illustrated = with_pictures(self.model, self.batches) if self.what == "next" else None
            self.found.pictures = illustrated is not None
            self.batches = illustrated or self.batches
            with torch.no_grad():
                output = self.model(**self.batches[0])
                if getattr(output, "loss", None) is None:
                    raise LeftOut("it returns no loss for labels")
                if not hasattr(output, "logits"):
                    raise LeftOut("it returns no logits")
                self.dense_loss = self.mean_loss(self.model)
        except LeftOut:
            raise
        except Exception as error:
            raise LeftOut(f"needs inputs that are not made here: {_line(error)}") from error
        if not np.isfinite(self.dense_loss):
            raise LeftOut(f"its loss is {self.dense_loss} on random weights")
        try:
            self.model.save_pretrained(self.folder / "original")
            self.same(self.load("original"), self.outputs(self.model))
        except Exception as error:
            raise LeftOut(f"transformers alone does not reload it: {_line(error)}") from error

    def profile(self) -> None:
        """Measured, following what rankopt's own errors advise; compared with single gradients."""
        self._measure("empirical")
        if self.what == "example":
            self._measure("expected")

    def _measure(self, estimator: Kind) -> None:
        while True:
            try:
                self.measured = profile_model(
                    self.model,
                    self.batches,
                    backends=("kronecker", "fwsvd"),
                    exclude=self.exclude,
                    estimator=estimator,
                    progress=False,
                )
                break
            except RankoptError as error:
                self._follow(error)
        self.found.layers = len(self.measured.info.layers)
        self.found.targets = self.measured.info.targets
        wanted = self.targets()
        assert self.found.targets == wanted, f"{self.found.targets} targets, by hand {wanted}"
        assert self.measured.info.examples == sum(len(b["labels"]) for b in self.batches)
        off, name = self.rows_error(self.measured)
        self.found.rows = max(self.found.rows, off)
        assert off < TOLERANCE, f"{estimator} rows of {name} are off by {off:.2g}"

    def _follow(self, error: RankoptError) -> None:
        line = str(error)
        inside = re.search(r"\(([\w., ]+)\)", line)
        layer = re.match(r"layer ([\w.]+)", line)
        named = [layer[1]] if layer else inside[1].split(", ") if inside else []
        named = [name for name in named if name not in self.exclude]
        if "batch size 1" in line and len(self.batches[0]["labels"]) > 1:
            self.batches = [
                example(batch, n) for batch in self.batches for n in range(len(batch["labels"]))
            ]
            self.found.remedy = "batch size 1"
        elif "exclude" in line and named and len(self.exclude) < 200:
            self.exclude += named
            self.found.remedy = f"exclude {len(self.exclude)} layers"
        else:
            raise error

    def rows_error(self, profile: Profile) -> tuple[float, str]:
        """The largest relative error of a layer, and the layer.

        Raises:
            LeftOut: torch's own gradients contradict each other.
        """
        found = {name: torch.from_numpy(np.asarray(x)) for name, x in profile.fisher_rows.items()}
        estimator = profile.info.estimator
        wanted = self.rows_by_hand(list(found), estimator)
        worst = _furthest(found, wanted)
        if worst[0] > TOLERANCE:
            alone = self.rows_by_hand([worst[1]], estimator)
            off, _ = _furthest(alone, {name: wanted[name] for name in alone})
            if off > TOLERANCE:
                raise LeftOut(
                    f"torch's gradients of it differ by {off:.1g} with what else requires them"
                )
        return worst

    def rows_by_hand(self, names: list[str], estimator: str) -> dict[str, Tensor]:
        """Squared gradients of single examples, summed over outputs and examples; (in,) each.

        At the given labels, or on average over those that the model would draw.

        Raises:
            LeftOut: torch cannot differentiate the model where its weights require a gradient.
        """
        model = build(self.found.architecture, self.found.head).requires_grad_(False)
        weights = {name: model.get_submodule(name).weight for name in names}
        total = {}
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in self.batches:
            for n in range(len(batch["labels"])):
                one = example(batch, n)
                logits, given = self.logits(model, one), [(1.0, one["labels"])]
                if estimator == "expected":
                    chances = logits.double().softmax(-1).flatten().tolist()
                    given = [(p, torch.full_like(one["labels"], k)) for k, p in enumerate(chances)]
                for chance, labels in given:
                    loss = likelihood(self.what, logits, {**one, "labels": labels}).sum()
                    for name, squares in self._squares(model, weights, loss).items():
                        total[name] = total.get(name, 0.0) + chance * squares
        return total

    def _squares(self, model: Any, weights: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
        try:
            gradients = torch.autograd.grad(
                loss, list(weights.values()), allow_unused=True, retain_graph=True
            )
        except RuntimeError as error:
            raise LeftOut(f"torch has no gradients of it: {_line(error)}") from error
        found = {}
        for name, gradient in zip(weights, gradients, strict=True):
            turned = type(model.get_submodule(name)).__name__ == "Conv1D"
            if gradient is None:
                gradient = torch.zeros_like(weights[name])
            found[name] = gradient.double().square().sum(1 if turned else 0)
        return found

    def plan(self) -> None:
        """Within the budget."""
        self.planned = make_plan(self.measured, keep=0.6)
        assert self.planned.size.planned <= 0.6 * self.planned.size.planned_dense

    def apply(self) -> None:
        """Exactly as many parameters as planned."""
        before = self.outputs(self.model)
        apply_plan(self.model, self.planned, self.measured, progress=False)
        size = model_size(self.model).model
        assert size == self.planned.size.model, (
            f"{size} parameters, planned {self.planned.size.model}"
        )
        self.compressed = self.outputs(self.model)
        assert bool(torch.isfinite(self.compressed).all()), "outputs are not finite"
        assert not torch.equal(self.compressed, before), "outputs are the same after apply"

    def save(self) -> None:
        """As a folder."""
        save_model(self.model, self.folder / "first", plan=self.planned)

    def load(self, name: str) -> Any:
        """From a folder, of which nothing may be missing or left."""
        model, info = type(self.model).from_pretrained(self.folder / name, output_loading_info=True)
        for what in ("missing_keys", "mismatched_keys", "error_msgs"):
            assert not info.get(what), f"{what}: {sorted(map(str, info[what]))[:3]}"
        return model.eval()

    def reload(self) -> None:
        """The same to the bit."""
        self.again = self.load("first")
        self.same(self.again, self.compressed)

    def same(self, model: Any, wanted: Tensor) -> None:
        """Whether a model's outputs are these to the bit."""
        found = self.outputs(model)
        off = float((found - wanted).abs().max())
        assert torch.equal(found, wanted), f"outputs differ by {off:.2g}"

    def resave(self) -> None:
        """What was loaded is saved and loaded, by transformers alone."""
        self.again.save_pretrained(self.folder / "second")
        self.same(self.load("second"), self.compressed)

    def dequantize(self) -> None:
        """Dense again: the same function but for rounding, saved and loaded."""
        dense = self.load("first").dequantize()
        assert not any(isinstance(module, LowRank) for module in dense.modules()), "low rank still"
        found = self.outputs(dense)
        off = float((found - self.compressed).norm() / self.compressed.norm())
        assert off < 1e-3, f"outputs differ by {off:.2g}"
        dense.save_pretrained(self.folder / "dense")
        self.same(self.load("dense"), found)

    def evaluate(self) -> None:
        """The loss is the likelihood of what came back, and of the dense model."""
        found = evaluate(self.again, self.batches, layers=self.measured.info.layers, progress=False)
        wanted = self.mean_loss(self.again)
        assert found.targets == self.targets(), f"{found.targets} targets, by hand {self.targets()}"
        assert abs(found.loss - wanted) < 1e-4 * abs(wanted), (
            f"loss {found.loss:.6g}, by hand {wanted:.6g}"
        )
        assert found.planned_parameters == self.planned.size.planned


STAGES = (
    "inputs",
    "profile",
    "plan",
    "apply",
    "save",
    "reload",
    "resave",
    "dequantize",
    "evaluate",
)


def walk(architecture: str, head: str) -> Outcome:
    """All the way with one architecture; whatever is raised is the outcome."""
    found, started = Outcome(architecture, head), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            journey = Walk(found, Path(folder))
            for stage in STAGES:
                found.stage = stage
                getattr(journey, stage)()
        except LeftOut as error:
            found.outcome, found.reason = "left out", str(error)
        except RankoptError as error:
            found.outcome, found.reason = "refused", f"{type(error).__name__}: {error}"
        except Exception as error:
            found.outcome, found.reason = "FAULT", _line(error)
            last = traceback.extract_tb(error.__traceback__)[-1]
            found.reason += f" [{Path(last.filename).name}:{last.lineno}]"
    found.seconds = round(time.perf_counter() - started, 2)
    return found
