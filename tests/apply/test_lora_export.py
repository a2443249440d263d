"""PEFT takes a plan's ranks as they are, and its own choices are read as plans."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from rankopt import make_lora_plan, make_plan, profile_model
from rankopt.plan.exchange import export_ranks, imported_plan
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from tests import tiny

peft = pytest.importorskip("peft")
KINDS = ("llama", "bert-classification", "gpt2", "t5")


def profiled(kind: str) -> tuple[Any, list[Any], Profile]:
    model = tiny.MODELS[kind]()
    batches = tiny.batches(model)
    return model, batches, profile_model(model, batches, form="pairs", backends=("fwsvd",))


def widths(model: Any) -> dict[str, int]:
    """Trainable parameters of each layer's adapter."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        layer, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
        if parameter.requires_grad:
            assert matrix, f"{name} is trained"
            found[layer] = found.get(layer, 0) + parameter.numel()
    return found


def adapted(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is set for Conv1D, and said
        return peft.get_peft_model(model, peft.LoraConfig.from_pretrained(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_those_of_a_plan_of_adapters(kind: str, tmp_path: Path) -> None:
    model, _, profile = profiled(kind)
    plan = make_lora_plan(profile, like_rank=2, objective="total")
    (tmp_path / "adapter_config.json").write_text(export_ranks(plan, "peft"))
    made = adapted(model, tmp_path)
    planned = {e.layer.name: e.parameters for e in plan.layers if e.rank}
    assert widths(made) == planned and sum(planned.values()) == plan.parameters
    assert len(planned) < len(plan.layers), "some have none"
    adapters = [m for m in made.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert {scale for m in adapters for scale in m.scaling.values()} == {1.0}


def test_a_layer_without_an_adapter_may_end_like_one_with_one(tmp_path: Path) -> None:
    from torch import nn

    model = nn.ModuleDict(
        {"inner": nn.ModuleDict({"proj": nn.Linear(8, 8)}), "proj": nn.Linear(8, 8)}
    )
    plan = _plan(model, {"proj": 2})
    (tmp_path / "adapter_config.json").write_text(export_ranks(plan, "peft"))
    found = widths(peft.get_peft_model(model, peft.LoraConfig.from_pretrained(tmp_path)))
    assert found == {"proj": 2 * 16}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_as_wide_as_planned(kind: str, tmp_path: Path) -> None:
    model, _, profile = profiled(kind)
    first = profile.info.layers[0].name
    plan = make_plan(profile, keep=0.5, pins={first: "dense"})
    (tmp_path / "adapter_config.json").write_text(export_ranks(plan, "peft"))
    found = widths(adapted(model, tmp_path))
    planned = {e.layer.name: e.parameters for e in plan.layers if e.rank is not None}
    assert found == planned and first not in found
    assert len({e.rank for e in plan.layers}) > 2


def test_a_name_that_ends_like_another_keeps_its_own_rank(tmp_path: Path) -> None:
    """PEFT looks for the ends of names: the patterns are of whole ones."""
    from torch import nn

    model = nn.ModuleDict(
        {"inner": nn.ModuleDict({"proj": nn.Linear(8, 8)}), "proj": nn.Linear(8, 8)}
    )
    content = {"inner.proj": 3, "proj": 2}
    plan = _plan(model, content)
    (tmp_path / "adapter_config.json").write_text(export_ranks(plan, "peft"))
    found = widths(peft.get_peft_model(model, peft.LoraConfig.from_pretrained(tmp_path)))
    assert found == {"inner.proj": 3 * 16, "proj": 2 * 16}


def _plan(model: Any, ranks: dict[str, int]) -> Plan:
    import torch

    def loss(model: Any, batch: Any) -> Any:
        return (model["proj"](model["inner"]["proj"](batch["x"]))).square().sum((1, 2))

    torch.manual_seed(0)
    batches = [{"x": torch.randn(4, 3, 8)}]
    profile = profile_model(model, batches, loss_fn=loss, include=["*"], backends=("fwsvd",))
    return imported_plan(profile, json.dumps(ranks))


def test_what_eva_chose_is_read(tmp_path: Path) -> None:
    """Ranks that PEFT itself redistributed, from the file that it saved."""
    model, _, profile = profiled("llama")
    batches = tiny.batches(model, count=6)
    targets = [layer.name for layer in profile.info.layers]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=1,
        target_modules=targets,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0),
    )
    made = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    peft.initialize_lora_eva_weights(made, inputs, show_progress_bar=False)
    made.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    assert json.loads(text)["rank_pattern"], "it chose"
    plan = imported_plan(profile, text)
    chosen = widths(made)
    for entry in plan.layers:
        shape = entry.layer.out_features + entry.layer.in_features
        assert (entry.rank or 0) * shape == chosen.get(entry.layer.name, 0)


def test_what_adalora_kept_is_read(tmp_path: Path) -> None:
    model, batches, profile = profiled("llama")
    targets = [layer.name for layer in profile.info.layers]
    how: Any = {"init_r": 3, "target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 4}
    made = peft.get_peft_model(
        model, peft.AdaLoraConfig(target_modules=targets, task_type="CAUSAL_LM", **how)
    )
    for step in range(1, 5):
        made(**batches[step % len(batches)]).loss.backward()
        made.base_model.update_and_allocate(step)
    made.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    kept = json.loads(text)["rank_pattern"]
    assert kept
    plan = imported_plan(profile, text)
    for name, flags in kept.items():
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_E")
        assert (plan.ranks[layer] or 0) == sum(flags)
    assert len(set(plan.ranks.values())) > 1
