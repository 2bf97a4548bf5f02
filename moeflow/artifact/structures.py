"""How each family's model is built beside its experts: transformers' modules, written down as a table.

`moeflow.artifact.families` says which tensors are the experts; here is all else, so that names and shapes follow from a
config alone (`moeflow.artifact.shapes`), without torch and transformers. A test compares every entry with what
transformers builds. A family without an entry goes through transformers, which takes seconds and gives the same.

Numbers are never assumed. A switch that a config lacks means transformers' default, which is what releases older than
the switch are: off, or on where `Structure.on` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moeflow.artifact.facts import ModelConfig
from moeflow.artifact.parts import (
    CONVOLUTION,
    KEYS,
    LATENT,
    MAMBA,
    QUERIES,
    Part,
    around,
    grouped,
    linear,
    mlp,
    norms,
    router,
)

__all__ = ["STRUCTURES", "Structure"]

Rule = Callable[[ModelConfig, int], bool]


def _every(_config: ModelConfig, _layer: int) -> bool:
    return True


def _after_first(config: ModelConfig, layer: int) -> bool:
    return layer >= config.number("first_k_dense_replace")


def _by_step(config: ModelConfig, layer: int) -> bool:
    dense = config.listed("mlp_only_layers")  # Qwen1.5-MoE's config is older than the key, and has no such layers
    return layer not in dense and (layer + 1) % config.positive("decoder_sparse_step") == 0


def _by_interval(config: ModelConfig, layer: int) -> bool:
    last = config.number("moe_layer_end_index")
    last = config.layers - 1 if last == -1 else last
    chosen = (layer + 1) % config.positive("moe_layer_interval") == 0
    return chosen and config.number("moe_layer_start_index") <= layer <= last


def _jamba_moe(config: ModelConfig, layer: int) -> bool:
    chosen = layer % config.positive("expert_layer_period") == config.number("expert_layer_offset")
    return chosen and config.experts > 1  # Jamba has dense models too


def _jamba_attends(config: ModelConfig, layer: int) -> bool:
    return layer % config.positive("attn_layer_period") == config.number("attn_layer_offset")


def _after_dense(config: ModelConfig, layer: int) -> bool:
    return layer >= config.number("num_dense_layers")


def _lfm2_attends(config: ModelConfig, layer: int) -> bool:
    return bool(config.of_layer("layer_types", layer) != "conv")


@dataclass(frozen=True)
class Structure:
    """A family's model."""

    inner: str
    """Config key of the dimension between an expert's matrices."""
    attention: tuple[Part, ...]
    moe: tuple[Part, ...]
    """What a layer with experts has beside them."""
    dense: tuple[Part, ...] = ()
    """What a layer without experts has."""
    is_moe: Rule = _every
    """Which layers have experts."""
    recurrent: tuple[Part, ...] = ()
    """In place of attention, in layers that do not attend."""
    attends: Rule = _every
    norms: tuple[Part, ...] = norms("input_layernorm", "post_attention_layernorm")
    around: tuple[Part, ...] = around()
    on: tuple[str, ...] = ()
    """Switches that are on where the config lacks them."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Switch -> the family's own name of it, which goes before."""
    states: tuple[str, ...] = ()
    """Keys that a config must have although other families' may leave them out."""


_DENSE = mlp("mlp", "intermediate_size")
_SHARED = mlp("mlp.shared_experts", "n_shared_experts*moe_intermediate_size")
_CORRECTED = router("mlp.gate", "F32", correction="mlp.gate.e_score_correction_bias")
_HEAD_NORMS = norms("self_attn.q_norm", "self_attn.k_norm", size="head_dim")
_BIASED = grouped("attention_bias", "attention_bias")

