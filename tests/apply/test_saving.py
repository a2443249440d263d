"""What is written comes back, whatever was done to the model; or it is refused and not written."""

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from rankopt import LowRank, ModelError, apply_plan, make_plan, profile_model, save_model
from tests import tiny
from tests.apply.test_reload import require_same_weights

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compressed(model: Any) -> Any:
    profile = profile_model(model, tiny.batches(model))
    return apply_plan(model, make_plan(profile, keep=0.5), profile)


@pytest.fixture(scope="module")
def small() -> Any:
    """A compressed Llama, to be copied."""
    return compressed(tiny.llama())


def reloaded(model: Any, folder: Path) -> Any:
    found, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = copy.deepcopy(model).eval()(**tiny.batches(model)[0]).logits
    return found


def nomic() -> Any:
    """Written by transformers with one matrix for query, key and value, and other names."""
    if not hasattr(transformers, "NomicBertConfig"):
        pytest.skip("this transformers has no NomicBERT")
    torch.manual_seed(20)
    config = transformers.NomicBertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=6,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return transformers.NomicBertForSequenceClassification(config).eval()


#: Architectures whose checkpoints transformers converts.
CONVERTED = {"nomic": nomic, "mixtral": tiny.mixtral, "vit": tiny.vit}


@pytest.mark.parametrize("kind", CONVERTED)
def test_converted_architectures_come_back(kind: str, tmp_path: Path) -> None:
    model = compressed(CONVERTED[kind]())
    save_model(model, tmp_path / "by rankopt")
    model.save_pretrained(tmp_path / "by transformers", max_shard_size="10KB")
    for folder in ("by rankopt", "by transformers"):
        found = reloaded(model, tmp_path / folder)
        require_same_weights(found, model)
        found.save_pretrained(tmp_path / f"{folder} again")
        require_same_weights(reloaded(model, tmp_path / f"{folder} again"), model)
    dense = found.dequantize()
    save_model(dense, tmp_path / "dense")
    require_same_weights(reloaded(model, tmp_path / "dense"), dense)
    assert torch.allclose(logits(dense), logits(model), atol=1e-4)
    assert dense._weight_conversions is None, "the dense model is written as transformers does"


def test_a_dense_model_that_transformers_converts_is_compared_too(tmp_path: Path) -> None:
    model = nomic()
    save_model(model, tmp_path / "dense")
    assert any("Wqkv" in name for name in load_file(tmp_path / "dense" / "model.safetensors"))
    require_same_weights(reloaded(model, tmp_path / "dense"), model)


def test_folders_in_the_format_of_transformers_are_still_read(tmp_path: Path) -> None:
    model = compressed(tiny.mixtral())
    del model._weight_conversions
    model.config.quantization_config.own_names = False
    model.save_pretrained(tmp_path / "old")
    assert any("experts.1." in name for name in load_file(tmp_path / "old" / "model.safetensors"))
    found = reloaded(model, tmp_path / "old")
    require_same_weights(found, model)
    found.save_pretrained(tmp_path / "new")
    require_same_weights(reloaded(model, tmp_path / "new"), model)


def test_a_config_in_a_config(tmp_path: Path) -> None:
    torch.manual_seed(21)
    text = tiny.llama().config.to_dict()
    vision = {"hidden_size": 24, "intermediate_size": 40, "image_size": 8, "patch_size": 4}
    config = LlavaConfig(
        text_config=text,
        vision_config={**vision, "num_hidden_layers": 2, "num_attention_heads": 4},
        image_token_id=63,
    )
    model = LlavaForConditionalGeneration(config).eval()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = model(input_ids=batch["input_ids"]).logits.square().mean((1, 2))
        return found

    batches = tiny.batches(tiny.llama())
    profile = profile_model(model, batches, loss_fn=loss, include=["*.language_model.*.mlp.*"])
    apply_plan(model, make_plan(profile, keep=0.5), profile)
    save_model(model, tmp_path / "model")
    require_same_weights(reloaded(model, tmp_path / "model"), model)
    base = AutoModel.from_pretrained(tmp_path / "model")
    require_same_weights(base, model.model)
    with pytest.raises(ModelError, match="LlamaModel is a part of a low-rank model"):
        model.model.language_model.save_pretrained(tmp_path / "part")
    model.model.vision_tower.save_pretrained(tmp_path / "dense part")
    assert (tmp_path / "dense part" / "model.safetensors").is_file()


