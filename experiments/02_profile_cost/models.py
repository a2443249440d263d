"""The models that a pass is timed on: shapes of real ones, random weights, no downloads.

Models of a few layers stand for deep ones; the vocabulary is cut in the same proportion, so that
the head's share of the work stays that of the real model.
"""

import copy
import dataclasses
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
        name: in tables.
        config: of the model; BERT classifies sequences, Llama predicts tokens.
        examples: B.
        tokens: T.
    """

    name: str
    config: Any
    examples: int
    tokens: int

    @property
    def encoder(self) -> bool:
        """Whether it classifies sequences."""
        return bool(self.config.model_type == "bert")

    def model(self) -> Any:
        """Random weights, always the same."""
        torch.manual_seed(0)
        kind = "BertForSequenceClassification" if self.encoder else "LlamaForCausalLM"
        return getattr(transformers, kind)(self.config).eval()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Ids and labels, always the same; no padding."""
        torch.manual_seed(1)
        ids = torch.randint(0, self.config.vocab_size, (self.examples, self.tokens))
        return ids, ids[:, 0] % 2 if self.encoder else ids


def summed_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, the sum over examples and tokens; language models look one token ahead."""
    logits = model(input_ids=ids).logits
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return functional.cross_entropy(logits, labels, reduction="sum")


def planned(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks: what rankopt plans unless it is told otherwise."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and any(part.isdigit() for part in name.split("."))
    }


def twin(model: nn.Module) -> Any:
    """A model that shares all weights, but has hooks and ``requires_grad`` of its own."""
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, shared)


def _bert(layers: int, vocabulary: int | None = None, **shape: int) -> Any:
    """BERT-base, or a part of its 12 layers and 30522 words."""
    return transformers.BertConfig(
        num_hidden_layers=layers,
        vocab_size=vocabulary or 30522 * layers // 12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **shape,
    )


def _llama(layers: int, vocabulary: int, *shape: int) -> Any:
    hidden, intermediate, heads, groups = shape
    return transformers.LlamaConfig(
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
    )


def _smollm2(layers: int) -> Any:
    """SmolLM2-135M, or a part of its 30 layers and 49152 words."""
    return _llama(layers, 49152 * layers // 30, 576, 1536, 9, 3)


def full() -> list[Case]:
    """The cases of the README's table."""
    # TinyLlama's width: 22 layers and 32000 words.
    llama = _llama(1, 32000 // 22, 2048, 5632, 32, 4)
    return [
        Case("BERT width, 3 layers, B=8 T=128", _bert(3), 8, 128),
        Case("BERT width, 2 layers, B=32 T=64", _bert(2), 32, 64),
        Case("BERT width, 3 layers, B=16 T=32", _bert(3), 16, 32),
        Case("SmolLM2 shape, 4 layers, B=4 T=256", _smollm2(4), 4, 256),
        Case("SmolLM2 shape, 4 layers, B=2 T=512", _smollm2(4), 2, 512),
        Case("Llama width, 1 layer, B=2 T=512", llama, 2, 512),
    ]


def memory() -> list[Case]:
    """The cases whose memory is measured: deep enough for activations to count."""
    return [
        Case("BERT width, 6 layers, B=8 T=128", _bert(6), 8, 128),
        Case("BERT width, 6 layers, B=32 T=64", _bert(6), 32, 64),
        Case("SmolLM2 shape, 12 layers, B=4 T=256", _smollm2(12), 4, 256),
    ]


def quick() -> list[Case]:
    """Seconds, to see whether everything still runs and agrees."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return [
        Case("tiny BERT", _bert(2, 100, **small), 6, 12),
        Case("tiny Llama", _llama(2, 96, 48, 96, 4, 2), 3, 40),
    ]
