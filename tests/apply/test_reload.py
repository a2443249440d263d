"""Saved models come back bit for bit after ``import rankopt``, and never silently without it."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from rankopt import (
    LowRank,
    ModelError,
    Plan,
    RankoptError,
    apply_plan,
    make_plan,
    profile_model,
    save_model,
)
from rankopt.model.rounding import in_parts
from rankopt.model.size import model_size
from tests import tiny

Saved = Callable[[str], tuple[Any, Plan, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Architecture -> compressed model, plan and folder; made once, not to be changed."""
    made: dict[str, tuple[Any, Plan, Path]] = {}

    def build(kind: str) -> tuple[Any, Plan, Path]:
        if kind not in made:
            model = tiny.ARCHITECTURES[kind]()
            profile = profile_model(model, tiny.batches(model))
            plan = make_plan(profile, keep=0.5)
            folder = tmp_path_factory.mktemp("models") / kind
            apply_plan(model, plan, profile)
            save_model(model, folder, plan=plan)
            made[kind] = (model, plan, folder)
        return made[kind]

    return build


def logits(model: Any) -> Tensor:
    # safetensors maps weights into memory at odd addresses, for which a kernel may sum in another
    # order; a copy is aligned, so that equal weights give equal bits.
    aligned = copy.deepcopy(model).eval()
    with torch.no_grad():
        found: Tensor = aligned(**tiny.batches(model)[0]).logits
    return found


def require_same_weights(found: Any, wanted: Any) -> None:
    a, b = in_parts(found.state_dict()), in_parts(wanted.state_dict())
    assert list(a) == list(b)
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def load(model: Any, folder: Path, **options: Any) -> Any:
    return type(model).from_pretrained(folder, **options)