MOVES: dict[str, Callable[[Any], Any]] = {
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "to dtype": lambda model: model.to(torch.float16),
    "to both": lambda model: model.to("cpu", torch.bfloat16),
    "there and back": lambda model: model.half().float(),
}


@pytest.mark.parametrize("move", MOVES)
def test_the_dtype_changes_after_apply_and_after_reload(
    move: str, small: Any, tmp_path: Path
) -> None:
    save_model(small, tmp_path / "plain")
    for model in (copy.deepcopy(small), reloaded(small, tmp_path / "plain")):
        plain = nn.Module.to(copy.deepcopy(model), torch.float32)
        moved = MOVES[move](model)
        assert len({p.dtype for p in moved.parameters()}) == 1
        wanted = plain.to(moved.dtype) if move != "there and back" else moved
        require_same_weights(moved, wanted)
        save_model(moved, tmp_path / "moved", overwrite=True)
        require_same_weights(reloaded(small, tmp_path / "moved"), moved)
        dense = moved.dequantize()
        assert {p.dtype for p in dense.parameters()} == {moved.dtype}
        assert torch.isfinite(logits(dense)).all()


@pytest.mark.parametrize("dtype", [None, "float16", "torch.bfloat16", torch.float64])
def test_dequantize_after_saving(dtype: Any, small: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(small)
    for number in range(2):
        save_model(model, tmp_path / str(number))
    assert model.config.dtype == "float32"
    wanted = logits(model)
    dense = model.dequantize() if dtype is None else model.dequantize(dtype=dtype)
    assert not any(isinstance(module, LowRank) for module in dense.modules())
    kind = torch.float32 if dtype is None else getattr(torch, str(dtype).removeprefix("torch."))
    assert {p.dtype for p in dense.parameters()} == {kind}
    assert (logits(dense).float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    save_model(dense, tmp_path / "dense")
    require_same_weights(reloaded(small, tmp_path / "dense"), dense)


def test_a_class_that_keeps_layers_wider_is_no_loss(tmp_path: Path) -> None:
    model = compressed(tiny.t5()).half()
    save_model(model, tmp_path / "model")
    found = reloaded(model, tmp_path / "model")
    wider = {n for n, p in found.named_parameters() if p.dtype == torch.float32}
    assert wider and all(".wo." in name for name in wider)
    state = model.state_dict()
    assert all(torch.equal(x.float(), state[n].float()) for n, x in found.state_dict().items())


def test_copies_and_configs_travel(small: Any, tmp_path: Path) -> None:
    for model in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        save_model(model, tmp_path / "model", overwrite=True)
        require_same_weights(reloaded(small, tmp_path / "model"), small)
    config = pickle.loads(pickle.dumps(small.config))
    assert config.to_dict() == small.config.to_dict()
    assert json.loads(config.to_json_string())["quantization_config"]["own_names"] is True


def test_a_base_model_goes_on_by_itself(small: Any, tmp_path: Path) -> None:
    save_model(small, tmp_path / "headed")
    base = AutoModel.from_pretrained(tmp_path / "headed")
    require_same_weights(base, small.model)
    save_model(base, tmp_path / "base")
    require_same_weights(reloaded(base, tmp_path / "base"), small.model)
    with pytest.raises(ModelError, match="a part of a low-rank model"):
        small.model.save_pretrained(tmp_path / "part")
    with pytest.raises(ModelError, match="dequantize the whole"):
        small.model.dequantize()


def test_a_compiled_model_is_saved_as_itself(small: Any, tmp_path: Path) -> None:
    save_model(torch.compile(small, backend="eager"), tmp_path / "model")
    require_same_weights(reloaded(small, tmp_path / "model"), small)


def another_head(model: Any) -> None:
    model.lm_head = nn.Linear(24, 5)


def another_layer(model: Any) -> None:
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))


