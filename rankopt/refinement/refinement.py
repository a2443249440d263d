"""Refine a compressed model towards the dense one, all or nothing."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from rankopt.apply.refined import Method, Refinement, Unit
from rankopt.errors import ModelError, OptionError
from rankopt.measure.accumulate import eager
from rankopt.measure.taps import differentiable, frozen
from rankopt.model.weights import unwrapped
from rankopt.refinement.blocks import refine_blocks
from rankopt.refinement.distill import distil
from rankopt.refinement.divergence import distillable, logits_of
from rankopt.refinement.fit import Recipe
from rankopt.refinement.job import Job, Outcome, put
from rankopt.refinement.state import Checkpoint, RefinedBlock, fingerprint
from rankopt.refinement.subject import Data, gathered, require_refinable, trained

METHODS: dict[str, Callable[[Job], Outcome]] = {"distill": distil, "blocks": refine_blocks}
#: What each method does if nothing is said.
DEFAULTS = {"distill": Recipe(1e-4, 1), "blocks": Recipe(2e-4, 3)}


@dataclasses.dataclass(frozen=True)
class Refined:
    """What a refinement has done.

    Attributes:
        method: ``distill`` or ``blocks``.
        before: mean over the held-out targets of KL(dense || compressed), in nats (of regressions
            the squared difference), before.
        after: the same of the state that was kept.
        targets: that the kept state was fitted to, each counted once; 0 if it is the start.
        unit: what they are: ``tokens`` or ``examples``.
        examples: that they are of.
        held_out: targets that before and after are means of.
        steps: taken.
        blocks: of the method ``blocks``, each with its own error.
    """

    method: Method
    before: float
    after: float
    targets: int
    unit: Unit
    examples: int
    held_out: int
    steps: int
    blocks: tuple[RefinedBlock, ...] = ()

    def __str__(self) -> str:
        """Two lines."""
        what = f"refined on {self.targets:,} {self.unit} ({self.method}, {self.steps} steps)"
        if not self.targets:
            what = f"not changed: none of {self.steps} steps was better on what is held out"
        return (
            f"held-out loss against the dense model {self.before:.6f} -> {self.after:.6f} "
            f"({self.held_out:,} {self.unit})\n{what}"
        )


def refine(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    method: Method = "distill",
    held_out: Iterable[Any] | None = None,
    vectors: bool = True,
    learning_rate: float | None = None,
    passes: int | None = None,
    warm_up: float = 0.1,
    clip: float = 1.0,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 16,
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Refined:
    """Let the factors of a compressed model learn from the dense one, in place.

    The state that is kept is the best on held-out data, the start among them: it is never worse
    there than before. An error, or Ctrl-C, leaves the model as it was. Nothing drops out, modes
    and trainability are restored. The model is labelled with what it was refined on; what
    ``save_model`` writes and ``from_pretrained`` reads has the label, too.

    Args:
        model: compressed; in memory, on any device. Its factors may be of 16 bits, and learn in 32.
        dense: what it was compressed from; it may be offloaded, and of another dtype.
        batches: as for profile_model, kept in memory.
        method: ``distill`` (from end to end, see distill) or ``blocks`` (one after the other).
        held_out: batches that decide what is kept; by default every eighth of the others, which is
            then not fitted.
        vectors: let biases and norms outside of the low-rank layers learn, too.
        learning_rate: the largest (see fit); 1e-4 for ``distill``, 2e-4 for ``blocks``.
        passes: over the batches; 1 for ``distill``, 3 for ``blocks``.
        warm_up: share of the steps in which the learning rate rises; then it stays.
        clip: largest norm of a step's gradient.
        seed: of the order of the batches.
        checkpoint: file for what has been refined so far; if it is there, go on from it. The bits
            are those of a refinement that was never interrupted.
        checkpoint_every: steps.
        folder: for a temporary folder, if the activations of ``blocks`` do not fit in 2 GiB; the
            system's by default.
        progress: a bar on stderr; by default if it is a terminal.

    Raises:
        ModelError: nothing to refine, a model that cannot learn, or another dense model.
        DataError: no batches, or a checkpoint of something else.
        OptionError: an unknown method, or a number out of range.
        NotFiniteError: a loss or a gradient is NaN or infinite.
    """
    recipe = recipe_of(method, learning_rate, passes, warm_up, clip, seed)
    if checkpoint_every < 1:
        raise OptionError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    model, dense = unwrapped(model), unwrapped(dense)
    require_refinable(model, dense)
    parameters = trained(model, vectors)
    with frozen(model), frozen(dense), differentiable(model), eager(model), eager(dense):
        data = gathered(model, batches, held_out)
        saved = None
        if checkpoint is not None:
            settings = _settings(model, dense, data, method, recipe, vectors)
            saved = Checkpoint(Path(checkpoint), checkpoint_every, settings)
        _require_logits(model, data)
        where = Path(tempfile.gettempdir() if folder is None else folder)
        job = Job(model, dense, data, parameters, recipe, saved, where, progress)
        with _all_or_nothing(parameters) as undo:
            found = METHODS[method](job)
            if not found.after < found.before:
                # Blocks may each be better and the whole be worse.
                undo()
                found = dataclasses.replace(found, after=found.before, seen=frozenset())
    seen = [data.fitted[number] for number in sorted(found.seen)]
    refined = Refined(
        method=method,
        before=found.before,
        after=found.after,
        targets=data.targets(seen),
        unit=data.unit,
        examples=data.examples(seen),
        held_out=data.targets(data.held_out),
        steps=found.steps,
        blocks=found.blocks,
    )
    if seen:
        _label(model, refined, recipe, data)
    return refined


def recipe_of(
    method: str,
    learning_rate: float | None = None,
    passes: int | None = None,
    warm_up: float = 0.1,
    clip: float = 1.0,
    seed: int = 0,
) -> Recipe:
    """The method's usual recipe, but for what is given; see refine.

    Raises:
        OptionError: an unknown method, or a number out of range.
    """
    if method not in get_args(Method):
        raise OptionError(f"unknown method {method!r}; known: {', '.join(get_args(Method))}")
    usual = DEFAULTS[method]
    return Recipe(
        usual.learning_rate if learning_rate is None else learning_rate,
        usual.passes if passes is None else passes,
        warm_up,
        clip,
        seed,
    )


@contextlib.contextmanager
def _all_or_nothing(parameters: Mapping[str, nn.Parameter]) -> Iterator[Callable[[], None]]:
    """What was there before is back after an error, and when what is yielded is called."""
    before = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}

    def undo() -> None:
        put(before, parameters)

    try:
        yield undo
    except BaseException:
        undo()
        raise


def _require_logits(model: nn.Module, data: Data) -> None:
    ready = data.fitted[0]
    with torch.no_grad():
        _, output = logits_of(model, ready)
    if not distillable(data.task, output, ready["labels"]):
        raise ModelError(
            f"{type(model).__name__} has no logits for its labels, so there is nothing to compare "
            "with the dense model's: it cannot be refined"
        )


def _settings(
    model: nn.Module, dense: nn.Module, data: Data, method: str, recipe: Recipe, vectors: bool
) -> dict[str, Any]:
    """What must be the same when a checkpoint is gone on from."""
    return {
        "model": fingerprint(model),
        "dense model": fingerprint(dense),
        "data": data.digest,
        "held_out": data.held_out_digest,
        "method": method,
        "vectors": vectors,
        **dataclasses.asdict(recipe),
    }


def _label(model: nn.Module, refined: Refined, recipe: Recipe, data: Data) -> None:
    """Say on the model what it was refined on; a model that is not of transformers has no place."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return
    entry = Refinement(
        method=refined.method,
        targets=refined.targets,
        unit=refined.unit,
        examples=refined.examples,
        passes=recipe.passes,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        data=data.digest,
    )
    config.refined = [*config.refined, entry.model_dump()]
