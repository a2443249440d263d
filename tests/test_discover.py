"""What is planned, what is left alone and why, and how large a model is."""

from typing import Any

import pytest
import torch
from torch import nn

from rankopt import LowRankLinear, ModelError
from rankopt.discover import find_layers, fingerprint, model_size, weight_of
from tests import tiny

_BERT = [
    *(f"attention.self.{part}" for part in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
]
_T5 = [f"SelfAttention.{part}" for part in "qkvo"]
_T5_MLP = ["DenseReluDense.wi", "DenseReluDense.wo"]

#: Every planned layer by name, written out by hand.
PLANNED = {
    "llama": [
        f"model.layers.{n}.{kind}"
        for n in range(2)
        for kind in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    ],
    "gpt2": [
        f"transformer.h.{n}.{kind}"
        for n in range(2)
        for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
    "bert-classification": [f"bert.encoder.layer.{n}.{kind}" for n in range(2) for kind in _BERT],
    "albert": [
        f"albert.encoder.albert_layer_groups.0.albert_layers.0.{kind}"
        for kind in (
            *(f"attention.{part}" for part in ("query", "key", "value", "dense")),
            *("ffn", "ffn_output"),
        )
    ],
    "t5": [
        *(f"encoder.block.{n}.layer.0.{kind}" for n in range(2) for kind in _T5),
        *(f"encoder.block.{n}.layer.1.{kind}" for n in range(2) for kind in _T5_MLP),
        *(f"decoder.block.{n}.layer.0.{kind}" for n in range(2) for kind in _T5),
        *(f"decoder.block.{n}.layer.1.EncDecAttention.{part}" for n in range(2) for part in "qkvo"),
        *(f"decoder.block.{n}.layer.2.{kind}" for n in range(2) for kind in _T5_MLP),
    ],
}

#: Some of what is left alone, and its parameters.
LEFT_ALONE = {
    "llama": {"model.embed_tokens": 64 * 24, "lm_head": 64 * 24},
    "gpt2": {"transformer.wte": 64 * 24, "transformer.wpe": 64 * 24, "lm_head": 64 * 24},
    "bert-classification": {
        "bert.embeddings.word_embeddings": 64 * 24,
        "bert.pooler.dense": 24 * 24 + 24,
        "classifier": 2 * 24 + 2,
    },
    "albert": {
        "albert.encoder.embedding_hidden_mapping_in": 16 * 24 + 24,
        "albert.pooler": 24 * 24 + 24,
    },
    "t5": {
        "shared": 64 * 24,
        "lm_head": 64 * 24,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": 32 * 4,
    },
}


def reasons(model: nn.Module) -> dict[str, str]:
    return {entry.name: entry.reason for entry in find_layers(model).left_alone}


@pytest.mark.parametrize("kind", PLANNED)
def test_only_matrices_inside_the_blocks_are_planned(kind: str) -> None:
    model = tiny.MODELS[kind]()
    found = find_layers(model)
    assert sorted(layer.name for layer in found.layers) == sorted(PLANNED[kind])
    left = {entry.name: entry.parameters for entry in found.left_alone}
    assert LEFT_ALONE[kind].items() <= left.items()
    assert not left.keys() & set(PLANNED[kind])
    assert all(entry.reason for entry in found.left_alone)
    assert all(found.modules[name] is model.get_submodule(name) for name in PLANNED[kind])


def test_conv1d_is_described_and_read_in_normal_form() -> None:
    model = tiny.gpt2()
    found = find_layers(model)
    layer = next(x for x in found.layers if x.name == "transformer.h.0.attn.c_attn")
    assert (layer.out_features, layer.in_features, layer.kind) == (72, 24, "attn.c_attn")
    module = model.transformer.h[0].attn.c_attn
    assert module.weight.shape == (24, 72)
    x = torch.randn(2, 24)
    assert torch.allclose(module(x), x @ weight_of(module).T + module.bias, atol=1e-5)


class Special(nn.Linear):
    pass


def test_subclasses_of_linear_are_left_alone() -> None:
    model = tiny.llama()
    model.model.layers[0].mlp.up_proj = Special(24, 40, bias=False)
    name = "model.layers.0.mlp.up_proj"
    assert name not in find_layers(model).modules
    assert reasons(model)[name] == "not a plain nn.Linear or Conv1D"


def test_tied_matrices_are_left_alone_and_name_each_other() -> None:
    model = tiny.llama()
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(2)]
    assert not set(names) & find_layers(model).modules.keys()
    assert reasons(model)[names[0]] == f"its weight is tied to {names[1]}"
    assert reasons(model)[names[1]] == f"its weight is tied to {names[0]}"


def test_matrices_of_which_no_rank_saves_are_left_alone() -> None:
    model = tiny.llama()
    model.model.layers[0].gate = nn.Linear(24, 1)
    assert reasons(model)["model.layers.0.gate"] == "no rank of a 1 x 24 matrix saves any"


def test_weights_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = type(tiny.llama())(tiny.llama().config)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj.*not loaded"):
        find_layers(model)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to plan"):
        find_layers(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))


def test_an_infinite_weight_is_refused_naming_the_layer() -> None:
    model = tiny.bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[2, 3] = torch.inf
    with pytest.raises(ModelError, match=r"bert\.encoder\.layer\.1\.output\.dense.*NaN or inf"):
        find_layers(model)


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


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_the_size_counts_tied_parameters_once(kind: str) -> None:
    model = tiny.MODELS[kind]()
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
