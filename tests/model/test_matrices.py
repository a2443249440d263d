"""Which modules have matrices that can be planned, what is a block, and why the rest is left."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from rankopt import ModelError
from rankopt.model.selection import find_layers
from rankopt.model.size import model_size


def pruned(layer: nn.Linear) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def pruned_bias(layer: nn.Linear) -> nn.Module:
    prune.random_unstructured(layer, "bias", 0.5)
    return layer


def deleted(layer: nn.Linear) -> nn.Module:
    weight = layer.weight
    del layer.weight
    layer.weight = weight.detach() * 1.0
    return layer


def none(layer: nn.Linear) -> nn.Module:
    layer.register_parameter("weight", None)
    return layer


class Property(nn.Linear):
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.half_weight * 2.0

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.half_weight = nn.Parameter(value.detach() / 2.0)


def of(make: Callable[[Tensor], Tensor]) -> Callable[[nn.Linear], nn.Module]:
    def change(layer: nn.Linear) -> nn.Module:
        layer.weight = nn.Parameter(make(layer.weight.detach()), requires_grad=False)
        return layer

    return change


#: What was done to a layer of 12 x 8, and what is said of it.
ODD: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "prune": (pruned, "prune.remove(module, 'weight') first"),
    "pruned bias": (pruned_bias, "its bias is computed (torch.nn.utils.prune)"),
    "weight_norm": (weight_norm, "remove_weight_norm(module, 'weight') first"),
    "spectral_norm": (spectral_norm, "remove_spectral_norm(module, 'weight') first"),
    "parametrize": (
        parametrizations.weight_norm,
        "its weight is computed (torch.nn.utils.parametrize): "
        "parametrize.remove_parametrizations(module, 'weight') first",
    ),
    "orthogonal": (parametrizations.orthogonal, "parametrize.remove_parametrizations("),
    "deleted": (deleted, "its weight is no parameter of its own"),
    "none": (none, "it has no weight"),
    "property": (lambda x: Property(8, 12), "its weight is no parameter of its own"),
    "lazy": (lambda x: nn.LazyLinear(12), "its weights are not initialised"),
    "complex": (of(lambda w: w.to(torch.complex64)), "its weight is complex (torch.complex64)"),
    "integer": (of(lambda w: w.to(torch.int8)), "torch.int8, not plain floats: dequantise"),
    "float8": (of(lambda w: w.to(torch.float8_e4m3fn)), "float8_e4m3fn, not plain floats"),
    "vector": (of(lambda w: w[0]), "its weight is of shape (8,), not a matrix"),
    "sparse": (of(lambda w: w.to_sparse()), "its weight is sparse (torch.sparse_coo)"),
    "zero size": (lambda x: nn.Linear(0, 12), "no rank of a 12 x 0 matrix saves any"),
    "recurrent": (lambda x: nn.LSTM(8, 12), "its matrices are LSTM's own, not those of an"),
    "bilinear": (lambda x: nn.Bilinear(8, 8, 12), "its matrices are Bilinear's own, not those"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")
def test_an_odd_layer_is_left_alone_with_its_reason_and_the_rest_is_planned(kind: str) -> None:
    change, wanted = ODD[kind]
    model = nn.ModuleDict({"plain": nn.Linear(8, 12), "odd": change(nn.Linear(8, 12))})
    found = find_layers(model)
    assert [layer.name for layer in found.layers] == ["plain"]
    (left,) = found.left_alone
    assert left.name == "odd" and wanted in left.reason
    assert model_size(model).planned == 96
    assert left.parameters == sum(
        p.numel() for n, p in model.named_parameters() if n.startswith("odd") and kind != "lazy"
    )
    with pytest.raises(ModelError, match="odd cannot be planned: "):
        find_layers(model, include=["odd"])


def test_weights_in_one_memory_are_left_alone_and_those_side_by_side_are_planned() -> None:
    memory = torch.randn(24, 8)
    one, two, three = (nn.Linear(8, 12) for _ in range(3))
    one.weight, two.weight = nn.Parameter(memory[:12]), nn.Parameter(memory[12:])
    model = nn.ModuleDict({"one": one, "two": two})
    assert len(find_layers(model).layers) == 2
    three.weight = nn.Parameter(memory[6:18])
    model["three"] = three
    with pytest.raises(ModelError, match="nothing to plan: its weight lies in the memory of that"):
        find_layers(model)
    model["three"].weight = nn.Parameter(memory[:12].clone())
    assert len(find_layers(model).layers) == 3
    model["turned"] = nn.Linear(12, 8)
    model["turned"].weight = nn.Parameter(one.weight.detach().T)
    assert {x.name for x in find_layers(model).left_alone} == {"one", "turned"}


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 16), nn.Linear(16, width)


def planned(model: nn.Module) -> set[str]:
    return {layer.name.split(".")[0] for layer in find_layers(model).layers}


@pytest.mark.parametrize("kind", ["list", "dictionary", "row", "named row"])
def test_repeated_modules_are_blocks_beside_a_list_of_heads(kind: str) -> None:
    blocks = [Block() for _ in range(3)]
    containers = {
        "list": lambda: nn.ModuleList(blocks),
        "dictionary": lambda: nn.ModuleDict({f"b{k}": x for k, x in enumerate(blocks)}),
        "row": lambda: nn.Sequential(nn.LayerNorm(8), *blocks),
        "named row": lambda: nn.Sequential(*blocks),
    }
    model = nn.Module()
    model.blocks, model.head = containers[kind](), nn.Linear(8, 8)
    model.heads = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model.tasks = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model.mlp = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    assert planned(model) == {"blocks", "heads"}
    outside = {x.name.split(".")[0]: x.reason for x in find_layers(model).left_alone}
    assert outside == dict.fromkeys(
        ("head", "tasks", "mlp"), "head or projection outside the transformer blocks"
    )


def test_modules_that_differ_are_no_blocks() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    model.towers = nn.ModuleDict({"text": Block(8), "image": Block(10)})
    assert planned(model) == {"layers"}


def attention(name: str) -> tuple[Any, str]:
    import transformers

    small = {"vocab_size": 64, "d_model": 24, "d_inner": 40}
    if name == "XLNet":
        config = transformers.XLNetConfig(**small, n_layer=1, n_head=4)
        return transformers.XLNetForSequenceClassification(config), "XLNetRelativeAttention"
    if name == "Funnel":
        sizes = {"block_sizes": [1], "n_head": 4, "d_head": 6, "num_decoder_layers": 1}
        config = transformers.FunnelConfig(**small, **sizes)
        return transformers.FunnelForMaskedLM(config), "FunnelRelMultiheadAttention"
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 12, "window_size": 2}
    config = transformers.Swinv2Config(**sizes, depths=[1], num_heads=[2])
    return transformers.Swinv2ForImageClassification(config), "Swinv2SelfAttention"


@pytest.mark.parametrize("name", ["XLNet", "Funnel", "Swinv2"])
def test_attention_with_matrices_of_its_own_is_not_called_experts(name: str) -> None:
    model, kind = attention(name)
    reasons = {x.reason for x in find_layers(model).left_alone if x.module == kind}
    assert reasons == {f"its matrices are {kind}'s own, not those of an nn.Linear: not covered"}


def test_every_linear_layer_of_transformers_that_writes_its_forward_anew_is_judged() -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.falcon.modeling_falcon import FalconLinear

    model = nn.ModuleDict(
        {
            "same": FalconLinear(8, 12),
            "scaled": BartScaledWordEmbedding(64, 8, 0, embed_scale=2.0),
            "unscaled": BartScaledWordEmbedding(64, 8, 0, embed_scale=1.0),
        }
    )
    assert [x.name for x in find_layers(model, include=["*"]).layers] == ["same", "unscaled"]
    with pytest.raises(ModelError, match=r"scaled cannot be planned: BartScaledWordEmbedding is a"):
        find_layers(model, include=["scaled"])
