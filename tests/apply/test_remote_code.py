"""Folders with code of their own load where rankopt cannot be imported, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankopt import ModelError, apply_plan, make_plan, profile_model, save_model
from rankopt.apply.remote import MODULE, alone
from tests import tiny
from tests.apply.test_reload import load, logits, low_rank, require_same_weights

CASES = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "bert-classification": "AutoModelForSequenceClassification",
    "t5": "AutoModelForSeq2SeqLM",
}


def compressed(kind: str, form: str = "pivoted", **options: Any) -> Any:
    model = tiny.MODELS[kind]()
    profile = profile_model(model, tiny.batches(model), form=form, **options)
    return apply_plan(model, make_plan(profile, keep=0.5), profile)


def save(model: Any, folder: Path) -> Path:
    save_model(model, folder, remote_code=True, tokenizer=tiny.tokenizer())
    return folder


@pytest.mark.parametrize("form", ["pivoted", pytest.param("pairs", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", CASES)
def test_the_code_of_the_folder_gives_the_same_logits(kind: str, form: str, tmp_path: Path) -> None:
    model = compressed(kind, form)
    folder = save(model, tmp_path / "model")
    with alone():
        found, report = load(model, folder, output_loading_info=True)
    assert not any(report.values()), report
    assert not low_rank(found) and low_rank(model), "our own classes are not there"
    require_same_weights(found, model)
    assert torch.equal(logits(found), logits(model))
    # With rankopt the same folder is as any other.
    assert low_rank(load(model, folder)) == low_rank(model)


_WITHOUT = """
import copy, sys
from importlib.abc import MetaPathFinder

class Never(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("rankopt", "rankopt_solvers"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Never())
try:
    import rankopt
except ImportError:
    pass
else:
    raise SystemExit("rankopt is there")
import torch, transformers
from transformers.quantizers import AutoQuantizationConfig
from safetensors.torch import load_file, save_file

for argument in sys.argv[1:]:
    auto, folder = argument.split("|")
    kind = getattr(transformers, auto)
    batch = load_file(folder + ".batch")
    if argument == sys.argv[1]:
        # Before any code was trusted.
        try:
            kind.from_pretrained(folder)
        except RuntimeError as error:
            assert "ignore_mismatched_sizes" in str(error)
        else:
            raise SystemExit("without the code it loads as something else")
    # As lm-evaluation-harness does, before it loads anything.
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoQuantizationConfig.from_dict(config.quantization_config)

    def outputs(where):
        model, report = kind.from_pretrained(
            where, trust_remote_code=True, output_loading_info=True
        )
        assert not any(report.values()), report
        with torch.no_grad():
            return model, copy.deepcopy(model).eval()(**batch).logits

    model, found = outputs(folder)
    # It trains, saves itself, and comes back.
    model.train()(**batch).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
    model.save_pretrained(folder + ".again")
    with torch.no_grad():
        trained = copy.deepcopy(model).eval()(**batch).logits
    assert torch.equal(outputs(folder + ".again")[1], trained)
    assert not torch.equal(trained, found)
    save_file({"logits": found, "trained": trained}, folder + ".logits")
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert any("down" in name for name, _ in base.named_parameters())
    if hasattr(model, "generate") and "attention_mask" in batch and auto.endswith("CausalLM"):
        model.generate(batch["input_ids"][:1], max_new_tokens=2)
"""


@pytest.mark.slow
def test_a_process_without_rankopt_loads_trains_and_saves(tmp_path: Path) -> None:
    models = {}
    for kind, auto in CASES.items():
        model = compressed(kind)
        folder = save(model, tmp_path / kind)
        save_file(tiny.batches(model)[0], f"{folder}.batch")
        models[f"{auto}|{folder}"] = model
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, *models],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Unknown quantization type") == 1, "where no code was trusted"
    for argument, model in models.items():
        folder = Path(argument.partition("|")[2])
        found = load_file(f"{folder}.logits")
        assert torch.equal(found["logits"], logits(model)), argument
        # What was trained there is a folder of ours here.
        again = load(model, Path(f"{folder}.again"))
        assert low_rank(again) == low_rank(model)
        assert torch.equal(logits(again), found["trained"])


def test_the_config_names_the_code_and_the_card_says_so(tmp_path: Path) -> None:
    folder = save(compressed("bert-classification"), tmp_path / "model")
    named = json.loads((folder / "config.json").read_text())["auto_map"]
    assert named == {
        "AutoConfig": f"{MODULE}.BertConfig",
        "AutoModel": f"{MODULE}.BertModel",
        "AutoModelForSequenceClassification": f"{MODULE}.BertForSequenceClassification",
    }
    code = (folder / f"{MODULE}.py").read_text()
    assert "import rankopt" not in code and "from rankopt" not in code
    card = (folder / "README.md").read_text()
    line = 'AutoModelForSequenceClassification.from_pretrained("FOLDER", trust_remote_code=True)'
    assert line in card and "import rankopt" in card


def test_only_what_is_low_rank_has_code(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no layer of the model is low rank"):
        save_model(tiny.llama(), tmp_path / "dense", remote_code=True)
    save_model(compressed("llama"), tmp_path / "plain")
    assert not (tmp_path / "plain" / f"{MODULE}.py").exists()
    assert "trust_remote_code" not in (tmp_path / "plain" / "README.md").read_text()


def test_a_model_from_such_a_folder_keeps_its_code_where_rankopt_saves(tmp_path: Path) -> None:
    model = compressed("gpt2")
    again = load(model, save(model, tmp_path / "first"))
    save_model(again, tmp_path / "second")
    assert (tmp_path / "second" / f"{MODULE}.py").is_file()
    # transformers itself writes none, and names none.
    again.save_pretrained(tmp_path / "third")
    assert "auto_map" not in json.loads((tmp_path / "third" / "config.json").read_text())
    require_same_weights(load(model, tmp_path / "third"), model)


def test_a_class_that_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    model = compressed("llama")

    class Mine(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Mine
    with pytest.raises(ModelError, match="Mine is no class of transformers"):
        save_model(model, tmp_path / "model", remote_code=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("head", ["CausalLM", "MaskedLM"])
def test_heads_that_were_tied_to_their_embedding_come_back(head: str, tmp_path: Path) -> None:
    model = tiny.llama() if head == "CausalLM" else tiny.bert(head)
    profile = profile_model(model, tiny.batches(model), include=["*"], untie=True)
    apply_plan(model, make_plan(profile, keep=0.5), profile)
    folder = save(model, tmp_path / "model")
    with alone():
        found = load(model, folder)
    require_same_weights(found, model)
    assert torch.equal(logits(found), logits(model))
