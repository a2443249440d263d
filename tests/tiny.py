"""Tiny models and a tiny tokenizer from configs: no hub, no downloads, milliseconds."""

from pathlib import Path
from typing import Any

import torch

WORDS = ["the", "a", "cat", "dog", "bird", "tree", "sees", "likes", "small", "red", "and", "under"]
VOCABULARY = 64


def tokenizer(folder: Path | None = None) -> Any:
    """A word-level tokenizer with padding, end of text and unknown; saved if a folder is given."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    table = {word: n for n, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    if folder is not None:
        made.save_pretrained(folder)
    return made


def llama(**changes: Any) -> Any:
    """Grouped-query attention and a head tied to the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    return _scaled(LlamaForCausalLM(LlamaConfig(**{**settings, **changes})))


def gpt2(**changes: Any) -> Any:
    """Conv1D layers; dropout is on in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    torch.manual_seed(1)
    return _scaled(GPT2LMHeadModel(GPT2Config(**{**settings, **changes})))


def _encoder_settings(changes: dict[str, Any]) -> dict[str, Any]:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return {**settings, **changes}


def bert(head: str = "SequenceClassification", **changes: Any) -> Any:
    """BERT with a head: SequenceClassification (num_labels=1 regresses), TokenClassification."""
    import transformers

    torch.manual_seed(2)
    config = transformers.BertConfig(**_encoder_settings(changes))
    return _scaled(getattr(transformers, f"BertFor{head}")(config))


def albert(**changes: Any) -> Any:
    """One shared block, used several times in a forward pass."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    settings = _encoder_settings({"num_hidden_layers": 3, "embedding_size": 16, **changes})
    torch.manual_seed(3)
    return _scaled(AlbertForSequenceClassification(AlbertConfig(**settings)))


def t5(**changes: Any) -> Any:
    """Encoder and decoder, ReLU (so some inputs of ``wo`` are always zero)."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {
        "vocab_size": VOCABULARY,
        "d_model": 24,
        "d_kv": 6,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(4)
    return _scaled(T5ForConditionalGeneration(T5Config(**{**settings, **changes})))


def _scaled(model: Any) -> Any:
    """Weights five times their initial size, so that layers do something to the loss."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5.0)
    return model.eval()


def batches(model: Any, count: int = 2, size: int = 3, tokens: int = 8) -> list[dict[str, Any]]:
    """Random batches with labels for the model's task; every batch has padding at the right."""
    from rankopt.tasks import task_of

    task = task_of(model)
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (size, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, tokens - 3 :] = 0
        ids = ids.masked_fill(mask == 0, 0)
        batch = {"input_ids": ids, "attention_mask": mask}
        if task == "causal-lm":
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        elif task == "seq2seq-lm":
            batch["labels"] = torch.randint(3, VOCABULARY, (size, tokens - 2), generator=generator)
            batch["labels"][1, 3:] = -100
        elif task == "token-classification":
            labels = torch.randint(0, model.config.num_labels, (size, tokens), generator=generator)
            batch["labels"] = labels.masked_fill(mask == 0, -100)
        elif task == "regression":
            batch["labels"] = torch.randn(size, generator=generator)
        else:
            labels = torch.randint(0, model.config.num_labels, (size,), generator=generator)
            batch["labels"] = labels
        made.append(batch)
    return made


#: name -> builder, one for each architecture and head that the tests walk through.
MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "bert-classification": bert,
    "bert-regression": lambda: bert(num_labels=1),
    "bert-tokens": lambda: bert("TokenClassification", num_labels=4),
    "albert": albert,
    "t5": t5,
}
