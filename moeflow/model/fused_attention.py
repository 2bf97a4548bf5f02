"""Decode attention as transformers finds it: a function under a name, and in place of the mask a word about it.

transformers asks the mask function of `config._attn_implementation` for a mask, hands what it gets through the layers
untouched, and calls the attention function with it. For a decoding step over the engine's static cache the mask here is
a `DecodeMask`: no tensor, but which window the step sees, read from the very function that would have filled the mask.
The attention function meets it with the key/value length that the cache's layer keeps on the device: transformers moves
`cumulative_length` on before it attends, so it counts the step's own tokens. A `DecodeMask` is made only where the
query's offset that transformers passes is the length of the engine's cache itself; so a pass with another cache, with
padding, or with packed or chunked sequences gets the usual mask and the usual attention.

What the kernel does not take (wide heads, other dtypes, unknown arguments) turns the word into the mask it stands for.
Nothing here is installed until `model.fused` says so.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from moeflow.kernels.attention import MOST_TOKENS, Attention, Fresh
from moeflow.model.deferred import Appended, Deferred, Rotated

__all__ = ["NAME", "AttentionState", "DecodeMask", "register", "window_of"]

NAME = "moeflow"
# Arguments that change nothing, or that the kernel knows. Any other with a value means another kind of attention.
HARMLESS = frozenset({
    "position_ids", "use_cache", "cache_position", "sliding_window", "s_aux", "past_key_values", "output_router_logits",
    "position_embeddings", "logits_to_keep", "return_dict",
})  # fmt: skip


class AttentionState(Protocol):
    """What the two functions must know about whoever is active."""

    cache: Any
    """transformers' StaticCache."""
    attention: Attention
    implementation: str
    """Under which name transformers finds the model's own attention."""

    def declined(self, part: str, reason: str) -> None:
        """Take note that a call went to the model's own attention."""


class DecodeMask:
    """Stands for the mask of a decoding step: each token sees those before it, at most `window` with itself."""

    def __init__(self, window: int | None, function: Callable[..., Tensor | None], arguments: Mapping[str, Any]):
        self.window = window
        self._function, self._arguments = function, arguments

    def tensor(self, tokens: int) -> Tensor | None:
        """The mask itself, for a layer that has taken the step's tokens into the cache."""
        offset = self._arguments["q_offset"] - tokens  # the offset is the cache's length, which has moved on since
        return self._function(**{**self._arguments, "q_offset": offset})


def window_of(mask_function: Callable[..., Any]) -> int | None:
    """The window of transformers' causal or sliding mask function; None for all positions.

    Raises:
        ValueError: it is another function.
    """
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return None
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    if len(parts) == 2 and masking_utils.causal_mask_function in parts:
        overlay = next(part for part in parts if part is not masking_utils.causal_mask_function)
        window = inspect.getclosurevars(overlay).nonlocals.get("sliding_window")
        if isinstance(window, int) and overlay.__qualname__.startswith("sliding_window_overlay."):
            return window
    raise ValueError("neither causal nor a sliding window")


def _mask(state: AttentionState | None, arguments: Mapping[str, Any]) -> Any:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    function = ALL_MASK_ATTENTION_FUNCTIONS[state.implementation if state else "sdpa"]
    usual = arguments.get("attention_mask") is not None or arguments.get("use_vmap") or arguments["batch_size"] != 1
    offset = arguments.get("q_offset")
    lengths = (layer.cumulative_length for layer in state.cache.layers) if state else ()
    if usual or arguments["q_length"] > MOST_TOKENS or not any(offset is length for length in lengths):
        return function(**arguments)
    try:
        return DecodeMask(window_of(arguments["mask_function"]), function, arguments)
    except ValueError:
        return function(**arguments)


def _attend(
    state: AttentionState | None, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if isinstance(mask, DecodeMask):
        assert state is not None, "a pass goes on outside of what it began in"
        layer = state.cache.layers[module.layer_idx]
        found = _by_kernel(state, layer, query, key, value, mask.window, options)
        if isinstance(found, Tensor):
            return found, None
        query, key, value = (x.finish() if isinstance(x, Deferred) else x for x in (query, key, value))
        state.declined("attention", found)
        mask = mask.tensor(query.shape[2])
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(state.implementation if state else "sdpa", own)
    result: tuple[Tensor, Tensor | None] = function(module, query, key, value, mask, **options)
    return result


def _by_kernel(
    state: AttentionState, layer: Any, query: Tensor, key: Tensor, value: Tensor, window: int | None,
    options: Mapping[str, Any],
) -> Tensor | str:  # fmt: skip
    """Attention, with rotation and growth where they were put off for it; or why the kernel cannot."""
    length, sinks = layer.cumulative_length, options.get("s_aux")
    fresh = _fresh(query, key, layer)
    if fresh is not None:
        assert isinstance(query, Deferred) and isinstance(query.recipe, Rotated)
        q, k, v = query.recipe.x, layer.keys, layer.values
    else:
        q, k, v = (x.finish() if isinstance(x, Deferred) else x for x in (query, key, value))
    reason = _unknown(options) or Attention.refuses(q, k, v, length, sinks)
    if reason is None and k.shape[2] != layer.max_cache_len:
        reason = f"keys of {k.shape[2]} positions"
    if reason is not None:
        return reason
    scaling = options.get("scaling")
    scaling = q.shape[3] ** -0.5 if scaling is None else scaling
    found = state.attention(q, k, v, length, scaling, window, sinks, fresh)
    if fresh is not None:
        assert isinstance(key, Deferred)
        key.done()
    return found


def _fresh(query: Tensor, key: Tensor, layer: Any) -> Fresh | None:
    """What the kernel needs to rotate and append by itself, where nobody has done it yet."""
    turned = query.recipe if isinstance(query, Deferred) else None
    grown = key.recipe if isinstance(key, Deferred) else None
    if (
        not isinstance(turned, Rotated)
        or not isinstance(grown, Appended)
        or grown.length is not layer.cumulative_length
    ):
        return None
    if turned.cos is not grown.key.cos or turned.sin is not grown.key.sin:
        return None
    fresh = Fresh(grown.key.x, grown.value, turned.cos, turned.sin)
    return fresh if Attention.refuses_fresh(turned.x, layer.keys, fresh) is None else None


def _unknown(options: Mapping[str, Any]) -> str | None:
    """What asks for another kind of attention than the kernel's."""
    known = HARMLESS | {"scaling", "dropout", "is_causal"}
    others = [name for name, value in options.items() if name not in known and value is not None and value is not False]
    if options.get("dropout"):
        others.append("dropout")
    if options.get("is_causal") is False:
        others.append("is_causal=False")
    return f"called with {', '.join(others)}" if others else None


def register(current: Callable[[], AttentionState | None]) -> None:
    """Make both functions known to transformers under `NAME`; `current` says who is active in this thread."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def mask(**arguments: Any) -> Any:
        return _mask(current(), arguments)

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        return _attend(current(), module, query, key, value, attention_mask, **options)

    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
