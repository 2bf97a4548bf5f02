"""Configs of tiny models for every listed family: what makes each differ from Mixtral is switched on.

Dense first layers, shared experts, groups, correction biases, sliding windows, latent attention, Mamba and
convolution layers, tied embeddings. Sizes are multiples of 64, so that the default group size fits.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CONFIGS", "UNLISTED", "GENERIC"]

EXPERTS = 8
HIDDEN = 64
INTERMEDIATE = 64

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
_DENSE_FIRST = {"first_k_dense_replace": 1, "moe_intermediate_size": INTERMEDIATE, "intermediate_size": 128}
_SIGMOID = {"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5}

# model type -> (config class, settings beside those all share)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **_LATENT, **_DENSE_FIRST, "n_routed_experts": EXPERTS, "n_shared_experts": 2, "n_group": 2,
            "topk_group": 1, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_LATENT, **_DENSE_FIRST, **_SIGMOID, "n_routed_experts": EXPERTS, "n_shared_experts": 1},
    ),
    "dots1": (
        "Dots1Config",
        {
            **_DENSE_FIRST, **_SIGMOID, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "head_dim": 16,
            "sliding_window": 8, "max_window_layers": 2,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
            "moe_intermediate_size": INTERMEDIATE, "intermediate_size": 128, "use_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            **_DENSE_FIRST, **_SIGMOID, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "head_dim": 16,
            "attention_bias": True, "use_qk_norm": True,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE, "head_dim": 16, "sliding_window": 8,
            "rope_parameters": _ROPE,
        },
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        {
            "num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE, "tie_word_embeddings": True,
            "embedding_multiplier": 2.0, "logits_scaling": 1.5, "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
        },
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        {
            "num_experts": EXPERTS, "moe_topk": 2, "intermediate_size": INTERMEDIATE, "head_dim": 16,
            "tie_word_embeddings": True,
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            "num_experts": EXPERTS, "intermediate_size": INTERMEDIATE, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 0, "mamba_d_state": 8, "mamba_dt_rank": 8,
            "initializer_range": 0.1,
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            "num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE, "intermediate_size": 128,
            "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": True,
        },
    ),
    "phimoe": (
        "PhimoeConfig",
        {
            "num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE, "attention_bias": True,
            "lm_head_bias": True, "sliding_window": None,
        },
    ),
}  # fmt: skip

# Model types without a declaration, which the generic path runs. A config takes those settings of GENERIC that it has.
UNLISTED = (
    "afmoe", "cohere2_moe", "deepseek_v32", "exaone_moe", "flex_olmo", "glm4_moe_lite", "glm_moe_dsa",
    "granitemoehybrid", "granitemoeshared", "hy_v3", "mimo_v2_flash", "minimax_m2", "solar_open",
)  # fmt: skip
GENERIC: dict[str, Any] = {
    **_LATENT, **_DENSE_FIRST, "n_routed_experts": EXPERTS, "num_experts": EXPERTS, "num_local_experts": EXPERTS,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 16, "shared_intermediate_size": INTERMEDIATE,
    "shared_expert_intermediate_size": INTERMEDIATE, "attention_multiplier": 0.25,
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16,
}  # fmt: skip

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "short_mscale": 1.2,
    "long_mscale": 1.6, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
}  # fmt: skip
"""PhiMoE's frequencies and scales, which transformers chooses by the longest position."""