STRUCTURES: Mapping[str, Structure] = {
    "deepseek_v2": Structure(
        "moe_intermediate_size",
        LATENT,
        router("mlp.gate", "F32") + mlp("mlp.shared_experts", "n_shared_experts*moe_intermediate_size", "mlp_bias"),
        mlp("mlp", "intermediate_size", "mlp_bias"),
        _after_first,
        states=("q_lora_rank",),
    ),
    "deepseek_v3": Structure(
        "moe_intermediate_size", LATENT, _CORRECTED + _SHARED, _DENSE, _after_first, states=("q_lora_rank",)
    ),
    "dots1": Structure("moe_intermediate_size", _BIASED + _HEAD_NORMS, _CORRECTED + _SHARED, _DENSE, _after_first),
    "ernie4_5_moe": Structure(
        "moe_intermediate_size",
        grouped("use_bias", "use_bias"),
        (
            *router("mlp.gate", "F32"),
            Part("mlp.moe_statics.e_score_correction_bias", ("1", "experts"), dtype="F32"),
            *mlp(
                "mlp.shared_experts",
                "moe_num_shared_experts*moe_intermediate_size",
                "use_bias",
                when=("moe_num_shared_experts",),
            ),
        ),
        mlp("mlp", "intermediate_size", "use_bias"),
        _by_interval,
        around=around(bias="use_bias"),
        on=("tie_word_embeddings",),
        states=("moe_num_shared_experts",),
    ),
    "glm4_moe": Structure(
        "moe_intermediate_size",
        grouped("attention_bias")
        + norms("self_attn.q_norm", "self_attn.k_norm", size="head_dim", when=("use_qk_norm",)),
        _CORRECTED + _SHARED,
        _DENSE,
        _after_first,
    ),
    "gpt_oss": Structure(
        "intermediate_size",
        (*_BIASED, Part("self_attn.sinks", ("num_attention_heads",))),
        (*router("mlp.router"), Part("mlp.router.bias", ("experts",))),
        on=("attention_bias",),
        states=("head_dim",),
    ),
    "granitemoe": Structure("intermediate_size", _BIASED, router("block_sparse_moe.router.layer")),
    "hunyuan_v1_moe": Structure(
        "intermediate_size",
        _BIASED + norms("self_attn.query_layernorm", "self_attn.key_layernorm", size="head_dim"),
        router("mlp.gate.wg", "F32") + mlp("mlp.shared_mlp", "intermediate_size"),
        states=("head_dim",),
    ),
    "jamba": Structure(
        "intermediate_size",
        grouped(),
        router("feed_forward.router"),
        mlp("feed_forward", "intermediate_size"),
        _jamba_moe,
        MAMBA,
        _jamba_attends,
        norms("input_layernorm", "pre_ff_layernorm"),
        around("model.final_layernorm"),
        on=("mamba_conv_bias",),
    ),
    "lfm2_moe": Structure(
        "moe_intermediate_size",
        grouped(output="out_proj") + norms("self_attn.q_layernorm", "self_attn.k_layernorm", size="head_dim"),
        router("feed_forward.gate", correction="feed_forward.expert_bias", when=("use_expert_bias",)),
        mlp("feed_forward", "intermediate_size", names="w1 w3 w2"),
        _after_dense,
        CONVOLUTION,
        _lfm2_attends,
        norms("operator_norm", "ffn_norm"),
        around("model.embedding_norm"),
        on=("use_expert_bias", "tie_word_embeddings"),
        renamed={"tie_word_embeddings": "tie_embedding"},
    ),
    "mixtral": Structure("intermediate_size", grouped(), router("block_sparse_moe.gate")),
    "olmoe": Structure(
        "intermediate_size",
        _BIASED + norms("self_attn.q_norm", size=QUERIES) + norms("self_attn.k_norm", size=KEYS),
        router("mlp.gate"),
    ),
    "phimoe": Structure(
        "intermediate_size",
        _BIASED,
        router("block_sparse_moe.gate"),
        norms=(
            *norms("input_layernorm", "post_attention_layernorm"),
            Part("input_layernorm.bias", ("hidden_size",)),
            Part("post_attention_layernorm.bias", ("hidden_size",)),
        ),
        around=(*around(bias="lm_head_bias"), Part("model.norm.bias", ("hidden_size",))),
    ),
    "qwen2_moe": Structure(
        "moe_intermediate_size",
        grouped("qkv_bias"),
        router("mlp.gate")
        + mlp("mlp.shared_expert", "shared_expert_intermediate_size")
        + linear("mlp.shared_expert_gate", "1", "hidden_size"),
        _DENSE,
        _by_step,
        on=("qkv_bias",),
    ),
    "qwen3_moe": Structure("moe_intermediate_size", _BIASED + _HEAD_NORMS, router("mlp.gate"), _DENSE, _by_step),
}
