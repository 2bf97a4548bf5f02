"""What planning takes from a config, against transformers' own cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny_unlisted
from tiny_families import UNLISTED
from torch import Tensor

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.facts import STATE_TOKENS, ModelConfig
from moeflow.model.kv import cache_argument

STATEFUL = {"jamba", "lfm2_moe"}
SLIDING = {"gpt_oss", "dots1"}
SPARSE = {"deepseek_v32", "glm_moe_dsa"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_cache_holds_as_much_as_is_planned(
    checkpoint_factory: Callable[..., Path], reference: Callable[[Path], Any], family: str
) -> None:
    checkpoint = checkpoint_factory(family, layers=3)
    planned = Checkpoint.open(checkpoint).kv_values_per_token
    held = _held(reference(checkpoint))
    if family in STATEFUL | SLIDING:
        assert held <= planned * STATE_TOKENS
    else:
        assert held == planned * STATE_TOKENS


@pytest.mark.parametrize("name", UNLISTED)
def test_unlisted_families_hold_no_more_than_is_planned(tmp_path: Path, name: str) -> None:
    import transformers
    from oracle import checkpoint_model
    from packaging.version import Version

    try:
        checkpoint = tiny_unlisted(tmp_path, name)
    except ValueError:
        pytest.skip("newer than this transformers")
    if name in SPARSE and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("5.17 keeps whole keys and values, 5.23 latent ones")
    planned = Checkpoint.open(checkpoint).kv_values_per_token
    assert _held(checkpoint_model(checkpoint)) <= planned * STATE_TOKENS


def _held(model: Any) -> int:
    """Numbers in the cache after `STATE_TOKENS` tokens."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.ones(1, STATE_TOKENS, dtype=torch.long), use_cache=True, **{cache_argument(model): cache})
    return sum(_count(value) for layer in cache.layers for value in vars(layer).values())


def _count(value: Any) -> int:
    """Numbers in the tensors of a cache layer."""
    if isinstance(value, Tensor):
        return value.numel() if value.dim() > 1 else 0  # sliding windows keep their width as a tensor
    return sum(_count(v) for v in value.values()) if isinstance(value, dict) else 0


def test_every_layer_may_have_its_own_numbers() -> None:
    facts = ModelConfig({"moe_topk": [1, 4, 2], "num_experts": [8, 16]}, Path("config.json"))
    assert (facts.top_k, facts.experts) == (4, 16)


def test_layers_of_an_unknown_kind_count_as_attention() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    known = ModelConfig({**sizes, "layer_types": ["full_attention"] * 2}, Path("config.json"))
    unknown = ModelConfig({**sizes, "layer_types": ["full_attention", "novel"]}, Path("config.json"))
    assert unknown.kv_values_per_token == known.kv_values_per_token == 2 * 2 * 64
