"""Rounded models in folders: small, reloaded to the bit, and never silently something else."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from rankopt import (
    LowRank,
    ModelError,
    Plan,
    Profile,
    apply_plan,
    make_plan,
    profile_model,
    save_model,
)
from rankopt.apply.streaming import apply_streamed
from rankopt.apply.verify import require_reloadable
from rankopt.model.loading import load_model
from rankopt.model.rounding import bits_of
from rankopt.model.size import model_size
from tests import tiny
from tests.apply.test_reload import load, logits, require_same_weights
from tests.cli.test_cli import Run, done
from tests.cli.test_cli import run as run
from tests.rounded import KINDS, WIDE, prepared, with_bits

pytest.importorskip("torchao", exc_type=ImportError)

Saved = Callable[..., tuple[Any, Plan, Path]]
FORMS = ["pairs", "pivoted"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """(kind, form, dtype) -> rounded model, plan, folder; made once, not to be changed."""
    made: dict[Any, tuple[Any, Plan, Path]] = {}

    def build(kind: str, form: str = "pairs", dtype: torch.dtype = torch.float32) -> Any:
        key = (kind, form, dtype)
        if key not in made:
            model = WIDE[kind]().to(dtype)
            profile, plan = prepared(model, form)
            apply_plan(model, plan, profile)
            folder = tmp_path_factory.mktemp("models") / "model"
            save_model(model, folder, plan=plan, tokenizer=tiny.tokenizer())
            made[key] = (model, plan, folder)
        return made[key]

    return build


def require_same(found: Any, wanted: Any) -> None:
    require_same_weights(found, wanted)
    kinds = [(n, type(p).__name__, p.requires_grad) for n, p in wanted.named_parameters()]
    assert [(n, type(p).__name__, p.requires_grad) for n, p in found.named_parameters()] == kinds


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_to_the_bit_and_is_as_small_as_planned(
    kind: str, form: str, dtype: torch.dtype, saved: Saved, tmp_path: Path
) -> None:
    model, plan, folder = saved(kind, form, dtype)
    found, report = load(model, folder, output_loading_info=True)
    assert not any(report.values()), report
    require_same(found, model)
    # Which moves Llama's frequencies, as it has those of the model.
    assert torch.equal(logits(found.to(dtype)), logits(model))
    assert str(found) == str(model)
    assert model_size(found) == model_size(model)
    tensors = load_file(folder / "model.safetensors")
    bytes_of = sum(tensor.nbytes for name, tensor in tensors.items() if "index" not in name)
    assert bytes_of == plan.size.model_bytes
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["bits"] == {e.layer.name: e.bits for e in plan.layers if e.bits}
    for entry in plan.layers:
        if entry.rank is not None or entry.bits is not None:
            assert tensors[f"{entry.layer.name}.weight"].numel() == 0
    save_model(found, tmp_path / "again", plan=plan, tokenizer=tiny.tokenizer())
    assert files_of(tmp_path / "again") == files_of(folder)
    dense = load(model, tmp_path / "again").dequantize()
    assert torch.equal(logits(found.dequantize()), logits(dense.to(dtype)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_another_process(kind: str, saved: Saved, tmp_path: Path) -> None:
    model, _, folder = saved(kind)
    torch.save(logits(model), tmp_path / "wanted.pt")
    torch.save(tiny.batches(model)[0], tmp_path / "batch.pt")
    name = type(model).__name__
    code = (
        "import sys, copy, torch, rankopt\n"
        f"from transformers import {name} as kind\n"
        "wanted, batch = (torch.load(f'{sys.argv[1]}/{x}.pt') for x in ('wanted', 'batch'))\n"
        "model = copy.deepcopy(kind.from_pretrained(sys.argv[2])).eval()\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(**batch).logits, wanted)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("only_dense", [False, True])
def test_without_rankopt_transformers_stops(only_dense: bool, tmp_path: Path) -> None:
    model = WIDE["bert"]()
    profile = profile_model(model, tiny.batches(model))
    pins: dict[str, Any] = {"pins": {"*": "dense"}} if only_dense else {"rank_multiple": 32}
    plan = with_bits(make_plan(profile, keep=1.0 if only_dense else 0.9, **pins), (8,))
    save_model(apply_plan(model, plan, profile), tmp_path / "model")
    require_same(load(model, tmp_path / "model"), model)
    code = (
        "import sys\n"
        "from transformers import BertForSequenceClassification\n"
        "try:\n"
        "    BertForSequenceClassification.from_pretrained(sys.argv[1])\n"
        "except RuntimeError as error:\n"
        "    assert 'rankopt' not in sys.modules and 'size' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('loaded')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True)


@pytest.mark.parametrize(("kind", "base"), [("llama", "model"), ("bert", "bert")])
def test_the_base_model_of_a_folder_with_a_head(kind: str, base: str, saved: Saved) -> None:
    model, _, folder = saved(kind)
    found, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    require_same(found, getattr(model, base))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_small_shards(kind: str, form: str, saved: Saved, tmp_path: Path) -> None:
    model, _, _ = saved(kind, form)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    require_same(load(model, tmp_path), model)


def test_other_dtypes_on_load(saved: Saved) -> None:
    model, plan, folder = saved("llama")
    found = load(model, folder, dtype=torch.bfloat16)
    for entry in plan.layers:
        module = found.get_submodule(entry.layer.name)
        weight: Any = module.up.weight if isinstance(module, LowRank) else module.weight
        assert weight.dtype == torch.bfloat16 and bits_of(weight) == entry.bits
        if entry.bits == 8:
            assert weight.scale.dtype == torch.float32
        elif entry.bits == 4:
            assert weight.scale.dtype == torch.bfloat16 and weight.qdata.dtype == torch.int8
    assert torch.allclose(logits(found).float(), logits(model), rtol=0.1, atol=0.5)
    assert found.dequantize().dtype == torch.bfloat16
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(device_map: str, saved: Saved) -> None:
    pytest.importorskip("accelerate")
    model, _, folder = saved("llama")
    found = load(model, folder, device_map=device_map)
    require_same(found, model)
    assert torch.equal(logits(found), logits(model))


def test_offloading_is_refused(saved: Saved) -> None:
    pytest.importorskip("accelerate")
    model, _, folder = saved("llama")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(ModelError, match=r"rounded weights cannot be offloaded .*cpu, disk"):
        load(model, folder, device_map=places)


def test_a_folder_with_other_values_is_refused(saved: Saved, tmp_path: Path) -> None:
    model, _, _ = saved("bert")
    model.save_pretrained(tmp_path)
    require_reloadable(model, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    for own in ("qdata", "scale"):
        for name in [x for x in whole if x.endswith(own)][:2]:
            changed = {**whole, name: whole[name].clone()}
            changed[name].flatten()[-1] += 1
            save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
            with pytest.raises(ModelError, match=name):
                require_reloadable(model, tmp_path)


def test_a_model_that_was_rounded_by_other_means_is_not_saved(saved: Saved, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, _, folder = saved("bert")
    found = load(model, folder)
    quantize_(found.classifier, Int8WeightOnlyConfig())
    with pytest.raises(ModelError):
        save_model(found, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_code_in_the_folder_is_refused(saved: Saved, tmp_path: Path) -> None:
    model, _, _ = saved("llama")
    with pytest.raises(ModelError, match="rounded weights, which the code in a folder does not"):
        save_model(model, tmp_path / "model", remote_code=True)
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_is_rounded_and_what_loads_it(saved: Saved) -> None:
    _, plan, folder = saved("llama")
    card = (folder / "README.md").read_text()
    count = {bits: sum(e.bits == bits for e in plan.layers) for bits in (8, 4)}
    assert f"{count[8]} of its layers to 8 bits and {count[4]} of its layers to 4 bits" in card
    assert "pip install 'rankopt[quantize]'" in card


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_at_a_time_it_is_the_same_files(kind: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    WIDE[kind]().save_pretrained(tmp_path / "dense")
    tiny.tokenizer(tmp_path / "dense")
    how: dict[str, Any] = {"form": form, "keep_bases": True}
    measured = load_model(str(tmp_path / "dense"))
    profile_model(measured, tiny.batches(measured), **how).save(tmp_path / "p.safetensors")
    profile = Profile.load(tmp_path / "p.safetensors")
    plan = with_bits(make_plan(profile, keep=0.85, rank_multiple=32))
    about: dict[str, Any] = {"tokenizer": tiny.tokenizer(), "command": ["rankopt", "apply"]}
    model = apply_plan(load_model(str(tmp_path / "dense")), plan, profile)
    save_model(model, tmp_path / "whole", plan=plan, **about)
    streamed = load_model(str(tmp_path / "dense"), "auto", "disk")
    with pytest.raises(ModelError, match="the code in a folder"):
        apply_streamed(streamed, plan, profile, tmp_path / "out", remote_code=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    streamed = load_model(str(tmp_path / "dense"), "auto", "disk")
    apply_streamed(streamed, plan, profile, tmp_path / "out", **about)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_the_command_applies_and_evaluates_a_rounded_plan(run: Run, tmp_path: Path) -> None:
    model = WIDE["llama"]()
    tiny.saved(model, tmp_path / "dense")
    profile, plan = prepared(load_model(str(tmp_path / "dense")))
    profile.save(tmp_path / "profile.safetensors")
    plan.save(tmp_path / "plan.json")
    (tmp_path / "heldout.txt").write_text(tiny.text([n % 12 for n in range(300)]))
    base = ["apply", tmp_path / "dense", tmp_path / "plan.json", "--profile"]
    base += [tmp_path / "profile.safetensors", "-o", tmp_path / "small"]
    code, _, err = run(*base, "--remote-code")
    assert code == 2 and "(--remote-code) out" in err and not (tmp_path / "small").exists()
    done(run(*base))
    found = load(model, tmp_path / "small")
    assert model_size(found).model_bytes == plan.size.model_bytes
    data = ["--data", tmp_path / "heldout.txt", "--max-length", 32]
    told = json.loads(done(run("evaluate", tmp_path / "small", *data, "--json")))
    assert told["model_bytes"] == plan.size.model_bytes
