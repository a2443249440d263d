"""Tiny models that were compressed, with the dense ones and batches."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch

from rankopt import apply_plan, make_plan, profile_model
from rankopt.model.lowrank import LowRank
from tests import tiny

#: Large steps, for models whose losses are large.
RECIPE: dict[str, Any] = {"passes": 2, "learning_rate": 3e-3, "progress": False}


#: Of models that lose little; what others keep.
KEEP = {"bert-classification": 0.3, "bert-regression": 0.3, "vit": 0.3}


@functools.cache
def _made(name: str) -> tuple[Any, Any, list[Any]]:
    dense = tiny.ARCHITECTURES[name]()
    batches = tiny.batches(dense, count=9)
    # What loses much has much to learn.
    profile = profile_model(dense, batches, backends=["fwsvd"], form="pairs", progress=False)
    model = copy.deepcopy(dense)
    apply_plan(model, make_plan(profile, keep=KEEP.get(name, 0.6)), profile, progress=False)
    return model, dense, batches


def compressed(name: str = "llama") -> tuple[Any, Any, list[Any]]:
    """A compressed model, the dense one, nine batches with padding: the eighth is held out."""
    return copy.deepcopy(_made(name))


def low_rank_in(model: Any) -> Iterator[LowRank]:
    """The low-rank layers of a model."""
    return (module for module in model.modules() if isinstance(module, LowRank))


def bits(model: Any) -> dict[str, Any]:
    """A copy of all weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Any], model: Any) -> set[str]:
    """Names of the weights that are not to the bit what they were."""
    after = model.state_dict()
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}
