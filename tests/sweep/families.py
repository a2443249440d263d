"""What single configuration classes need beyond the usual names."""

from typing import Any

_ALTERNATING = ["linear_attention", "full_attention"]
_MLA = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_SECTIONS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
_SWIN = {
    "start": {"depths": (1, 1), "num_heads": (2, 2)},
    "embed_dim": 16,
    "window_size": 4,
    "patch_size": 4,
    "hidden_size": 32,
}

#: Configuration class -> settings; those under ``start`` are given before its default can be made.
FAMILIES: dict[str, dict[str, Any]] = {
    **{
        f"{name}TextConfig": _SECTIONS
        for name in (
            "Qwen2VL",
            "Qwen2_5_VL",
            "Qwen2_5Omni",
            "GlmOcr",
            "Glm46V",
            "Glm4v",
            "HunYuanVL",
            "PaddleOCR",
        )
    },
    "PaddleOCRTextConfig": _SECTIONS | {"head_dim": 8},
    "HunYuanVLTextConfig": _SECTIONS | {"head_dim": 8},
    "BambaConfig": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "BitConfig": {"num_groups": 4, "embedding_size": 16},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "BrosConfig": {
        "dim_bbox": 8,
        "hidden_size": 64,
        "dim_bbox_sinusoid_emb_2d": 16,
        "dim_bbox_sinusoid_emb_1d": 2,
        "dim_bbox_projection": 16,
    },
    "CohereCompassTextConfig": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Dots3NoteTextConfig": {"num_key_value_heads": 4},
    "DonutSwinConfig": _SWIN,
    "EfficientNetConfig": {
        "start": {
            "in_channels": (32, 16),
            "out_channels": (16, 16),
            "kernel_sizes": (3, 3),
            "strides": (1, 2),
            "num_block_repeats": (1, 1),
            "expand_ratios": (1, 6),
        },
        "hidden_dim": 1280,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    },
    "EsmConfig": {"vocab_size": 64, "mask_token_id": 60, "pad_token_id": 0},
    "EsmcConfig": {"num_key_value_heads": 4},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "Gemma4TextConfig": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "Glm5NextTextConfig": {"num_key_value_heads": 4, "index_topk": 16},
    "GraniteMoeHybridConfig": {
        "layer_types": _ALTERNATING,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "shared_intermediate_size": 24,
    },
    "HGNetV2Config": {
        "stem_channels": (3, 8, 16),
        "stage_in_channels": (16, 16, 16, 16),
        "stage_mid_channels": (8, 8, 8, 8),
        "stage_out_channels": (16, 16, 16, 16),
        "hidden_sizes": [16, 16, 16, 16],
        "embedding_size": 16,
    },
    "HunYuanDenseV1Config": {"head_dim": 8},
    "HunYuanMoEV1Config": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "LevitConfig": {
        "start": {"patch_size": 16},
        "image_size": 64,
        "num_attention_heads": (2, 2, 2),
        "key_dim": (8, 8, 8),
        "down_ops": [["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]],
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "LiltConfig": {"hidden_size": 48},
    "LongcatFlashConfig": _MLA | {"head_dim": 8, "expert_ffn_hidden_size": 24},
    "LayoutLMv3Config": {
        "coordinate_size": 6,
        "shape_size": 4,
        "patch_size": 16,
        "max_2d_position_embeddings": 64,
    },
    "Mamba2Config": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "MarkupLMConfig": {
        "tag_pad_id": 60,
        "subs_pad_id": 60,
        "xpath_unit_hidden_size": 4,
        "max_depth": 4,
        "bos_token_id": 1,
    },
    "MinistralConfig": {"head_dim": 8},
    "MobileBertConfig": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "MobileNetV1Config": {"depth_multiplier": 0.125},
    "MobileViTV2Config": {
        "base_attn_unit_dims": (16, 16, 16),
        "image_size": 64,
        "width_multiplier": 0.25,
    },
    "Glm4vMoeTextConfig": _SECTIONS | {"head_dim": 8, "partial_rotary_factor": 1.0},
    "Step3p7TextConfig": {"sliding_window": 8},
    "NemotronConfig": {"head_dim": 8, "num_key_value_heads": 2},
    "NemotronHConfig": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 24,
    },
    "NeoMMEConfig": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "PerceiverConfig": {
        "d_latents": 32,
        "d_model": 32,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "num_blocks": 1,
        "num_self_attention_heads": 1,
        "num_cross_attention_heads": 1,
    },
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaConfig": {
        "start": {"num_hidden_layers": 3},
        "lru_width": 32,
        "num_key_value_heads": 1,
    },
    "ReformerConfig": {
        "attn_layers": ("local", "lsh"),
        "axial_pos_shape": (4, 16),
        "axial_pos_embds_dim": (16, 16),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
        "num_buckets": 4,
        "feed_forward_size": 48,
    },
    "SegformerConfig": {
        "num_attention_heads": (1, 1, 2, 2),
        "num_encoder_blocks": 4,
        "image_size": 64,
    },
    "SqueezeBertConfig": {"embedding_size": 32},
    "SwinConfig": _SWIN,
    "Swinv2Config": _SWIN
    | {"start": {"depths": (1, 1), "num_heads": (2, 2), "pretrained_window_sizes": (0, 0)}},
    "TextNetConfig": {"stem_out_channels": 16},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 40, "vision_end_token_id": 41},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 40, "vision_end_token_id": 41},
    "XmodConfig": {"default_language": "en_XX"},
    "xLSTMConfig": {"hidden_size": 32, "num_heads": 4, "chunk_size": 4},
    "Zamba2Config": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_attention_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "num_key_value_heads": 4,
        "adapter_rank": 8,
    },
    "ZambaConfig": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "CvtConfig": {"depth": (1, 2, 3)},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "AriaConfig": {"projector_patch_to_query_dict": {16: 4}},
    "Gemma3Config": {"mm_tokens_per_image": 4},
    "PaliGemmaConfig": {"projection_dim": 32},
    "SiglipVisionConfig": {"projection_dim": 32},
    "VipLlavaConfig": {"vision_feature_layers": [-1, -2]},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
}
