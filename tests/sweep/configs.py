"""Tiny configurations of any architecture: usual names with small values, and few exceptions.

``tiny`` takes a configuration class as transformers ships it, asks its default for the settings
that it has, and makes those with a usual name small. What is left over has a line in FAMILIES.
"""

import re
from collections.abc import Mapping
from typing import Any

from tests.sweep.families import FAMILIES

#: Name of a setting, whole, as a pattern -> its small value; the first that fits counts.
NUMBERS: dict[str, int] = {
    r"embedding_size|projection_dim|proj_dim|adapter_dim": 16,
    r"(\w+_)?(intermediate_size|intermediate_dim|ffn_dim|ffn_hidden_size|d_ff|d_inner)": 48,
    r"ffn_size|hidden_dim|mlp_dim|mlp_hidden_size|n_inner|dim_feedforward|ffn_hidden": 48,
    r"(\w+_)?(hidden_size|d_model|n_embd|embed_dim|emb_dim|hidden_dim|output_size|output_dim)": 32,
    r"dim|width|d_embed|word_embed_proj_dim|model_dim|output_hidden_size|hidden_channels": 32,
    r"(\w+_)?(head_dim|attention_head_size|v_head_size)|d_kv|d_head|kv_channels|head_size": 8,
    r"rotary_dim": 4,
    r"(\w+_)?lora_rank": 16,
    r"(\w+_)?num_(key_value_heads|kv_heads|query_groups)|(num_)?kv_heads|kv_n_heads": 2,
    r"(\w+_)?(num_|n_)(\w+_)?(heads|head)|n_head|(en|de)coder_attention_heads": 4,
    r"(\w+_)?(num_|n_)(hidden_)?(layers|layer|blocks)|(en|de)coder_layers|n_layer|depth": 2,
    r"num_(\w+_)?layers": 2,
    r"(\w+_)?vocab_size": 64,
    r"(num_|n_)(\w+_)?experts|moe_num_experts": 4,
    r"(num_|n_)?(\w+_)?(experts_per_tok|experts_per_token|topk|top_k)|moe_k": 2,
    r"n_group|topk_group|num_expert_group|num_limited_groups": 1,
    r"(mamba_|ssm_)?(state_size|d_state|ssm_state_size)": 8,
    r"n_positions|n_ctx|max_(\w+_)?(embeddings|positions|seq_len|seqlen|sequence_length)": 64,
    r"image_size|input_size|img_size": 32,
    r"chunk_size|mamba_chunk_size": 4,
    r"(\w+_)?sliding_window|attention_window|local_attention|window": 8,
    r"(\w+_)?block_size": 4,
    r"num_mel_bins|input_feat_per_channel|n_mels": 16,
    r"num_frames|frames_per_clip": 4,
}
#: The same for settings that are a number for each stage of a network.
LISTS: dict[str, int] = {
    r"depths?|layers|stage_num_blocks|num_block_repeats|stage_numb_of_layers|n_attn_blocks": 1,
    r"num_heads|num_attention_heads": 2,
    r"conv_dim": 16,
    r"image_size|input_size|img_size": 32,
    r"patch_size": 8,
    r"tdnn_dim|intermediate_size": 32,
}
#: These follow from others.
_DERIVED = {"num_feat_extract_layers", "num_stages", "qk_head_dim"}
_RESERVED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: Special tokens beyond these are counted down from the end of the vocabulary.
VOCABULARY = 64
_PATCH = 8


def tiny(kind: type, changes: Mapping[str, Any] | None = None) -> Any:
    """A configuration of this class with small values; ``changes`` come last."""
    family = FAMILIES.get(kind.__name__, {})
    given = dict(family.get("start", {}))
    default = kind(**given)
    small: dict[str, Any] = dict(given)
    sub = {name: value for name, value in vars(default).items() if hasattr(value, "to_dict")}
    for name, value in sub.items():
        small[name] = tiny(type(value))
    layers = -1 if hasattr(default, "depths") else _layers(default)
    tokens = iter(range(VOCABULARY - 1, 2, -1))
    for name, value in vars(default).items():
        if name in {*sub, *given, *_DERIVED} or name.startswith("_"):
            continue
        if name == "head_dim" and hasattr(default, "qk_head_dim"):
            continue
        new = _small(name, value, layers, tokens)
        of_queries = name.replace("key_value", "attention")
        if name.endswith("num_key_value_heads") and value == getattr(default, of_queries, 0):
            new = min(value, 4)
        if new is not None:
            small[name] = new
    small |= {name: x for name, x in family.items() if name != "start"}
    return kind(**{**small, **(changes or {})})


def _layers(config: Any) -> int:
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return -1


def _small(name: str, value: Any, layers: int, tokens: Any) -> Any:
    """A small value in place of a default; None to leave it."""
    if isinstance(value, bool) or value is None:
        return None
    if re.fullmatch(r"\w+_token_(id|index)|\w+_token", name) and isinstance(value, int):
        return _RESERVED.get(name, next(tokens) if name not in _RESERVED else 0)
    if name == "eos_token_id":
        return 2
    if isinstance(value, int):
        if name == "patch_size":
            return min(value, _PATCH)
        for pattern, number in NUMBERS.items():
            if re.fullmatch(pattern, name):
                return min(value, number) if value > 0 else None
        return None
    if isinstance(value, list | tuple) and value:
        return _list(name, value, layers)
    if name == "rope_parameters" and isinstance(value, dict):
        return _rope(value)
    return None


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Sections of multimodal positions that fill half a head of eight."""
    return {
        name: [2, 1, 1] if name == "mrope_section" else _rope(x) if isinstance(x, dict) else x
        for name, x in value.items()
    }


def _list(name: str, value: Any, layers: int) -> Any:
    kind, whole = type(value), all(type(x) is int for x in value)
    if re.fullmatch(r"hidden_sizes|embed_dims?|encoder_hidden_sizes|decoder_hidden_sizes", name):
        return kind(16 * (1 + n) for n in range(len(value)))
    if whole:
        for pattern, number in LISTS.items():
            if re.fullmatch(pattern, name):
                value = kind(min(x, number) for x in value)
    if len(value) == layers and layers > 2 and not re.fullmatch(r"depths|num_heads", name):
        # One of each kind of layer, as far as there is room.
        kinds = list(dict.fromkeys(map(_hashable, value)))
        first = [next(x for x in value if _hashable(x) == each) for each in kinds[:2]]
        return kind((first * 2)[:2])
    return value if whole else None


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
