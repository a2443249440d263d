"""What is refused before any work, and what a refined model says of itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankopt import DataError, ModelError, OptionError, evaluate, refine, save_model
from rankopt.apply.refined import refined_on, refinements_of
from rankopt.model.loading import load_model
from tests import tiny
from tests.refinement.small import RECIPE, bits, changed, compressed, low_rank_in


def refused(
    match: str, model: Any, dense: Any, batches: Any, kind: Any = ModelError, **o: Any
) -> None:
    before = bits(model)
    with pytest.raises(kind, match=match) as error:
        refine(model, dense, batches, **{**RECIPE, **o})
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), bits(model).values(), strict=True)
               if not a.is_meta)  # fmt: skip


def test_another_dense_model_is_refused() -> None:
    model, dense, batches = compressed()
    other = "the dense model is not what the model was compressed from: "
    refused(f"{other}.*model.embed_tokens.weight is 80 x 24, not 64 x 24", model,
            tiny.llama(vocab_size=80), batches)  # fmt: skip
    refused(f"{other}.*self_attn.k_proj.weight is 24 x 24, not 12 x 24", model,
            tiny.llama(num_key_value_heads=4), batches)  # fmt: skip
    refused(f"{other}.*layers.2.* is 24.* not missing", model, tiny.llama(num_hidden_layers=3),
            batches)  # fmt: skip
    refused(f"{other}.*is missing, not", model, tiny.llama(num_hidden_layers=1), batches)
    refused(other, model, tiny.gpt2(), batches)
    refused("dense model's layer .* is low rank", model, model, batches)
    refused("nothing to refine: apply a plan first", dense, dense, batches)


def test_models_that_cannot_learn_are_refused() -> None:
    from accelerate import cpu_offload
    from peft import LoraConfig, get_peft_model

    model, dense, batches = compressed()
    adapted = get_peft_model(compressed()[0], LoraConfig(target_modules=["q_proj.down"], r=2))
    refused("the model has an adapter .*merge it into the weights first", adapted, dense, batches)
    with torch.inference_mode():
        refused("torch.inference_mode is on", model, dense, batches)
    low = next(low_rank_in(model))
    whole = torch.zeros(low.up.weight.shape, dtype=torch.int8)
    low.up.weight = nn.Parameter(whole, requires_grad=False)
    refused("up.weight is torch.int8, quantised", model, dense, batches)
    model, _, _ = compressed()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    refused("the model is quantised: refine it before", model, dense, batches)
    model, _, _ = compressed()
    cpu_offload(model)
    refused("is offloaded, where it cannot learn: load the model .* without device_map", model,
            dense, batches)  # fmt: skip


def test_data_and_options_are_looked_at_first() -> None:
    model, dense, batches = compressed()
    refused("no batches were given", model, dense, [], DataError)
    refused("one batch was given, and one is held out", model, dense, batches[:1], DataError)
    refused("held_out has no batches", model, dense, batches, DataError, held_out=[])
    for name, value in (
        ("method", "magic"),
        ("passes", 0),
        ("learning_rate", 0.0),
        ("clip", -1.0),
        ("learning_rate", float("nan")),
        ("warm_up", 1.0),
        ("checkpoint_every", 0),
    ):
        refused(name, model, dense, batches, OptionError, **{name: value})
    batches[3]["input_ids"][0, 0] = 99
    refused("batch 4: token 99", model, dense, batches, DataError)


@pytest.mark.parametrize("method", ["distill", "blocks"])
def test_a_refined_model_says_so_wherever_it_goes(method: Any, tmp_path: Path) -> None:
    model, dense, batches = compressed()
    assert refinements_of(model) == ()
    save_model(model, tmp_path / "closed")
    assert "refined" not in (tmp_path / "closed" / "config.json").read_text()
    found = refine(model, dense, batches, method=method, seed=3, **RECIPE)
    save_model(model, tmp_path / "refined")
    loaded = load_model(str(tmp_path / "refined"))
    assert not changed(bits(model), loaded)
    assert evaluate(loaded, batches).loss == evaluate(model, batches).loss
    (label,) = refinements_of(loaded)
    assert (label.method, label.targets, label.unit) == (method, 144, "tokens")
    assert (label.examples, label.passes, label.learning_rate, label.seed) == (24, 2, 3e-3, 3)
    assert refined_on([label]) == f"refined on 144 tokens ({method})"
    assert f"refined on 144 tokens ({method}, {found.steps} steps)" in str(found)
    # Once more on the same data, then on other data: what is the same counts once.
    others = tiny.batches(dense, count=4, tokens=6)
    for data, held_out in ((batches, batches), (others, others)):
        refine(loaded, dense, data, held_out=held_out, **RECIPE)
    labels = refinements_of(loaded)
    assert len(labels) == 3 and labels[0] == label and labels[1].data == label.data
    assert (
        refined_on(labels)
        == f"refined on {162 + 4 * 12} tokens ({method}, then distill, then distill)"
    )
    save_model(loaded, tmp_path / "again")
    assert refinements_of(load_model(str(tmp_path / "again"))) == labels


def test_a_label_that_is_none_is_refused(tmp_path: Path) -> None:
    model, dense, batches = compressed()
    refine(model, dense, batches, **RECIPE)
    save_model(model, tmp_path / "refined")
    path = tmp_path / "refined" / "config.json"
    path.write_text(path.read_text().replace('"targets": 144', '"targets": "many"'))
    with pytest.raises(ModelError, match='entry of "refined" is none: targets'):
        load_model(str(tmp_path / "refined"))
