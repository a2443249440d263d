"""How large a model is, dense and compressed, and what it is recognised by."""

from typing import Any

import pytest
import torch

from rankopt import LowRankLinear
from rankopt.layers import fingerprint
from rankopt.model.lowrank import LowRankEmbedding
from rankopt.model.selection import find_layers
from rankopt.model.size import model_size
from tests import tiny


def fingerprint_of(model: Any) -> str:
    return fingerprint(type(model).__name__, find_layers(model).layers)


def test_the_fingerprint_recognises_a_model_and_its_weights() -> None:
    original, changed = fingerprint_of(tiny.llama()), tiny.llama()
    assert fingerprint_of(tiny.llama()) == original
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight.mul_(1.001)
    assert fingerprint_of(changed) != original
    assert fingerprint("Other", find_layers(tiny.llama()).layers) != original
    wider = {"intermediate_size": 48}
    assert fingerprint_of(tiny.llama(**wider)) != original


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_the_size_counts_tied_parameters_once(kind: str) -> None:
    model = tiny.ARCHITECTURES[kind]()
    tensors = {p.data_ptr(): p.numel() for p in model.state_dict().values()}
    # Buffers (BERT's position ids) are in no state dict of these models.
    size = model_size(model)
    assert size.model == sum(tensors.values())
    assert size.model_bytes == 4 * size.model
    assert model_size(model.to(torch.bfloat16)).model_bytes == 2 * size.model
    assert size.planned == sum(layer.dense_cost for layer in find_layers(model).layers)


def test_the_size_of_a_compressed_model_counts_its_factors() -> None:
    model = tiny.bert()
    before = model_size(model)
    model.bert.encoder.layer[0].output.dense = LowRankLinear(40, 24, 3, bias=True)
    after = model_size(model)
    saved = 40 * 24 - 3 * (40 + 24)
    assert before.planned - after.planned == saved
    assert before.model - after.model == saved


def test_the_size_counts_as_planned_what_was_planned() -> None:
    model = tiny.llama()
    layers = find_layers(model, include=["lm_head", "*.q_proj"], untie=True).layers
    dense = model_size(model)
    assert model_size(model, layers).planned == 64 * 24 + 2 * 24 * 24
    assert model_size(model, ()).planned == 0
    model.model.embed_tokens = LowRankEmbedding(64, 24, 3)
    model.lm_head = LowRankLinear(24, 64, 3, bias=False)
    low_rank = model_size(model, layers)
    assert low_rank.planned == 2 * 3 * (64 + 24) + 2 * 24 * 24
    assert low_rank.model == dense.model - 64 * 24 + 2 * 3 * (64 + 24)
    assert model_size(model).planned == dense.planned + 2 * 3 * (64 + 24)
