"""What is planned, and what is left alone and why."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.dinov2 import modeling_dinov2

from rankopt import ModelError
from rankopt.model.matrices import NOT_SELECTED
from rankopt.model.selection import find_layers, find_planned
from rankopt.model.size import model_size
from rankopt.model.weights import weight_of
from tests import tiny

_BERT = [
    *(f"attention.self.{part}" for part in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
]
_T5 = [f"SelfAttention.{part}" for part in "qkvo"]
_T5_MLP = ["DenseReluDense.wi", "DenseReluDense.wo"]
_DINO = [f"attention.{part}_proj" for part in "qkvo"]
if hasattr(modeling_dinov2, "Dinov2SelfAttention"):  # before transformers named them anew
    _DINO = [f"attention.attention.{part}" for part in ("query", "key", "value")]
    _DINO.append("attention.output.dense")

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
    "mixtral": [f"model.layers.{n}.self_attn.{part}_proj" for n in range(2) for part in "qkvo"],
    "dinov2": [
        f"dinov2.encoder.layer.{n}.{kind}"
        for n in range(2)
        for kind in (*_DINO, "mlp.fc1", "mlp.fc2")
    ],
    "whisper": [
        f"model.{side}.layers.{n}.{kind}"
        for side in ("encoder", "decoder")
        for n in range(2)
        for kind in (
            *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
            *(f"encoder_attn.{p}_proj" for p in ("q", "k", "v", "out") if side == "decoder"),
            *("fc1", "fc2"),
        )
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
    "mixtral": {
        # Four experts of three matrices, in two tensors; the router chooses among them.
        "model.layers.0.mlp.experts": 4 * 3 * 24 * 40,
        "model.layers.1.mlp.experts": 4 * 3 * 24 * 40,
        "model.layers.0.mlp.gate": 4 * 24,
        "lm_head": 64 * 24,
    },
    "dinov2": {
        "dinov2.embeddings.patch_embeddings.projection": 3 * 4 * 4 * 24 + 24,
        "classifier": 2 * 24 * 3 + 3,
    },
    "whisper": {
        "model.encoder.conv1": 6 * 24 * 3 + 24,
        "model.decoder.embed_tokens": 64 * 24,
        "model.decoder.embed_positions": 32 * 24,
        "proj_out": 64 * 24,
    },
}


def reasons(model: nn.Module) -> dict[str, str]:
    return {entry.name: entry.reason for entry in find_layers(model).left_alone}


@pytest.mark.parametrize("kind", PLANNED)
def test_only_matrices_inside_the_blocks_are_planned(kind: str) -> None:
    model = tiny.ARCHITECTURES[kind]()
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


class Same(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Special(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2.0


class Masked(nn.Linear):
    """A further tensor, of no consequence so far."""

    def __init__(self, *args: int, **kwargs: bool) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones(self.out_features, self.in_features))


class Wants(nn.Linear):
    def forward(self, input: torch.Tensor, scale: float) -> torch.Tensor:
        return super().forward(input) * scale


class Pair(nn.Linear):
    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(input), None


@pytest.mark.parametrize("kind", [Special, Masked, Wants, Pair])
def test_subclasses_of_linear_that_are_more_are_left_alone(kind: type[nn.Linear]) -> None:
    model = tiny.llama()
    model.model.layers[0].mlp.up_proj = kind(24, 40, bias=False)
    name = "model.layers.0.mlp.up_proj"
    assert name not in find_layers(model).modules
    assert reasons(model)[name].startswith(f"{kind.__name__} is a subclass of nn.Linear that comp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_subclasses_of_linear_that_compute_the_same_are_planned(
    bias: bool, dtype: torch.dtype
) -> None:
    model = tiny.llama()
    model.model.layers[0].mlp.up_proj = layer = Same(24, 40, bias=bias)
    model.to(dtype)
    assert find_layers(model).modules["model.layers.0.mlp.up_proj"] is layer


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


def test_all_linear_layers_of_a_model_without_blocks_are_planned() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    found = find_layers(model)
    assert [layer.name for layer in found.layers] == ["1"]
    assert {entry.name for entry in found.left_alone} == {"0", "3"}
    assert model_size(model).planned == 64


def test_a_model_with_blocks_does_not_fall_back_on_its_head() -> None:
    model = nn.Sequential(nn.ModuleList([Special(8, 8)]), nn.Linear(8, 8))
    with pytest.raises(ModelError, match=r"nothing to plan: Special is a subclass of nn\.Linear"):
        find_layers(model)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(8, 8)])
def test_a_model_without_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match=f"{type(model).__name__} has nothing to plan"):
        find_layers(model)


def test_fused_experts_are_listed_as_what_they_are() -> None:
    experts = "model.layers.0.mlp.experts"
    assert reasons(tiny.mixtral())[experts] == "fused expert weights (E x out x in): not covered"
    with pytest.raises(ModelError, match=f"{experts} cannot be planned: fused expert weights"):
        find_layers(tiny.mixtral(), include=["*.experts"])


def test_weights_that_are_used_without_their_module_are_left_alone() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    found = find_layers(model)
    names = {f"layers.{n}.{part}" for n in range(2) for part in ("linear1", "linear2")}
    assert {layer.name for layer in found.layers} == names
    attention = {n: why for n, why in reasons(model).items() if "self_attn" in n}
    assert set(attention) == {
        f"layers.{n}.self_attn{part}" for n in range(2) for part in ("", ".out_proj")
    }
    assert all("MultiheadAttention" in why for why in attention.values())


def test_convolutions_and_renormalised_embeddings_are_left_alone() -> None:
    assert reasons(tiny.whisper())["model.encoder.conv1"] == "a convolution"
    model = nn.Sequential(nn.Embedding(9, 8, max_norm=1.0), nn.Linear(8, 8))
    with pytest.raises(ModelError, match=r"0 cannot be planned: .*max_norm"):
        find_layers(model, include=["0"])


def test_an_adapter_must_be_merged_first() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base
            self.lora_A = nn.ModuleDict({"default": nn.Linear(24, 2, bias=False)})

    Adapter.__module__ = "peft.tuners.lora.layer"
    model = tiny.llama()
    model.model.layers[0].mlp.up_proj = Adapter(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj has an adapter.*merge_and_un"):
        find_layers(model)


def names_of(model: nn.Module, **options: Any) -> list[str]:
    return [layer.name for layer in find_layers(model, **options).layers]


def test_include_replaces_the_default_choice() -> None:
    queries = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
    assert names_of(tiny.llama(), include=["*.q_proj"]) == queries
    assert names_of(tiny.llama(), include="*.q_proj") == queries
    bert = tiny.bert(num_labels=5)
    found = find_layers(bert, include=["bert.pooler.dense", "*.word_embeddings", "classifier"])
    shapes = {x.name: (x.out_features, x.in_features) for x in found.layers}
    assert shapes == {
        "bert.embeddings.word_embeddings": (24, 64),
        "bert.pooler.dense": (24, 24),
        "classifier": (5, 24),
    }
    left = {entry.name: entry.reason for entry in found.left_alone}
    assert left["bert.encoder.layer.0.output.dense"] == NOT_SELECTED
    everything = names_of(bert, include=["*"])
    assert set(everything) > set(names_of(bert)) | set(shapes)


def test_exclude_takes_out() -> None:
    model = tiny.gpt2()
    kept = names_of(model, exclude=["*.c_attn", "transformer.h.1.*"])
    assert kept == [f"transformer.h.0.{x}" for x in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    found = find_layers(model, exclude=["*.c_attn", "lm_head"])
    left = {entry.name: entry.reason for entry in found.left_alone}
    assert left["transformer.h.0.attn.c_attn"] == "excluded"
    assert left["lm_head"] == "head or projection outside the transformer blocks, tied to " + (
        "transformer.wte"
    )
    assert names_of(model, include=["*.c_attn"], exclude=["*.h.0.*"]) == [
        "transformer.h.1.attn.c_attn"
    ]
    with pytest.raises(ModelError, match="nothing to plan: excluded"):
        find_layers(model, exclude=["*"])


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("lm_haed", "did you mean lm_head"),
        ("*.q_porj", r"did you mean \*\.q_proj"),
        ("*.self_attn.q_projs", r"did you mean \*\.self_attn\.q_proj"),
        ("zzz", r"there are model\.embed_tokens.* and 13 more"),
    ],
)
def test_a_pattern_without_a_match_is_an_error_with_suggestions(
    option: str, pattern: str, hint: str
) -> None:
    with pytest.raises(ModelError, match=hint):
        find_layers(tiny.llama(), **{option: [pattern]})


def test_a_head_and_its_embedding_are_planned_only_if_they_may_be_untied() -> None:
    for name in ("lm_head", "model.embed_tokens"):
        with pytest.raises(ModelError, match=rf"{name} cannot be planned: .*untie=True"):
            find_layers(tiny.llama(), include=[name])
        found = find_layers(tiny.llama(), include=[name], untie=True)
        (group,) = found.layers
        assert group.members == ("lm_head", "model.embed_tokens")
        assert (group.out_features, group.in_features) == (64, 24)
        assert list(found.modules) == list(group.members)
        assert torch.equal(
            *(weight_of(x).T if n == "lm_head" else weight_of(x) for n, x in found.modules.items())
        )
        assert not {entry.name for entry in found.left_alone} & set(group.members)
    # A pattern that has enough without it leaves the pair alone.
    left = find_layers(tiny.llama(), include=["*"]).left_alone
    assert {entry.name for entry in left} == {"lm_head", "model.embed_tokens"}
    taken_out = {"include": ["*"], "exclude": ["model.embed_tokens"]}
    assert "lm_head" not in names_of(tiny.llama(), **taken_out)
    with pytest.raises(
        ModelError, match=r"untie: none of model\.embed_tokens, lm_head is included"
    ):
        find_layers(tiny.llama(), untie=True)
    assert find_layers(tiny.mistral(), include=["lm_head"]).layers[0].partners == ()


def test_a_group_costs_factors_for_each_member_and_its_matrix_once() -> None:
    (group,) = find_layers(tiny.llama(), include=["lm_head"], untie=True).layers
    assert group.dense_cost == group.cost(None) == 64 * 24
    assert group.cost(1) == 2 * (64 + 24)
    assert group.cost(5) == 5 * 2 * (64 + 24)
    assert group.largest_rank() == 8
    assert group.cost(8) < group.dense_cost <= group.cost(9)
    small = tiny.llama(vocab_size=2)
    with pytest.raises(ModelError, match="no rank of a 2 x 24 matrix saves any"):
        find_layers(small, include=["lm_head"], untie=True)


def test_a_matrix_of_many_names_is_no_pair() -> None:
    with pytest.raises(
        ModelError, match=r"lm_head cannot be planned: its weight is tied to .*shared"
    ):
        find_layers(tiny.t5(), include=["lm_head"], untie=True)


def test_planned_layers_are_found_again_whatever_selected_them() -> None:
    model = tiny.llama()
    wanted = find_layers(model, include=["lm_head", "*.q_proj"], untie=True)
    again = find_planned(tiny.llama(), wanted.layers)
    assert again.layers == wanted.layers
    assert again.modules.keys() == wanted.modules.keys()
    assert again.left_alone == wanted.left_alone
    untied = tiny.llama(tie_word_embeddings=False)
    assert [x.name for x in find_planned(untied, wanted.layers).layers] == [
        f"model.layers.{n}.self_attn.q_proj" for n in range(2)
    ]
    assert find_planned(tiny.gpt2(), wanted.layers).layers == ()


def test_an_infinite_weight_is_refused_naming_the_layer() -> None:
    model = tiny.bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[2, 3] = torch.inf
    with pytest.raises(ModelError, match=r"bert\.encoder\.layer\.1\.output\.dense.*NaN or inf"):
        find_layers(model)
