"""Tiny models and a tiny tokenizer from configs: no hub, no downloads, milliseconds."""

from collections.abc import Iterable
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


def text(numbers: Iterable[int]) -> str:
    """The words of some numbers."""
    return " ".join(WORDS[n] for n in numbers)


def saved(model: Any, folder: Path) -> Path:
    """The folder, with the model and the tokenizer."""
    model.save_pretrained(folder)
    tokenizer(folder)
    return folder


def _decoder(name: str, seed: int, changes: dict[str, Any]) -> Any:
    """A causal language model in the manner of Llama."""
    import transformers

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
    config = getattr(transformers, f"{name}Config")(**{**settings, **changes})
    torch.manual_seed(seed)
    return _scaled(getattr(transformers, f"{name}ForCausalLM")(config))


def llama(**changes: Any) -> Any:
    """Grouped-query attention and a head tied to the embedding."""
    return _decoder("Llama", 0, changes)


def mistral(**changes: Any) -> Any:
    """A sliding window of attention, a head of its own."""
    return _decoder("Mistral", 5, {"tie_word_embeddings": False, "sliding_window": 4, **changes})


def qwen(**changes: Any) -> Any:
    """Qwen3: normalised queries and keys, heads wider than their share; biases in attention."""
    return _decoder("Qwen3", 6, {"head_dim": 8, "attention_bias": True, **changes})


def mixtral(**changes: Any) -> Any:
    """Experts fused into 3-D weights behind a router."""
    settings = {"num_local_experts": 4, "tie_word_embeddings": False, **changes}
    return _decoder("Mixtral", 7, settings)


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
    """BERT with a head: SequenceClassification (num_labels=1 regresses), TokenClassification.

    Or MaskedLM, which is tied to the embedding and has a bias of two names.
    """
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


def t5_is_eager() -> bool:
    """Whether its attention is not fused, as in earlier releases of transformers: less exact."""
    return bool(t5().config._attn_implementation == "eager")


def roberta(**changes: Any) -> Any:
    """Positions that depend on the padding; a head of two layers."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(8)
    return _scaled(RobertaForSequenceClassification(RobertaConfig(**_encoder_settings(changes))))


def distilbert(**changes: Any) -> Any:
    """BERT without token types, whose settings have names of their own."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    settings = {
        "vocab_size": VOCABULARY,
        "dim": 24,
        "hidden_dim": 40,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(9)
    config = DistilBertConfig(**{**settings, **changes})
    return _scaled(DistilBertForSequenceClassification(config))


def _picture_settings(changes: dict[str, Any]) -> dict[str, Any]:
    settings = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
        "num_labels": 3,
    }
    return {**settings, **changes}


def vit(**changes: Any) -> Any:
    """Patches of a picture, and a class token."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(10)
    config = ViTConfig(**_picture_settings({"intermediate_size": 40, **changes}))
    return _scaled(ViTForImageClassification(config))


def dinov2(**changes: Any) -> Any:
    """Layers that scale what they add."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    torch.manual_seed(11)
    config = Dinov2Config(**_picture_settings({"mlp_ratio": 2, **changes}))
    return _scaled(Dinov2ForImageClassification(config))


def whisper(**changes: Any) -> Any:
    """Convolutions over sound, then encoder and decoder; the head is tied to the embedding."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    settings = {
        "vocab_size": VOCABULARY,
        "num_mel_bins": 6,
        "d_model": 24,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40,
        "max_source_positions": 10,
        "max_target_positions": 32,
        "decoder_start_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "begin_suppress_tokens": None,
    }
    torch.manual_seed(12)
    return _scaled(WhisperForConditionalGeneration(WhisperConfig(**{**settings, **changes})))


def _scaled(model: Any) -> Any:
    """Weights five times their initial size, so that layers do something to the loss."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5.0)
    return model.eval()


def batches(model: Any, count: int = 2, size: int = 3, tokens: int = 8) -> list[dict[str, Any]]:
    """Random batches with labels for the model's task; texts have padding at the right."""
    from rankopt.model.tasks import task_of

    task, kind = task_of(model), model.main_input_name
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (size, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, tokens - 3 :] = 0
        ids = ids.masked_fill(mask == 0, 0)
        batch = {"input_ids": ids, "attention_mask": mask}
        if kind == "pixel_values":
            shape = (size, 3, model.config.image_size, model.config.image_size)
            batch = {kind: torch.randn(shape, generator=generator)}
        elif kind == "input_features":
            # Two convolutions halve the length once; the encoder takes no other.
            shape = (size, model.config.num_mel_bins, 2 * model.config.max_source_positions)
            batch = {kind: torch.randn(shape, generator=generator)}
        if task == "causal-lm":
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        elif task == "seq2seq-lm":
            batch["labels"] = torch.randint(3, VOCABULARY, (size, tokens - 2), generator=generator)
            batch["labels"][1, 3:] = -100
        elif task == "masked-lm":
            labels = torch.randint(3, VOCABULARY, (size, tokens), generator=generator)
            batch["labels"] = labels.masked_fill(mask == 0, -100)
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


#: name -> builder, one for each kind of layer, loss and sharing that the tests walk through.
MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "bert-classification": bert,
    "bert-regression": lambda: bert(num_labels=1),
    "bert-tokens": lambda: bert("TokenClassification", num_labels=4),
    "albert": albert,
    "t5": t5,
}

#: The same, and further architectures that must go all the way from profile to reload.
ARCHITECTURES = {
    **MODELS,
    "roberta": roberta,
    "distilbert": distilbert,
    "mistral": mistral,
    "qwen": qwen,
    "mixtral": mixtral,
    "vit": vit,
    "dinov2": dinov2,
    "whisper": whisper,
}
