"""The configs of published models by name, so that their shapes can be benchmarked without a download.

Each is its release's config.json, less keys that say nothing of shapes or computation. A test counts the parameters
that they make. They are data: which families can be run is a matter of `moeflow.artifact.families`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from moeflow.errors import CheckpointError, unknown
from moeflow.files import read_document

__all__ = ["ARCHITECTURES", "PUBLISHED", "architecture"]

_COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "attention_dropout": 0.0, "dtype": "bfloat16"}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {  # mistralai/Mixtral-8x7B-Instruct-v0.1
        **_COMMON,
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "qwen3-30b-a3b": {  # Qwen/Qwen3-30B-A3B
        **_COMMON,
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "deepseek-v2-lite": {  # deepseek-ai/DeepSeek-V2-Lite
        **_COMMON,
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "attention_bias": False,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    },
    "olmoe-1b-7b": {  # allenai/OLMoE-1B-7B-0924
        **_COMMON,
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "attention_bias": False,
        "clip_qkv": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "gpt-oss-20b": {  # openai/gpt-oss-20b, whose experts are released in MXFP4; here as in its BF16 conversion
        **_COMMON,
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
}


PUBLISHED = {
    "mistralai/Mixtral-8x7B-v0.1": "mixtral-8x7b",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-8x7b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "deepseek-ai/DeepSeek-V2-Lite": "deepseek-v2-lite",
    "deepseek-ai/DeepSeek-V2-Lite-Chat": "deepseek-v2-lite",
    "allenai/OLMoE-1B-7B-0924": "olmoe-1b-7b",
    "allenai/OLMoE-1B-7B-0924-Instruct": "olmoe-1b-7b",
}
"""Hub id -> the architecture of its release; those whose tensors are stored otherwise, as gpt-oss's, are left out."""


def architecture(model: str) -> dict[str, Any]:
    """The config of a published model by name, or of any `config.json` by its path or its directory's.

    Raises:
        CheckpointError: the name is unknown, or the file is no model's config.
    """
    if model in ARCHITECTURES:
        return copy.deepcopy(ARCHITECTURES[model])
    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        names = unknown("architecture", model, ARCHITECTURES)
        raise CheckpointError(f"{names}; or name a config.json, or a directory that has one")
    config = read_document(file)
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{file}: not a model's config: it has no model_type")
    return config
