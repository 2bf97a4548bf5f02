"""What planning takes from a config, against transformers' own cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES
from torch import Tensor

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.facts import STATE_TOKENS, ModelConfig

STATEFUL = {"jamba", "lfm2_moe"}
SLIDING = {"gpt_oss", "dots1"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_cache_holds_as_much_as_is_planned(
    checkpoint_factory: Callable[..., Path], reference: Callable[[Path], Any], family: str
) -> None:
    from transformers import DynamicCache

    checkpoint = checkpoint_factory(family, layers=3)
    planned = Checkpoint.open(checkpoint).kv_values_per_token
    model = reference(checkpoint)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.ones(1, STATE_TOKENS, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(_count(value) for layer in cache.layers for value in vars(layer).values())
    if family in STATEFUL | SLIDING:
        assert held <= planned * STATE_TOKENS
    else:
        assert held == planned * STATE_TOKENS


def _count(value: Any) -> int:
    """Numbers in the tensors of a cache layer."""
    if isinstance(value, Tensor):
        return value.numel()
    return sum(_count(v) for v in value.values()) if isinstance(value, dict) else 0


def test_every_layer_may_have_its_own_numbers() -> None:
    facts = ModelConfig({"moe_topk": [1, 4, 2], "num_experts": [8, 16]}, Path("config.json"))
    assert (facts.top_k, facts.experts) == (4, 16)


def test_layers_of_an_unknown_kind_count_as_attention() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    known = ModelConfig({**sizes, "layer_types": ["full_attention"] * 2}, Path("config.json"))
    unknown = ModelConfig({**sizes, "layer_types": ["full_attention", "novel"]}, Path("config.json"))
    assert unknown.kv_values_per_token == known.kv_values_per_token == 2 * 2 * 64
