"""What ``--dry-run`` shows: what a command would do, without the part that takes long.

Models and data are read, and to measure one batch is run, so that what would fail at once fails
here. Nothing is written.
"""

import math
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from rankopt.apply.apply import Planned
from rankopt.backends import find_backends, rounding, valued
from rankopt.cli.tables import coverage
from rankopt.errors import NotFiniteError, few, printable
from rankopt.measure.accumulate import eager
from rankopt.measure.checks import bytes_of_pass, check_options
from rankopt.measure.estimators import Estimator
from rankopt.measure.loss import find_loss
from rankopt.measure.taps import differentiable, probe, require_gradients
from rankopt.model.selection import find_layers
from rankopt.model.size import model_size
from rankopt.model.tasks import Batch
from rankopt.model.weights import device_of
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from rankopt.refinement.refinement import recipe_of
from rankopt.refinement.subject import gathered, require_refinable, trained


def profile_preview(
    model: nn.Module,
    batches: Sequence[Batch],
    options: Mapping[str, Any],
) -> str:
    """What would be measured, on what, in which memory and about how long.

    Args:
        model: dense.
        batches: all of the data.
        options: of profile_model.

    Raises:
        ModelError: see profile_model.
        DataError: see profile_model.
        OptionError: see profile_model.
        NotFiniteError: the loss of the first batch is NaN or infinite.
    """
    asked = SimpleNamespace(**options)
    once = asked.cross_fit, asked.layers_at_a_time
    check_options(asked.form, asked.moments, *once, asked.bits)
    chosen = find_backends(asked.backends)
    require_gradients(model, "profile_model")
    selection = find_layers(model, include=asked.include, exclude=asked.exclude, untie=asked.untie)
    estimator = Estimator(asked.estimator, asked.unit, asked.draws, asked.seed)
    loss = find_loss(model, None, estimator)
    with differentiable(model), eager(model):
        loss = loss.settled(model, batches[0])
        ready = loss.ready(batches[0], device_of(model))
        start = time.perf_counter()
        summed = []
        found = probe(
            model, selection.modules, lambda one: summed.append(loss.backward(one, model, ready, 0))
        )
        seconds = time.perf_counter() - start
    (first,) = summed
    mean = first.loss / max(first.targets, 1)
    if not math.isfinite(mean):
        raise NotFiniteError(f"the loss of the first batch is {mean}: nothing can be measured")
    size, layers = model_size(model), selection.layers
    halves = asked.cross_fit and valued.any_fitted(chosen.values())
    rounds = 1 if asked.again is None else 2
    at_a_time = min(asked.layers_at_a_time or len(layers), len(layers))
    needs = valued.needs_of(chosen.values(), asked.moments)
    needs |= rounding.NEEDS if asked.bits else frozenset()
    sums = bytes_of_pass(selection, needs, (1 + halves) * rounds)
    passes = math.ceil(len(layers) / at_a_time) * rounds
    lines = [
        f"{type(model).__name__}, {loss.task}: {loss.estimator.kind} Fisher per "
        f"{loss.estimator.unit}; loss of the first batch {mean:.4f}",
        f"  backends    {', '.join(chosen)}",
        f"  data        {len(batches):,} batches, gone through {_times(passes)}",
        f"  time        about {_spoken(passes * len(batches) * seconds)}, by the first batch, and "
        "the decompositions",
        f"  memory      up to {sums * at_a_time / len(layers) / 1e9:.3g} GB of sums, beside "
        f"{size.model_bytes / 1e9:.3g} GB of the model",
    ]
    for names, what in ((found.refused, "would be left alone"), (found.silent, "are silent")):
        if names:
            why = next(iter(names.values()))
            lines.append(f"  note        {len(names)} layers {what} ({few(names)}): {why}")
    planned = sum(layer.dense_cost for layer in selection.layers)
    lines += coverage(len(selection.layers), planned, size.model, selection.left_alone, asked.form)
    return "\n".join(map(printable, lines))


def apply_preview(model: nn.Module, plan: Plan, profile: Profile, allow_other_weights: bool) -> str:
    """What would become of a model, which is held against the plan.

    Args:
        model: dense; its weights may be left in their files.
        plan: see apply_plan.
        profile: see apply_plan.
        allow_other_weights: see apply_plan.

    Raises:
        PlanError, ModelError, OptionError: see apply_plan.
    """
    planned = Planned.of(model, plan, profile, allow_other_weights)
    stored = sum(map(planned.is_stored, planned.ranks))
    found = model_size(model)
    return "\n".join(
        [
            f"{type(model).__name__}: {len(planned.ranks):,} of {len(planned.modules):,} planned "
            f"modules would be low rank, {plan.size.model:,} of {found.model:,} parameters left",
            f"  factors     {stored:,} from the profile, "
            f"{len(planned.ranks) - stored:,} decomposed again",
        ]
    )


def refine_preview(
    model: nn.Module,
    dense: nn.Module,
    batches: Sequence[Batch],
    method: str,
    passes: int | None,
    vectors: bool,
) -> str:
    """What would learn, from what.

    Args:
        model: compressed.
        dense: what it was compressed from.
        batches: all of the data.
        method: see rankopt.refine.
        passes: over the data; the method's if not given.
        vectors: biases and norms learn, too.

    Raises:
        ModelError: see refine.
        DataError: see refine.
        OptionError: see refine.
    """
    passes = recipe_of(method, passes=passes).passes
    require_refinable(model, dense)
    learns = trained(model, vectors)
    data = gathered(model, batches, None)
    count = sum(parameter.numel() for parameter in learns.values())
    fitted, held_out = data.targets(data.fitted), data.targets(data.held_out)
    return "\n".join(
        [
            f"{type(model).__name__}, {data.task}: {count:,} of {model_size(model).model:,} "
            f"parameters would learn, in {len(learns):,} tensors",
            f"  fitted      {fitted:,} {data.unit} in {len(data.fitted):,} batches, "
            f"{passes * len(data.fitted):,} steps",
            f"  held out    {held_out:,} {data.unit} in {len(data.held_out):,} batches",
        ]
    )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _spoken(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
