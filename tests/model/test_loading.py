"""Models that are not whole are refused in one line that names what is wrong with them."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from rankopt import ModelError, apply_plan, make_plan, profile_model, save_model
from rankopt.model.loading import load_model
from tests import tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of one model: ``one`` file, and several ``parts``."""
    folder = tmp_path_factory.mktemp("whole")
    model = tiny.llama()
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "parts", max_shard_size="20KB")
    return folder


def edit(path: Path, **changes: Any) -> None:
    read = json.loads(path.read_text())
    path.write_text(json.dumps({**read, **changes}))


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny.llama().state_dict(), folder / "pytorch_model.bin")


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[-1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"

DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut short": ("one", weights(lambda b: b[: len(b) // 2]), r"model\.safetensors .*cut short"),
    "empty": ("one", weights(lambda b: b""), r"model\.safetensors \(0 bytes\).*download it again"),
    "zeros": ("one", weights(lambda b: bytes(len(b))), r"model\.safetensors .*damaged"),
    "a header of text": ("one", weights(lambda b: b"<html>" * 99), r"model\.safetensors .*damaged"),
    "pointer": ("one", weights(lambda b: POINTER), r"model\.safetensors is a pointer of git-lfs"),
    "no weights": ("one", lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "a pickle": ("one", only_pickled, r"pytorch_model\.bin only.*convert"),
    "config cut": ("one", lambda f: cut(f / "config.json"), r"config\.json is damaged"),
    "config empty": ("one", lambda f: (f / "config.json").write_text(""), r"config\.json is dam"),
    "config pointer": (
        "one",
        lambda f: (f / "config.json").write_bytes(POINTER),
        r"config\.json is a pointer",
    ),
    "config bytes": (
        "one",
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        r"config\.json is damaged",
    ),
    "an adapter": (
        "one",
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "adapter of PEFT.*merge_and_unload",
    ),
    "config list": (
        "one",
        lambda f: (f / "config.json").write_text("[1]"),
        r"config\.json holds no JSON object but list",
    ),
    "model type": (
        "one",
        lambda f: edit(f / "config.json", model_type="perceptron9"),
        "perceptron9",
    ),
    "class": (
        "one",
        lambda f: edit(f / "config.json", architectures=["FrogForCausalLM"]),
        "has no class FrogForCausalLM: upgrade it, or correct",
    ),
    "code": (
        "one",
        lambda f: edit(
            f / "config.json",
            model_type="frog",
            architectures=["FrogForCausalLM"],
            auto_map={"AutoConfig": "frog.C", "AutoModelForCausalLM": "frog.M"},
        ),
        "code of its own.*trust_remote_code=True",
    ),
    "code beside": (
        "one",
        lambda f: (
            edit(f / "config.json", auto_map={"AutoModelForCausalLM": "frog.M"}),
            cut(f / "model.safetensors"),
        ),
        r"model\.safetensors .*cut short",
    ),
    "a class that is no list": (
        "one",
        lambda f: edit(f / "config.json", architectures="LlamaForCausalLM"),
        r"must be a list with the name of a class",
    ),
    "a word for a size": (
        "one",
        lambda f: edit(f / "config.json", hidden_size="large"),
        "hidden_size.*expected int, got str"
        if dataclasses.is_dataclass(LlamaConfig)
        else "must be tuple of ints, ?but got str",  # earlier releases do not check it
    ),
    "an unknown word": (
        "one",
        lambda f: edit(f / "config.json", hidden_act="frog"),
        "KeyError 'frog'",
    ),
    "no heads": ("one", lambda f: edit(f / "config.json", num_attention_heads=0), "cannot load"),
    "other sizes": (
        "one",
        lambda f: edit(f / "config.json", intermediate_size=48),
        r"mlp\.down_proj\.weight is 24 x 40, not 24 x 48.* and 2 more; correct the config",
    ),
    "more layers": (
        "one",
        lambda f: edit(f / "config.json", num_hidden_layers=3),
        r"lacks weights of LlamaForCausalLM.*model\.layers\.2\.",
    ),
    "a shard is missing": ("parts", lambda f: last_shard(f).unlink(), "names, is missing"),
    "a shard is cut": ("parts", lambda f: cut(last_shard(f)), r"model-0.*cut short"),
    "index cut": ("parts", lambda f: cut(f / INDEX), r"index\.json is damaged"),
    "index without map": ("parts", lambda f: edit(f / INDEX, weight_map=None), "names no files"),
    "index is a list": ("parts", lambda f: (f / INDEX).write_text("[]"), "JSON object but list"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_named_in_one_line(kind: str, whole: Path, tmp_path: Path) -> None:
    source, damage, message = DAMAGE[kind]
    shutil.copytree(whole / source, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["one", "parts"])
def test_a_whole_model_is_loaded(source: str, whole: Path) -> None:
    found = load_model(str(whole / source))
    assert isinstance(found, LlamaForCausalLM)
    assert torch.equal(found.lm_head.weight, tiny.llama().lm_head.weight)


def test_a_head_that_was_never_trained_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(config).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", architectures=["BertForSequenceClassification"])
    with pytest.raises(
        ModelError,
        match=r"lacks weights of BertForSequenceClassification.*classifier\.bias, classifier\.wei",
    ):
        load_model(str(tmp_path))
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_ties_and_buffers_are_not_missed(kind: str, tmp_path: Path) -> None:
    model = tiny.ARCHITECTURES[kind]()
    model.save_pretrained(tmp_path)
    found = load_model(str(tmp_path))
    state = model.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())


def test_the_pooler_of_a_masked_language_model_is_not_missed(tmp_path: Path) -> None:
    """Its class has none; what a file has beside is left alone."""
    tiny.bert("PreTraining").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", architectures=["BertForMaskedLM"])
    assert load_model(str(tmp_path)).cls.predictions.bias.shape == (tiny.VOCABULARY,)


def test_a_compressed_model_without_a_factor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny.llama()
    profile = profile_model(model, tiny.batches(model))
    apply_plan(model, make_plan(profile, keep=0.5), profile)
    save_model(model, tmp_path / "small")
    assert load_model(str(tmp_path / "small")).hf_quantizer is not None
    path = tmp_path / "small" / "model.safetensors"
    state = load_file(path)
    gone = next(name for name in state if name.endswith(".up.weight"))
    del state[gone]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=gone.replace(".", r"\.")):
        load_model(str(tmp_path / "small"))
