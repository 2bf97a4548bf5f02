"""The blocks that models are built of, as tensors on disk with their dimensions: attention, MLPs, routers, norms.

Dimensions are written in config keys, so that a block is data and not code: what is transformers' module of the same
name becomes a few lines here. `moeflow.artifact.structures` says which family has which; numbers are put in by
`moeflow.artifact.shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CONVOLUTION", "KEYS", "LATENT", "MAMBA", "QUERIES", "Part", "around", "grouped", "linear", "mlp", "norms",
    "router",
]  # fmt: skip

QUERIES = "num_attention_heads*head_dim"
KEYS = "num_key_value_heads*head_dim"


@dataclass(frozen=True)
class Part:
    """A tensor of a layer, or of the model around its layers."""

    name: str
    """On disk; without the layer's name before it."""
    shape: tuple[str, ...]
    """Per dimension a sum of products of numbers and config keys, such as `2*mamba_d_state+mamba_dt_rank`."""
    when: tuple[str, ...] = ()
    """Switches of the config that must all be on for it to be there, or off if they begin with `!`."""
    dtype: str = ""
    """In safetensors' names, where it is not the model's."""


def linear(name: str, outputs: str, inputs: str, bias: str = "", when: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """A matrix, and a bias that is there if the switch `bias` is on."""
    weight = Part(f"{name}.weight", (outputs, inputs), when)
    return (weight, Part(f"{name}.bias", (outputs,), (*when, bias))) if bias else (weight,)


def mlp(
    name: str, inner: str, bias: str = "", names: str = "gate_proj up_proj down_proj", when: tuple[str, ...] = ()
) -> tuple[Part, ...]:
    """Gate, up and down, called `names`; `inner` is the dimension between them."""
    gate, up, down = (f"{name}.{part}" for part in names.split())
    return (
        *linear(gate, inner, "hidden_size", bias, when),
        *linear(up, inner, "hidden_size", bias, when),
        *linear(down, "hidden_size", inner, bias, when),
    )


def norms(*names: str, size: str = "hidden_size", when: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """A weight for each."""
    return tuple(Part(f"{name}.weight", (size,), when) for name in names)


def router(name: str, dtype: str = "", correction: str = "", when: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """A row per expert; `correction`, there if `when` is on, is added to scores and stays in float32."""
    weight = Part(f"{name}.weight", ("experts", "hidden_size"), dtype=dtype)
    return (weight, Part(correction, ("experts",), when, "F32")) if correction else (weight,)


def grouped(bias: str = "", output_bias: str = "", output: str = "o_proj") -> tuple[Part, ...]:
    """Attention whose queries share keys and values in groups."""
    return (
        *linear("self_attn.q_proj", QUERIES, "hidden_size", bias),
        *linear("self_attn.k_proj", KEYS, "hidden_size", bias),
        *linear("self_attn.v_proj", KEYS, "hidden_size", bias),
        *linear(f"self_attn.{output}", "hidden_size", QUERIES, output_bias),
    )


def around(norm: str = "model.norm", bias: str = "") -> tuple[Part, ...]:
    """Embeddings, the last norm, and the head; of one that is tied to the embeddings only a bias is stored."""
    head = Part("lm_head.weight", ("vocab_size", "hidden_size"), ("!tie_word_embeddings",))
    parts = (Part("model.embed_tokens.weight", ("vocab_size", "hidden_size")), *norms(norm), head)
    return (*parts, Part("lm_head.bias", ("vocab_size",), (bias,))) if bias else parts


_LATENT_QUERIES = "num_attention_heads*qk_nope_head_dim+num_attention_heads*qk_rope_head_dim"
_LATENT_KEYS = "num_attention_heads*qk_nope_head_dim+num_attention_heads*v_head_dim"
_RANK = ("q_lora_rank",)

# DeepSeek's attention: keys and values are made of a few numbers a token, and in the larger models queries are too.
LATENT: tuple[Part, ...] = (
    *linear("self_attn.q_proj", _LATENT_QUERIES, "hidden_size", when=("!q_lora_rank",)),
    *linear("self_attn.q_a_proj", "q_lora_rank", "hidden_size", "attention_bias", _RANK),
    *norms("self_attn.q_a_layernorm", size="q_lora_rank", when=_RANK),
    *linear("self_attn.q_b_proj", _LATENT_QUERIES, "q_lora_rank", when=_RANK),
    *linear("self_attn.kv_a_proj_with_mqa", "kv_lora_rank+qk_rope_head_dim", "hidden_size", "attention_bias"),
    *norms("self_attn.kv_a_layernorm", size="kv_lora_rank"),
    *linear("self_attn.kv_b_proj", _LATENT_KEYS, "kv_lora_rank"),
    *linear("self_attn.o_proj", "hidden_size", "num_attention_heads*v_head_dim", "attention_bias"),
)

_INNER = "mamba_expand*hidden_size"
MAMBA: tuple[Part, ...] = (
    *linear("mamba.in_proj", f"2*{_INNER}", "hidden_size", "mamba_proj_bias"),
    Part("mamba.conv1d.weight", (_INNER, "1", "mamba_d_conv")),
    Part("mamba.conv1d.bias", (_INNER,), ("mamba_conv_bias",)),
    *linear("mamba.x_proj", "mamba_dt_rank+2*mamba_d_state", _INNER),
    *linear("mamba.dt_proj", _INNER, "mamba_dt_rank"),
    Part("mamba.dt_proj.bias", (_INNER,)),
    Part("mamba.A_log", (_INNER, "mamba_d_state")),
    Part("mamba.D", (_INNER,)),
    *norms("mamba.dt_layernorm", size="mamba_dt_rank"),
    *norms("mamba.b_layernorm", "mamba.c_layernorm", size="mamba_d_state"),
    *linear("mamba.out_proj", "hidden_size", _INNER, "mamba_proj_bias"),
)

CONVOLUTION: tuple[Part, ...] = (
    Part("conv.conv.weight", ("hidden_size", "1", "conv_L_cache")),
    Part("conv.conv.bias", ("hidden_size",), ("conv_bias",)),
    *linear("conv.in_proj", "3*hidden_size", "hidden_size", "conv_bias"),
    *linear("conv.out_proj", "hidden_size", "hidden_size", "conv_bias"),
)
