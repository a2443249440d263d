"""A checkpoint of Llama's shapes with random weights, written one block at a time; and its block.

Weights are normal, seeded by the file, each matrix times a number of its own.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 200


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model, its data and its ranks."""

    blocks: int = 32
    hidden: int = 4096
    wide: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    windows: int = 4
    tokens: int = 32
    rank_multiple: int = 64
    killed_after: int = 60


def config_of(sizes: Sizes) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.wide,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def write_checkpoint(sizes: Sizes, folder: Path) -> int:
    """One file a block, and one for embedding, norm and head; the index comes last.

    Returns:
        Bytes of all weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(sizes)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    parts: dict[int, list[str]] = {}
    for name in shapes:
        block = int(name.split(".")[2]) if name.startswith("model.layers.") else sizes.blocks
        parts.setdefault(block, []).append(name)
    weight_map, total = {}, 0
    for part, names in parts.items():
        file = f"model-{part + 1:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        made = {}
        generator = torch.Generator().manual_seed(part)
        for name in names:
            made[name] = _random(shapes[name], generator)
            total += made[name].numel() * made[name].element_size()
        if not (folder / file).exists():
            save_file(made, folder / f"{file}.new", {"format": "pt"})
            (folder / f"{file}.new").rename(folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _tokenizer().save_pretrained(folder)
    config.save_pretrained(folder)
    return total


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = float(torch.randn((), generator=generator).mul(0.3).exp()) / shape[1] ** 0.5
    return torch.randn(shape, generator=generator).mul_(scale).bfloat16()


def _tokenizer() -> Any:
    table = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *_words()])}
    inner = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _words() -> list[str]:
    return [f"word{n}" for n in range(WORDS)]


def write_text(sizes: Sizes, path: Path) -> None:
    """As many words as the windows need."""
    generator = torch.Generator().manual_seed(0)
    words = _words()
    count = (sizes.windows + 1) * sizes.tokens
    drawn = torch.randint(len(words), (count,), generator=generator).tolist()
    path.write_text(" ".join(words[n] for n in drawn) + "\n", encoding="utf-8")


class Stored:
    """Tensors of a folder, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        files = {"model.safetensors"}
        if index.is_file():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        self._place: dict[str, Path] = {}
        for file in files:
            with safe_open(folder / file, framework="pt") as opened:
                self._place |= dict.fromkeys(opened.keys(), folder / file)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._place[name], framework="pt") as opened:
            found: Tensor = opened.get_tensor(name).clone()
        return found

    def names(self) -> set[str]:
        """Of all."""
        return set(self._place)
