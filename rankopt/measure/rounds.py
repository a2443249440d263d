"""A second round over the data, on the model that a plan of the first would leave.

Second moments of inputs and gradients are those of the dense model, but a layer of the compressed
one sees what the layers before it have left, and its errors meet what those behind it have left.
So they are measured once more where the planned layers compute with their low-rank weights, and
averaged with the first: half of what the estimate is of is where the model comes from, half is
where it goes. (GPTQ and SVD-LLM(W) update their inputs layer by layer, Frantar et al. 2023, Wang et
al. 2025; here all layers change at once, and the gradients, too.) W stays the dense weight: it is
what is factorised, and what the moments on the small side are of.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.errors import ModelError
from rankopt.measure.accumulate import Gathered, gather
from rankopt.measure.assemble import Parts, Subject, assembled
from rankopt.measure.decompose import ScaledCurve, Store
from rankopt.model.weights import weight_of
from rankopt.profile.profile import Profile

#: The model and its profile so far, of the first backend -> planned layer -> the weight that it
#: would be left with, as its module has it; layers that are not there stay dense.
Compress = Callable[[nn.Module, Profile], Mapping[str, Tensor]]


def second_round(
    subject: Subject,
    compress: Compress,
    first: Gathered,
    curves: Mapping[str, Mapping[str, ScaledCurve]],
    store: Store,
    batches: Iterable[Any],
    **how: Any,
) -> Gathered:
    """The mean of the first round and of one on the compressed model.

    Args:
        subject: its selection without layers that no gradient reached.
        compress: says with what weights.
        first: on the dense model; its sums are used up.
        curves: of the first, of one backend.
        store: arrays that were kept with them.
        batches: the same again, a list.
        how: needs, halves, checkpoint and progress.

    Returns:
        The first itself where no layer would have another weight.

    Raises:
        ModelError: an offloaded layer, or see gather.
    """
    parts = Parts()
    parts.add(subject.selection.layers, first, curves)
    weights = compress(subject.model, assembled(subject, parts, store))
    if not weights:
        return first
    modules = {name: subject.selection.modules[name] for name in first.names}
    dense = {name: weight_of(modules[name]) for name in weights}
    with computing_with({modules[name]: weight for name, weight in weights.items()}):
        second = gather(
            subject.model,
            modules,
            batches,
            subject.loss,
            processes=subject.processes,
            weights=dense,
            **how,
        )
    return averaged(first, second)


@contextlib.contextmanager
def computing_with(weights: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Inside the ``with`` modules have other weights, then their own again.

    Raises:
        ModelError: a weight is not where its module is.
    """
    kept = {module: module.get_parameter("weight") for module in weights}
    if any(parameter.is_meta for parameter in kept.values()):
        raise ModelError(
            "a second round gives layers other weights for a while, which offloaded ones cannot "
            "have: profile with one round"
        )
    data = {module: parameter.data for module, parameter in kept.items()}
    try:
        for module, parameter in kept.items():
            parameter.data = weights[module].to(parameter.device, parameter.dtype)
        yield
    finally:
        for module, parameter in kept.items():
            parameter.data = data[module]


def averaged(first: Gathered, second: Gathered) -> Gathered:
    """Both rounds over the same data, each as one half; counted are the data once."""
    for ours, theirs in zip(first.banks, second.banks, strict=True):
        for name, sums in ours.items():
            others = theirs[name].tensors()
            with torch.no_grad():
                for kind, tensor in sums.tensors().items():
                    tensor.add_(others[kind]).mul_(0.5)
            sums.seen = max(sums.seen, theirs[name].seen)
    totals = [
        (this + that) / 2 for this, that in zip(first.seen.totals, second.seen.totals, strict=True)
    ]
    return dataclasses.replace(first, seen=dataclasses.replace(first.seen, totals=totals))
