"""What is refined, towards what, and on which data: all that is looked at before the first step."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rankopt.apply.quantizer import RankoptConfig
from rankopt.apply.refined import Unit
from rankopt.data.digest import chained
from rankopt.errors import DataError, ModelError, few
from rankopt.measure.taps import require_gradients
from rankopt.model.inputs import OF_TOKENS, limits_of, listed
from rankopt.model.lowrank import LowRank
from rankopt.model.rounding import holds_rounded
from rankopt.model.selection import require_no_adapters
from rankopt.model.tasks import Batch, loss_terms, prepare, settled, task_of
from rankopt.model.weights import shown_shape, weight_shape

#: Every so-manieth batch is held out, if none are given for that.
EVERY = 8


@dataclasses.dataclass(frozen=True)
class Data:
    """Prepared batches, on the CPU.

    Attributes:
        task: settled on the first.
        fitted: batches that are learnt from.
        held_out: batches that decide what is kept.
        digest: of all batches that were given to be fitted, as a profile of them has it.
        held_out_digest: of those that were given to be held out; "" if none were.
    """

    task: str
    fitted: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    digest: str
    held_out_digest: str

    @property
    def unit(self) -> Unit:
        """What a target is."""
        return "tokens" if self.task in OF_TOKENS else "examples"

    def targets(self, batches: Iterable[Batch]) -> int:
        """Loss terms of batches; of tasks with several numbers an example, their examples."""
        if self.task in ("regression", "multi-label-classification"):
            return self.examples(batches)
        return sum(int(loss_terms(self.task, batch["labels"]).sum()) for batch in batches)

    def examples(self, batches: Iterable[Batch]) -> int:
        """Examples of batches."""
        return sum(len(batch["labels"]) for batch in batches)


def gathered(model: nn.Module, batches: Any, held_out: Any) -> Data:
    """All batches, prepared; every eighth of them is held out, or the last of fewer.

    Args:
        model: with its own loss.
        batches: as profile_model takes them.
        held_out: likewise, or None.

    Raises:
        DataError: no batches, none to hold out, or one that does not fit the task.
        ModelError: a loss that is not known.
    """
    given = list(listed(batches))
    if not given:
        raise DataError("no batches were given")
    task, _, _ = settled(model, task_of(model), given[0])
    ready, digest = _prepared(model, task, given)
    if held_out is not None:
        others, held_out_digest = _prepared(model, task, list(listed(held_out)))
        if not others:
            raise DataError("held_out has no batches: give some, or leave it out")
        return Data(task, tuple(ready), tuple(others), digest, held_out_digest)
    if len(ready) < 2:
        raise DataError(
            "one batch was given, and one is held out to tell what to keep: give more data, or a "
            "smaller batch_size (in Python also: batches to be held out)"
        )
    held = set(range(EVERY - 1, len(ready), EVERY)) or {len(ready) - 1}
    return Data(
        task,
        tuple(batch for number, batch in enumerate(ready) if number not in held),
        tuple(ready[number] for number in sorted(held)),
        digest,
        "",
    )


def _prepared(model: nn.Module, task: str, batches: Sequence[Any]) -> tuple[list[Batch], str]:
    ready, chain, limits = list[Batch](), "", limits_of(model, task)
    for number, batch in enumerate(batches):
        ready.append(prepare(task, batch, torch.device("cpu"), number, limits))
        chain = chained(chain, ready[-1])
    return ready, chain


def require_refinable(model: nn.Module, dense: nn.Module) -> None:
    """Refuse what cannot be refined, and a dense model that is another.

    Raises:
        ModelError: says what to do.
    """
    require_gradients(model, "refine")
    for each in (model, dense):
        require_no_adapters(each)
    for name, module in model.named_modules():
        if holds_rounded(module):
            raise ModelError(
                f"layer {name} is rounded, and rounded weights do not learn: refine a model that a "
                "plan without bits was applied to"
            )
    low = {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}
    if not low:
        raise ModelError(
            "the model has no low-rank layers, so there is nothing to refine: apply a plan first "
            "(rankopt.apply_plan, or rankopt apply)"
        )
    for name, module in dense.named_modules():
        if isinstance(module, LowRank):
            raise ModelError(
                f"the dense model's layer {name} is low rank: give the model that the other was "
                "compressed from"
            )
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None and not isinstance(config, RankoptConfig):
        raise ModelError("the model is quantised: refine it before it is quantised")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"parameter {name} is offloaded, where it cannot learn: load the model to be "
                "refined without device_map (the dense one may be offloaded), or refine it on a "
                "machine with more memory"
            )
    for name, module in low.items():
        for own, parameter in module.named_parameters():
            if not parameter.is_floating_point() or parameter.element_size() < 2:
                raise ModelError(
                    f"{name}.{own} is {parameter.dtype}, quantised: refine the model before it is "
                    "quantised"
                )
    _require_same(model, dense, low)


def _require_same(model: nn.Module, dense: nn.Module, low: dict[str, LowRank]) -> None:
    """Refuse a dense model of other layers or shapes."""
    ours, theirs = _shapes(model, low), _shapes(dense, low)
    for name, layer in low.items():
        ours[f"{name}.weight"] = layer.shape
        try:
            theirs[f"{name}.weight"] = weight_shape(dense.get_submodule(name))
        except (AttributeError, ValueError):
            continue  # it is missing there, or no layer
    different = [
        f"{name} is {shown_shape(theirs.get(name))}, not {shown_shape(ours.get(name))}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if different:
        raise ModelError(
            "the dense model is not what the model was compressed from: "
            f"{few(different, between='; ')}"
        )


def _shapes(model: nn.Module, low: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Of all parameters that are not in the low-rank layers."""
    inside = tuple(f"{name}." for name in low)
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(inside)
    }


def trained(model: nn.Module, vectors: bool) -> dict[str, nn.Parameter]:
    """What learns: all of the low-rank layers, and biases and norms, which are vectors.

    Args:
        model: compressed.
        vectors: also the vectors outside of the low-rank layers.
    """
    inside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, LowRank)
        for parameter in module.parameters()
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in inside
        or (vectors and parameter.dim() <= 1 and parameter.is_floating_point())
    }
