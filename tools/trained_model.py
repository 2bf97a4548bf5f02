"""The models that this project trains: their shapes, and a training forward pass over transformers' parameters.

What: `build` makes a transformers MixtralForCausalLM of one of `SHAPES`; `language_loss` computes its training
loss.
Why so: transformers' own forward selects tokens expert by expert, which at these sizes is bound by kernel
launches, and its balancing loss pools all layers, so that an expert can die in one layer unnoticed. Here all
experts run on all tokens as two matrix products and the weights of the unselected ones are zero: the same
function and gradients, more of the (cheap) arithmetic, no gather, and one balancing loss per layer.
What it does not do: generate or evaluate; that is left to transformers, on the saved checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

Z_LOSS = 0.001
Pair = tuple[Tensor, Tensor]
Block = Callable[..., Pair]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Mixtral whose linear layers all have inputs that divide by 64, the quantizers' group size."""

    layers: int
    hidden: int
    experts: int
    inner: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int = 32
    context: int = 1024
    initializer_range: float = 0.04


SHAPES = {
    "demo": Shape(layers=8, hidden=192, experts=8, inner=128, top_k=2, heads=6, kv_heads=2),
    "mid-8x2": Shape(layers=12, hidden=320, experts=8, inner=256, top_k=2, heads=10, kv_heads=2),
    "mid-32x4": Shape(layers=16, hidden=256, experts=32, inner=64, top_k=4, heads=8, kv_heads=2),
}


def build(shape: Shape, vocabulary: int, seed: int, balance: float) -> MixtralForCausalLM:
    """Fresh weights from the seed; `balance` is the load-balancing coefficient that the configuration states."""
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_aux_loss_coef=balance,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=shape.initializer_range,
    )
    torch.manual_seed(seed)
    return MixtralForCausalLM(config)


class Weights(NamedTuple):
    """One layer's parameters, as plain tensors so that one compiled block serves every layer.

    gate [E, H], gate_up [E, 2 I, H], down [E, H, I] for E experts, hidden size H, inner size I.
    """

    norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    expert_norm: Tensor
    gate: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, layer: Any) -> Weights:
        attention, experts = layer.self_attn, layer.mlp.experts
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        return cls(
            layer.input_layernorm.weight,
            *(projection.weight for projection in projections),
            layer.post_attention_layernorm.weight,
            layer.mlp.gate.weight,
            experts.gate_up_proj,
            experts.down_proj,
        )


class Rules(NamedTuple):
    """What a block needs to know besides tensors."""

    head_dim: int
    top_k: int
    balance: float
    dropout: float


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


def attention(x: Tensor, weights: Weights, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = (
        functional.linear(x, weight).view(batch, length, -1, head_dim).transpose(1, 2)
        for weight in (weights.q, weights.k, weights.v)
    )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return functional.linear(mixed.transpose(1, 2).reshape(batch, length, -1), weights.o)


def route(x: Tensor, gate: Tensor, rules: Rules) -> Pair:
    """Weight of each expert for each token (top_k nonzero, summing to one), and the layer's router losses."""
    logits = functional.linear(x, gate).float()
    probabilities = logits.softmax(-1)
    top, index = probabilities.topk(rules.top_k, dim=-1)
    weights = torch.zeros_like(probabilities).scatter(-1, index, top / top.sum(-1, keepdim=True))
    experts = gate.shape[0]
    used = (weights > 0).float().mean((0, 1)) / rules.top_k
    balance = experts * (used.detach() * probabilities.mean((0, 1))).sum()
    z = logits.logsumexp(-1).square().mean()
    return weights, rules.balance * balance + Z_LOSS * z


def mixture(x: Tensor, weights: Weights, rules: Rules) -> Pair:
    """All experts at once: weights of unselected experts are zero."""
    shares, router_loss = route(x, weights.gate, rules)
    experts, hidden, inner = weights.down.shape
    both = functional.linear(x, weights.gate_up.reshape(-1, hidden))
    gate, up = both.unflatten(-1, (experts, 2, inner)).unbind(-2)
    active = functional.silu(gate) * up * shares.to(gate.dtype).unsqueeze(-1)
    return functional.linear(active.flatten(-2), weights.down.transpose(0, 1).reshape(hidden, -1)), router_loss


def block(x: Tensor, weights: Weights, cos: Tensor, sin: Tensor, rules: Rules) -> Pair:
    """One decoder layer; dropout on what each half adds to the residual stream."""
    mixed = attention(rms_norm(x, weights.norm), weights, cos, sin, rules.head_dim)
    x = x + functional.dropout(mixed, rules.dropout)
    added, router_loss = mixture(rms_norm(x, weights.expert_norm), weights, rules)
    return x + functional.dropout(added, rules.dropout), router_loss


def head(x: Tensor, norm: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(rms_norm(x, norm), embedding)
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def language_loss(model: MixtralForCausalLM, tokens: Tensor, dropout: float, step: Block = block) -> Pair:
    """Cross entropy of each window's next tokens, and the router losses averaged over layers.

    tokens: [N, L + 1] int64. Both losses are scalars; the balancing coefficient is the configuration's.
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    body, config = model.model, model.config
    rules = Rules(config.head_dim, config.num_experts_per_tok, config.router_aux_loss_coef, dropout)
    cos, sin = rotary(inputs.shape[1], rules.head_dim, tokens.device)
    x = functional.dropout(functional.embedding(inputs, body.embed_tokens.weight), dropout)
    router_losses = []
    for layer in body.layers:
        x, router_loss = step(x, Weights.of(layer), cos, sin, rules)
        router_losses.append(router_loss)
    loss = head(x, body.norm.weight, body.embed_tokens.weight, labels)
    return loss, torch.stack(router_losses).mean()
