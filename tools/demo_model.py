"""The demo model: its Mixtral configuration and a training forward pass over the same parameters.

What: `build` makes a transformers MixtralForCausalLM; `language_loss` computes its training loss.
Why so: transformers' own forward selects tokens expert by expert, which at this size is bound by kernel
launches, and its balancing loss pools all layers, so that an expert can die in one layer unnoticed. Here all
eight experts run on all tokens as two matrix products and the weights of the unselected six are zero: the
same function and gradients, four times the (cheap) arithmetic, no gather, and one balancing loss per layer.
What it does not do: generate or evaluate; that is left to transformers, on the saved checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

BALANCE, Z_LOSS = 0.01, 0.001
Pair = tuple[Tensor, Tensor]
Block = Callable[..., Pair]


def build(vocabulary: int, seed: int) -> MixtralForCausalLM:
    """5.9 million parameters, four fifths of them in the experts; every inner size divides by 64."""
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_aux_loss_coef=BALANCE,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.04,
    )
    torch.manual_seed(seed)
    return MixtralForCausalLM(config)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), 1e-5)


def rotary(length: int, head_dim: int, device: torch.device) -> Pair:
    """Cosines and sines of Mixtral's rotary embedding (base 10,000, halves not interleaved)."""
    inverse = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, device=device), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def attention(x: Tensor, module: Any, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = (
        functional.linear(x, projection.weight).view(batch, length, -1, head_dim).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return functional.linear(mixed.transpose(1, 2).reshape(batch, length, -1), module.o_proj.weight)


def route(x: Tensor, gate: Tensor) -> Pair:
    """Weight of each expert for each token (two nonzero, summing to one), and the layer's router losses."""
    logits = functional.linear(x, gate).float()
    probabilities = logits.softmax(-1)
    top, index = probabilities.topk(2, dim=-1)
    weights = torch.zeros_like(probabilities).scatter(-1, index, top / top.sum(-1, keepdim=True))
    experts = gate.shape[0]
    used = (weights > 0).float().mean((0, 1)) / 2
    balance = experts * (used.detach() * probabilities.mean((0, 1))).sum()
    z = logits.logsumexp(-1).square().mean()
    return weights, BALANCE * balance + Z_LOSS * z


def mixture(x: Tensor, module: Any) -> Pair:
    """All experts at once: weights of unselected experts are zero."""
    weights, router_loss = route(x, module.gate.weight)
    up_weight, down_weight = module.experts.gate_up_proj, module.experts.down_proj
    experts, hidden, inner = down_weight.shape
    both = functional.linear(x, up_weight.reshape(-1, hidden))
    gate, up = both.unflatten(-1, (experts, 2, inner)).unbind(-2)
    active = functional.silu(gate) * up * weights.to(gate.dtype).unsqueeze(-1)
    return functional.linear(active.flatten(-2), down_weight.transpose(0, 1).reshape(hidden, -1)), router_loss


def block(x: Tensor, layer: Any, cos: Tensor, sin: Tensor, head_dim: int, dropout: float) -> Pair:
    """One decoder layer; dropout on what each half adds to the residual stream."""
    normed = rms_norm(x, layer.input_layernorm.weight)
    x = x + functional.dropout(attention(normed, layer.self_attn, cos, sin, head_dim), dropout)
    added, router_loss = mixture(rms_norm(x, layer.post_attention_layernorm.weight), layer.mlp)
    return x + functional.dropout(added, dropout), router_loss


def head(x: Tensor, norm: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(rms_norm(x, norm), embedding)
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def language_loss(model: MixtralForCausalLM, tokens: Tensor, dropout: float, step: Block = block) -> Pair:
    """Cross entropy of each window's next tokens, and the router losses averaged over layers."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    body, head_dim = model.model, model.config.head_dim
    cos, sin = rotary(inputs.shape[1], head_dim, tokens.device)
    x = functional.dropout(functional.embedding(inputs, body.embed_tokens.weight), dropout)
    router_losses = []
    for layer in body.layers:
        x, router_loss = step(x, layer, cos, sin, head_dim, dropout)
        router_losses.append(router_loss)
    loss = head(x, body.norm.weight, body.embed_tokens.weight, labels)
    return loss, torch.stack(router_losses).mean()