def low_rank(model: Any) -> dict[str, int]:
    return {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRank)}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_a_reloaded_model_is_the_same_to_the_bit(kind: str, saved: Saved) -> None:
    model, plan, folder = saved(kind)
    found, report = load(model, folder, output_loading_info=True)
    assert not any(report.values()), report
    assert low_rank(found) == {n: r for n, r in plan.ranks.items() if r is not None} != {}
    require_same_weights(found, model)
    assert torch.equal(logits(found), logits(model))
    assert model_size(found).model == plan.size.model
    assert Plan.load(folder / "rankopt_plan.json") == plan


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_reloaded_model_saves_and_reloads_again(kind: str, saved: Saved, tmp_path: Path) -> None:
    model, _, folder = saved(kind)
    load(model, folder).save_pretrained(tmp_path / "by transformers")
    save_model(load(model, folder), tmp_path / "by rankopt")
    for again in ("by transformers", "by rankopt"):
        found, report = load(model, tmp_path / again, output_loading_info=True)
        assert not any(report.values()), report
        require_same_weights(found, model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_sharded_files_reload(kind: str, saved: Saved, tmp_path: Path) -> None:
    model, _, _ = saved(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    require_same_weights(load(model, tmp_path), model)


@pytest.mark.parametrize(("kind", "base"), [("llama", "model"), ("bert-classification", "bert")])
def test_the_base_model_of_a_checkpoint_with_a_head_is_low_rank(
    kind: str, base: str, saved: Saved
) -> None:
    model, _, folder = saved(kind)
    found, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert {f"{base}.{name}" for name in low_rank(found)} == set(low_rank(model))
    require_same_weights(found, getattr(model, base))


def test_loading_in_bfloat16_rounds_the_saved_weights(saved: Saved) -> None:
    model, _, folder = saved("llama")
    found = load(model, folder, dtype=torch.bfloat16)
    assert low_rank(found) == low_rank(model)
    require_same_weights(found, copy.deepcopy(model).to(torch.bfloat16))


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_dequantize_gives_a_dense_model_that_saves_itself(
    kind: str, saved: Saved, tmp_path: Path
) -> None:
    model, plan, folder = saved(kind)
    wanted = logits(model)
    dense = load(model, folder).dequantize()
    assert not low_rank(dense)
    assert model_size(dense).model == plan.size.model_dense
    assert not dense.get_submodule(plan.layers[0].layer.name).training
    assert (logits(dense) - wanted).abs().max() < 1e-3 * wanted.abs().max()
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    found, report = load(model, tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(found), logits(dense))


def test_the_head_stays_tied_and_text_is_generated(saved: Saved) -> None:
    model, _, folder = saved("llama")
    found = load(model, folder)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    wanted = copy.deepcopy(model).generate(prompt, **options)
    assert wanted.shape == (1, 9)
    assert torch.equal(copy.deepcopy(found).generate(prompt, **options), wanted)


@pytest.mark.parametrize(
    "change", [{"format_version": 2}, {"whitening": True}], ids=["version", "unknown entry"]
)
def test_another_format_is_refused(change: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    model, _, folder = saved("llama")
    for name, content in contents(folder).items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="this rankopt reads 1"):
        load(model, tmp_path)


def run(code: str, *arguments: str) -> list[str]:
    """The lines that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


_TRY = """
import sys, transformers
def attempt(kind, folder, name):
    try:
        getattr(transformers, name).from_pretrained(folder)
    except Exception as error:
        print(kind, "refused", type(error).__name__)
    else:
        print(kind, "loaded")
def attempt_all():
    for argument in sys.argv[1:]:
        attempt(*argument.split("|"))
"""


@pytest.mark.slow
def test_without_rankopt_every_model_is_refused_and_a_late_import_helps(saved: Saved) -> None:
    arguments = []
    for kind in tiny.ARCHITECTURES:
        model, _, folder = saved(kind)
        arguments.append(f"{kind}|{folder}|{type(model).__name__}")
    code = f"""{_TRY}
attempt_all()
assert "rankopt" not in sys.modules
import rankopt
attempt_all()
"""
    lines = run(code, *arguments)
    assert lines[: len(arguments)] == [
        f"{kind} refused RuntimeError" for kind in tiny.ARCHITECTURES
    ]
    assert lines[len(arguments) :] == [f"{kind} loaded" for kind in tiny.ARCHITECTURES]


@pytest.mark.slow
def test_rankopt_may_be_imported_before_transformers(saved: Saved) -> None:
    model, _, folder = saved("llama")
    code = f"""
import sys, rankopt
assert "transformers" not in sys.modules and "torch" not in sys.modules
{_TRY}
attempt_all()
"""
    assert run(code, f"llama|{folder}|{type(model).__name__}") == ["llama loaded"]


def test_a_folder_with_something_in_it_is_not_touched(saved: Saved, tmp_path: Path) -> None:
    model, _, _ = saved("llama")
    target = tmp_path / "model"
    target.mkdir()
    (target / "thesis.txt").write_text("the only copy")
    with pytest.raises(RankoptError, match="not empty"):
        save_model(model, target)
    assert contents(tmp_path) == {"model/thesis.txt": b"the only copy"}
    assert os.listdir(tmp_path) == ["model"]


def test_overwriting_replaces_the_whole_folder(saved: Saved, tmp_path: Path) -> None:
    model, plan, folder = saved("llama")
    target = tmp_path / "model"
    save_model(tiny.llama(), target, tokenizer=tiny.tokenizer())
    save_model(model, target, plan=plan, overwrite=True)
    assert contents(target) == contents(folder)
    assert os.listdir(tmp_path) == ["model"]


def test_a_crash_while_saving_leaves_what_was_there(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = saved("llama")
    target = tmp_path / "model"
    save_model(model, target)
    before = contents(target)

    def crash(self: Any, folder: Path, **options: Any) -> None:
        (Path(folder) / "half.safetensors").write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", crash)
    with pytest.raises(OSError, match="no space left"):
        save_model(model, target, overwrite=True)
    with pytest.raises(OSError, match="no space left"):
        save_model(model, tmp_path / "new")
    assert contents(target) == before
    assert os.listdir(tmp_path) == ["model"]


def test_the_tokenizer_is_saved_beside_the_model(saved: Saved, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, _, _ = saved("llama")
    save_model(model, tmp_path / "model", tokenizer=tiny.tokenizer())
    found = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert found("the cat")["input_ids"] == tiny.tokenizer()("the cat")["input_ids"]


def test_what_is_no_transformers_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="save its state_dict"):
        save_model(torch.nn.Linear(3, 4), tmp_path / "model")
    assert not os.listdir(tmp_path)
