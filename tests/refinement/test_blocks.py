"""Block by block: no block is left worse on what it was not fitted to."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.vit import modeling_vit

from rankopt import ModelError, refine
from rankopt.refinement import walk
from rankopt.refinement.activations import Activations
from rankopt.refinement.walk import Walk
from tests.refinement.small import RECIPE, bits, changed, compressed, low_rank_in

NAMES = {
    "llama": ["model.layers.0", "model.layers.1"],
    "gpt2": ["transformer.h.0", "transformer.h.1"],
    "bert-classification": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
    "whisper": [f"model.{x}.layers.{k}" for x in ("encoder", "decoder") for k in (0, 1)],
    # Earlier releases of transformers have an encoder between.
    "vit": [
        f"vit.{'encoder.layer' if hasattr(modeling_vit, 'ViTEncoder') else 'layers'}.{n}"
        for n in range(2)
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_no_block_is_left_worse(name: str) -> None:
    model, dense, batches = compressed(name)
    found = refine(model, dense, batches, method="blocks", **RECIPE)
    low = [n for n in NAMES[name] if any(low_rank_in(model.get_submodule(n)))]
    assert [block.name for block in found.blocks] == low and len(low) >= 2
    assert all(block.after <= block.before for block in found.blocks)
    assert any(block.after < 0.9 * block.before for block in found.blocks)
    # Of examples as few as these, the whole may be worse where each block is better: then all is
    # as it was.
    assert found.after <= found.before and bool(found.targets) == (found.after < found.before)
    assert found.targets or name in ("bert-classification", "vit")
    assert found.steps == 2 * 8 * len(low)


def outputs(model: Any, block: str, batch: Any) -> torch.Tensor:
    found: list[torch.Tensor] = []
    hook = model.get_submodule(block).register_forward_hook(
        lambda _, args, output: found.append(output if torch.is_tensor(output) else output[0])
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return found[0]


def test_the_error_of_the_last_block_is_that_of_the_whole_prefix() -> None:
    model, dense, batches = compressed("bert-tokens")
    found = refine(model, dense, batches, method="blocks", **RECIPE)
    last = found.blocks[-1]
    ours, theirs = (outputs(each, last.name, batches[7]) for each in (model, dense))
    real = batches[7]["attention_mask"] != 0
    error = (ours - theirs)[real].square().sum() / theirs[real].square().sum()
    assert last.after == pytest.approx(float(error), rel=1e-4)


def test_a_block_never_rises_even_when_steps_are_far_too_large() -> None:
    model, dense, batches = compressed()
    start = bits(model)
    found = refine(
        model, dense, batches, method="blocks", learning_rate=20.0, passes=3, progress=False
    )
    assert all(block.after == block.before for block in found.blocks)
    assert found.after == found.before and found.targets == 0 and not changed(start, model)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_is_skipped_or_on_disk_changes_no_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dense, batches = compressed(name)
    wanted = refine(model, dense, batches, method="blocks", **RECIPE)
    reaches: list[int] = []
    reach = Walk._reach
    monkeypatch.setattr(Walk, "_reach", lambda self, n: (reaches.append(n), reach(self, n)))
    kept = Activations.__init__
    monkeypatch.setattr(
        Activations, "__init__", lambda self, parent, limit=0: kept(self, parent, limit)
    )
    monkeypatch.setattr(Walk, "passed", lambda *_: None)  # so that all is run whole
    plain, _, _ = compressed(name)
    options = {**RECIPE, "folder": tmp_path}
    assert refine(plain, dense, batches, method="blocks", **options) == wanted
    assert not changed(bits(model), plain)
    assert len(reaches) == 2 * len(batches) * len(wanted.blocks)
    assert not os.listdir(tmp_path)


class Chain(torch.nn.Module):
    """Three blocks; the last sees the first's output, too, if it looks back."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(3))
        self.back = back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.layers
        a = first(x)
        b = second(a)
        c: torch.Tensor = third(a + b if self.back else b)
        return c


@pytest.mark.parametrize("back", [False, True])
def test_blocks_are_skipped_where_that_changes_nothing(
    back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "logits_of", lambda model, ready: model(ready))
    model, batches = Chain(back), list(torch.randn(4, 2, 3))
    ran: list[int] = []
    weights = [layer.weight for layer in model.layers]
    places = {id(weight): place for place, weight in enumerate(weights)}
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda x, w, b: (ran.append(places[id(w)]), linear(x, w, b))[1],
    )
    names = [f"layers.{place}" for place in range(3)]
    with Activations(tmp_path) as store:
        one = Walk(model, dict.fromkeys(names, "layers"), batches, store, "kind")
        for name in names:
            for number, batch in enumerate(batches):
                given, output = one.given(name, number), one.gives(name, number)
                a = linear(batch, weights[0], model.layers[0].bias)
                b = linear(a, weights[1], model.layers[1].bias)
                wanted = {names[0]: batch, names[1]: a, names[2]: a + b if back else b}[name]
                assert torch.equal(given[0][0], wanted)
                assert torch.equal(output, linear(wanted, *model.get_submodule(name).parameters()))
                one.passed(name, number, output)
    # The first once a batch, and where a later one's first batch is checked, twice each.
    assert ran.count(0) == 4 + 2 + (2 if not back else 2 * 4)
    assert all("forward" not in layer.__dict__ for layer in model.layers)


def test_padding_of_a_block_does_not_count() -> None:
    found = []
    for filling in (0, 9):
        model, dense, batches = compressed("bert-classification")
        for batch in batches:
            hidden = batch["attention_mask"] == 0
            batch["input_ids"] = batch["input_ids"].masked_fill(hidden, filling)
        found.append(refine(model, dense, batches, method="blocks", **RECIPE))
    for one, other in zip(found[0].blocks, found[1].blocks, strict=True):
        assert one.before == pytest.approx(other.before, rel=1e-5)
        assert one.after == pytest.approx(other.after, rel=1e-3)


def test_a_block_of_several_uses_is_refused() -> None:
    model, dense, batches = compressed("albert")
    with pytest.raises(ModelError, match=r"several times in one run.*method distill"):
        refine(model, dense, batches, method="blocks", **RECIPE)
    assert all(p.requires_grad for p in model.parameters())


def test_activations_of_any_nesting(tmp_path: Path) -> None:
    from transformers.modeling_outputs import BaseModelOutput

    x = torch.arange(6.0).reshape(2, 3)
    nesting = (x, {"mask": (x > 2)[:1].expand(4, 3), "none": None, "flag": True}, [x.T],
               BaseModelOutput(last_hidden_state=x))  # fmt: skip
    for limit in (0, 10_000):
        with Activations(tmp_path, limit) as store:
            store.put("given", 3, nesting)
            store.get("given", 3)[0].zero_()
            found = store.get("given", 3)
            assert len(os.listdir(tmp_path)) == (limit == 0)
            assert torch.equal(found[0], x) and torch.equal(found[2][0], x.T)
            assert torch.equal(found[1]["mask"], nesting[1]["mask"])
            assert found[1]["none"] is None and found[1]["flag"] is True
            assert torch.equal(found[3].last_hidden_state, x)
        assert not os.listdir(tmp_path)
