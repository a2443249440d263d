"""What models lose, as a share of what a profile says: truncated, and rounded to each of its bits.

The second-order estimates of both kinds of change rank layers and ranks well, and are off by
factors of their own: truncation takes from all layers what they have in common and adds up to
several times the sum of its parts, rounding errors are independent (experiments/18_rank_and_bits).
Where both are on offer, one has to be told in terms of the other.
So a few models are measured: of an exact plan, and with all weights rounded. What is measured is
the divergence from the dense model (see rankopt.refinement.divergence), which needs few examples.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rankopt.apply.apply import applied
from rankopt.backends.rounding import rounded
from rankopt.errors import DataError, InfeasibleBudgetError
from rankopt.layers import DENSE, Bits
from rankopt.measure.loss import find_loss
from rankopt.model.inputs import listed
from rankopt.model.tasks import Batch, in_eval
from rankopt.model.weights import device_of, is_conv1d, unwrapped
from rankopt.plan.planner import make_plan
from rankopt.profile.profile import Profile
from rankopt.progress import bar
from rankopt.refinement.divergence import distillable, divergences, logits_of

#: As many targets are plenty, and the predictions for them small.
MOST_TARGETS = 1024


@torch.no_grad()
def measure_shares(
    model: nn.Module,
    profile: Profile,
    batches: Iterable[Any],
    *,
    keep: float = 0.8,
    progress: bool | None = None,
) -> Profile:
    """The profile, with what truncation and rounding were measured to lose of what it says.

    It is what it was where it has no bits, the model makes no predictions (a ``loss_fn``), or its
    weights are offloaded.

    Args:
        model: the dense model that was profiled; as it was, afterwards.
        profile: made with ``bits``.
        batches: as for profile_model, others than that saw: factors lose less of what made them,
            and rounding does not. Up to 1,024 targets are used.
        keep: budget of the plan that is measured, a share of the planned layers' parameters.
        progress: a bar on stderr; by default if it is a terminal.

    Raises:
        DataError: no batches, or batches without targets.
        BudgetError: ``keep`` is no share.
        PlanError, ModelError: see apply_plan.
    """
    inner, info = unwrapped(model), profile.info
    if info.task == "custom" or not info.bits:
        return profile
    held = (inner.get_submodule(layer.name).get_parameter("weight") for layer in info.layers)
    offloaded = any(weight.is_meta for weight in held)
    subject = None if offloaded else _Subject.of(inner, batches)
    if subject is None:
        return profile
    kinds = (None, *info.bits)
    work = [(each.name, kind) for each in info.backends for kind in kinds]
    found: dict[str, list[float]] = {}
    for backend, kind in bar(work, "Shares", "model", progress):
        changed = _truncated if kind is None else functools.partial(_rounded, bits=kind)
        share = _share(subject, changed, inner, profile, backend, keep)
        found.setdefault(backend, []).append(share)
    backends = tuple(
        each.model_copy(update={"measured_shares": tuple(found[each.name])})
        for each in info.backends
    )
    return dataclasses.replace(profile, info=info.model_copy(update={"backends": backends}))


@dataclasses.dataclass(frozen=True)
class _Subject:
    """Data, and what the dense model predicts on it.

    Attributes:
        task: see tasks.
        ready: prepared batches.
        dense: the dense model's logits of each.
    """

    task: str
    ready: Sequence[Batch]
    dense: Sequence[Tensor]

    @classmethod
    def of(cls, model: nn.Module, batches: Iterable[Any]) -> "_Subject | None":
        """None of a model without predictions to compare."""
        loss, ready, dense, targets = find_loss(model, None), list[Batch](), list[Tensor](), 0
        with in_eval(model):
            for number, batch in enumerate(listed(batches)):
                loss = loss if number else loss.settled(model, batch)
                one = loss.ready(batch, device_of(model), number)
                if "labels" not in one:
                    return None
                logits, output = logits_of(model, one)
                if not distillable(loss.task, output, one["labels"]):
                    return None
                ready.append(one)
                # What 8 bits lose of a small model is below what float32 tells of sums near 1.
                dense.append(logits.double())
                targets += divergences(loss.task, logits, logits, one["labels"]).numel()
                if targets >= MOST_TARGETS:
                    break
        if not targets:
            raise DataError("no batches with targets were given")
        return cls(loss.task, ready, dense)

    def divergence(self, model: nn.Module) -> float:
        """Of a target, in the mean."""
        with in_eval(model):
            found = [
                divergences(self.task, logits_of(model, one)[0].double(), dense, one["labels"])
                for one, dense in zip(self.ready, self.dense, strict=True)
            ]
        return float(torch.cat(found).mean().detach())


#: A context in which the model is changed; yields what the profile says that it loses, per unit.
_Change = Callable[[nn.Module, Profile, str, float], contextlib.AbstractContextManager[float]]


def _share(
    subject: _Subject,
    changed: _Change,
    model: nn.Module,
    profile: Profile,
    backend: str,
    keep: float,
) -> float:
    """1 where nothing is lost, or nothing fits the budget."""
    info = profile.info
    try:
        with changed(model, profile, backend, keep) as predicted:
            measured = subject.divergence(model)
    except InfeasibleBudgetError as error:
        tqdm.write(f"note: truncation is not measured: {error}", file=sys.stderr)
        return 1.0
    share = measured / (predicted * info.units / info.targets) if predicted > 0.0 else 1.0
    return share if math.isfinite(share) and share > 0.0 else 1.0


@contextlib.contextmanager
def _truncated(model: nn.Module, profile: Profile, backend: str, keep: float) -> Iterator[float]:
    plan = make_plan(profile, keep=keep, backend=backend, scale=_nats_of(profile, backend))
    with applied(model, plan, profile, progress=False):
        yield plan.certificate.loss


@contextlib.contextmanager
def _rounded(
    model: nn.Module, profile: Profile, backend: str, keep: float, bits: Bits
) -> Iterator[float]:
    """All weights that may be."""
    before: dict[str, Tensor] = {}
    lost = 0.0
    try:
        for layer in profile.info.layers:
            measured = profile.rounding_of(backend, layer.name).get(bits)
            if measured is not None:
                module: Any = model.get_submodule(layer.name)
                weight = before[layer.name] = module.weight.data
                turned = weight.T if is_conv1d(module) else weight
                new = rounded(turned, bits).to(weight.dtype)
                module.weight.data = new.T.contiguous() if is_conv1d(module) else new
                lost += float(measured[layer.rounded_ranks(profile.info.form) == DENSE][0])
        yield lost
    finally:
        for name, weight in before.items():
            model.get_submodule(name).weight.data = weight


def _nats_of(profile: Profile, backend: str) -> str | None:
    scales = profile.backend(backend).scales
    return next((scale.name for scale in scales if scale.unit.startswith("nats")), None)
