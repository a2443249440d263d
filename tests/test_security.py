"""Nothing that a file holds is run, and no pickle is read."""

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from rankopt import Plan, Profile, apply_plan, evaluate, make_plan, profile_model
from rankopt.apply.saving import save_model
from rankopt.errors import ModelError
from rankopt.model.loading import load_model, load_tokenizer
from tests import tiny


def test_no_pickle_is_read_from_profile_to_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.llama().save_pretrained(tmp_path / "dense")
    tiny.tokenizer(tmp_path / "dense")
    read: list[str] = []

    def traced(name: str, honest: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            read.append(name)
            return honest(*given, **options)

        return call

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        what = f"{module.__name__}.{name}"
        monkeypatch.setattr(module, name, traced(what, getattr(module, name)))

    model = load_model(str(tmp_path / "dense"))
    tokenizer = load_tokenizer(str(tmp_path / "dense"))
    partial = tmp_path / "partial"
    batches = tiny.batches(model)
    for _ in range(2):  # the second goes on from the first's checkpoint
        profile = profile_model(model, batches, checkpoint=partial, checkpoint_every=1)
    profile.save(tmp_path / "p.st")
    make_plan(Profile.load(tmp_path / "p.st"), keep=0.6).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    apply_plan(model, plan, Profile.load(tmp_path / "p.st"))
    save_model(model, tmp_path / "small", plan=plan, tokenizer=tokenizer)
    wanted = evaluate(model, batches).loss
    assert evaluate(load_model(str(tmp_path / "small")), batches).loss == wanted
    assert partial.is_file()
    assert read == []
    pickle.loads(pickle.dumps(1))
    assert read == ["pickle.loads"], "what would have been seen"


@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
def test_code_in_a_model_folder_is_not_run(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    model = tiny.llama()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "evil.Config",
               "AutoModelForCausalLM": "evil.Model"}}  # fmt: skip
    path.write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (tmp_path / "model" / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with contextlib.suppress(ModelError):
        load_model(str(tmp_path / "model"))
    assert not mark.exists()
