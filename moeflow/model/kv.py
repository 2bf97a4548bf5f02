"""KV caches as the engine hands them out: one that grows, or one of fixed size that a CUDA graph can be bound to.

The fixed one exists once per engine, because a graph holds its addresses and the plan its size. Whoever asks for a new
cache gets it emptied, and the one before loses it (`stale`): a session then computes its tokens anew.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

from moeflow.errors import DeviceError

__all__ = ["KvCache", "GrowingKv", "StaticKv", "cache_argument", "make_static"]


def cache_argument(model: Any) -> str:
    """The name under which `model` takes its cache: transformers 5.23 and older say `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class KvCache(Protocol):
    """Keys and values of the tokens computed so far."""

    length: int
    """Tokens in it."""
    cache: Any
    """transformers' cache."""

    @property
    def stale(self) -> bool:
        """Whether its memory was given to another."""

    def crop(self, length: int) -> bool:
        """Forget all tokens from `length` on; False if this cache cannot, and is to be replaced."""


class GrowingKv:
    """transformers' DynamicCache."""

    stale = False

    def __init__(self, config: Any):
        from transformers import DynamicCache

        self.length = 0
        self.cache = DynamicCache(config=config)

    def crop(self, length: int) -> bool:
        """Forget all tokens from `length` on."""
        if length < self.length:
            try:
                self.cache.crop(length - self.length)  # negative: that many are removed, in all versions
            except RuntimeError:  # what a sliding window or a Mamba state has forgotten cannot be restored
                return False
            self.length = length
        return True


class StaticKv:
    """A lease of the engine's one StaticCache."""

    def __init__(self, cache: Any, previous: StaticKv | None = None):
        self.cache = cache
        self.length = 0
        self.stale = False
        if previous is not None:
            previous.stale = True
        with torch.inference_mode():  # in which its tensors were made
            cache.reset()

    @torch.inference_mode()
    def crop(self, length: int) -> bool:
        """Forget all tokens from `length` on: what lies behind the position is never read."""
        if length == self.length:
            return True
        positions = [_position(layer) for layer in self.cache.layers]
        if any(position is None for position in positions):
            return False
        for position in positions:
            assert position is not None
            position.fill_(length)
        self.length = length
        return True


def _position(layer: Any) -> Tensor | None:
    """The tensor that holds a full-attention layer's length; None for layers that keep a window or a state."""
    position = getattr(layer, "cumulative_length", None)
    return position if isinstance(position, Tensor) and not getattr(layer, "is_sliding", False) else None


def make_static(config: Any, length: int, device: torch.device) -> Any:
    """transformers' StaticCache for `length` tokens; its memory is allocated at the first pass.

    Raises:
        DeviceError: a layer keeps a state that is no plain list of positions.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=config, max_cache_len=length)
    # A window's layer counts in Python, which a graph cannot replay; a whole layer under its mask gives the same.
    cache.layers = [StaticLayer(length) if type(y) is StaticSlidingWindowLayer else y for y in cache.layers]
    if other := next((type(y).__name__ for y in cache.layers if type(y) is not StaticLayer), None):
        raise DeviceError(f"this model's KV cache has layers ({other}) whose state a CUDA graph cannot replay")
    for layer in cache.layers:
        if isinstance(position := getattr(layer, "cumulative_length", None), Tensor):
            layer.cumulative_length = position.to(device)
    return cache