def no_down_projection(model: Any) -> None:
    model.model.layers[0].mlp.down_proj = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_head, r"lm_head\.bias is 5 here and missing there.*lm_head\.weight is 5 x 24"),
        (another_layer, r"model\.layers\.2\..* here and missing there.* and \d+ more"),
        (no_down_projection, r"mlp\.down_proj\..*missing here"),
    ],
)
def test_a_model_that_its_config_does_not_describe_is_refused(
    change: Callable[[Any], None], message: str, small: Any, tmp_path: Path
) -> None:
    model = copy.deepcopy(small)
    change(model)
    with pytest.raises(ModelError, match=message):
        save_model(model, tmp_path / "model")
    assert not os.listdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.glob("model/*"))


def test_values_that_would_be_rounded_are_refused(small: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(small).half()
    norm = model.model.norm.float()
    norm.weight.data.add_(1e-5)
    with pytest.raises(ModelError, match=r"other weights: model\.norm\.weight: move it to one dt"):
        save_model(model, tmp_path / "model")
    assert not os.listdir(tmp_path)
    save_model(model.float(), tmp_path / "model")
    require_same_weights(reloaded(small, tmp_path / "model"), model)


def a_bit(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name].clone()
    state[name].view(torch.int32)[0, 0] ^= 1


def lost(state: dict[str, Tensor], name: str) -> None:
    del state[name]


def unknown(state: dict[str, Tensor], name: str) -> None:
    state["model.surplus"] = state[name].clone()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (a_bit, r"mlp\.down_proj\.down\.weight"),
        (lost, r"mlp\.down_proj\.down\.weight"),
        (unknown, r"model\.surplus"),
    ],
)
@pytest.mark.parametrize("lean", [True, False])
def test_what_was_written_wrong_is_not_left(
    damage: Callable[[dict[str, Tensor], str], None],
    message: str,
    lean: bool,
    small: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loaded on the meta device, or whole where there is no accelerate."""
    model = copy.deepcopy(small)
    name = next(n for n in model.state_dict() if n.endswith("mlp.down_proj.down.weight"))
    write = PreTrainedModel.save_pretrained

    def writes_wrong(self: Any, folder: Path, **options: Any) -> None:
        write(self, folder, **options)
        path = Path(folder) / "model.safetensors"
        state = load_file(path)
        damage(state, name)
        save_file(state, path, metadata={"format": "pt"})

    if not lean:
        monkeypatch.setattr("rankopt.apply.verify.builds_empty", lambda: False)
    save_model(model, tmp_path / "right")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", writes_wrong)
    with pytest.raises(ModelError, match=message):
        save_model(model, tmp_path / "wrong")
    assert os.listdir(tmp_path) == ["right"]


def test_what_transformers_refuses_to_write_is_one_line(small: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(small)
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.5)
    with pytest.raises(ModelError, match="transformers cannot save this model: ") as caught:
        save_model(model, tmp_path / "model")
    assert "\n" not in str(caught.value) and not os.listdir(tmp_path)


def test_code_that_is_not_in_the_folder_is_refused(small: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(small)
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_frog.Frog"}
    with pytest.raises(ModelError, match=r"modeling_frog\.Frog.*would not be in the folder"):
        save_model(model, tmp_path / "model")
    assert not os.listdir(tmp_path)
    model.config.auto_map = {"AutoModelForCausalLM": "owner/frog--modeling_frog.Frog"}
    save_model(model, tmp_path / "model")


def test_adapters_are_merged_first(small: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["down", "up"])
    wrapped = peft.get_peft_model(copy.deepcopy(small), config)
    with pytest.raises(ModelError, match="merge them first"):
        save_model(wrapped, tmp_path / "model")
    save_model(wrapped.merge_and_unload(), tmp_path / "model")
    require_same_weights(reloaded(small, tmp_path / "model"), small)
