"""Tiny models that were compressed, with the dense ones and batches."""

import copy
import functools
from typing import Any

import torch

from rankopt import apply_plan, make_plan, profile_model
from tests import tiny

#: Large steps, for models whose losses are large.
RECIPE: dict[str, Any] = {"passes": 2, "learning_rate": 3e-3, "progress": False}


@functools.cache
def _made(name: str) -> tuple[Any, Any, list[Any]]:
    dense = tiny.ARCHITECTURES[name]()
    batches = tiny.batches(dense, count=9)
    profile = profile_model(dense, batches, progress=False)
    model = copy.deepcopy(dense)
    apply_plan(model, make_plan(profile, keep=0.6), profile, progress=False)
    return model, dense, batches


def compressed(name: str = "llama") -> tuple[Any, Any, list[Any]]:
    """A compressed model, the dense one, nine batches with padding: the eighth is held out."""
    return copy.deepcopy(_made(name))


def bits(model: Any) -> dict[str, Any]:
    """A copy of all weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Any], model: Any) -> set[str]:
    """Names of the weights that are not to the bit what they were."""
    after = model.state_dict()
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}
