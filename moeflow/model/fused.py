"""The dense part of a decoding step in fewer launches: kernels in the place of small modules and functions.

A layer of transformers' Mixtral is 48 operations of torch around the products, each a kernel of a few microseconds on
any GPU; fused, 16. Replaced are RMS norms and rotary positions, where they equal transformers' own on random numbers;
the growth of a static cache; and attention, where transformers asks its interface for it. All only inside
`Fused.active()`: the model, and the modules that it shares with others, are afterwards as they were. A captured graph
keeps what was recorded inside and needs none of it. What the kernels do not take goes to transformers' own code, from
inside as well. At the first pass with a new cache transformers cannot say how long it is: attention is its own then, so
that a warm-up has two passes.

Threads: one pass at a time in a process is inside (`active` waits); what another thread computes meanwhile with the
same modules goes to transformers' own code. Prefill stays outside. No model's forward pass is written here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moeflow.kernels.attention import Attention
from moeflow.kernels.launcher import Launcher
from moeflow.model.fused_attention import NAME, register
from moeflow.model.fused_parts import Scope, fuse_cache, fuse_norms, fuse_rotary
from moeflow.model.fused_router import fuse_routers
from moeflow.model.inputs import Inputs

__all__ = ["Fused", "fuse"]

_ABSENT = object()
_turn = threading.RLock()
_active: Fused | None = None


def _current() -> Fused | None:
    """Who is active in this thread."""
    fused = _active
    return fused if fused is not None and fused.scope.entered else None


class Fused:
    """What was replaced in one model, with one cache."""

    def __init__(self, launcher: Launcher, cache: Any, dtype: torch.dtype, inputs: Inputs):
        self.scope, self.cache = Scope(launcher, dtype, inputs), cache
        self.attention = Attention(launcher)
        self.implementation = ""
        self.replaced: dict[str, int] = {}
        """How many of what."""
        self.kept: dict[str, str] = {}
        """What was left to transformers, and why; grows when a pass meets something that was not foreseen."""
        self._patches: list[tuple[Any, str, Any]] = []  # owner, attribute, replacement

    def declined(self, part: str, reason: str) -> None:
        """Take note that `part` is, or was once, left to transformers."""
        self.kept.setdefault(part, reason)

    def replace(self, part: str, owner: Any, name: str, replacement: Any) -> None:
        """Let `owner.name` be `replacement` while active."""
        self._patches.append((owner, name, replacement))
        self.replaced[part] = self.replaced.get(part, 0) + 1

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """For passes of at most eight tokens of one sequence; waits for whoever else is inside."""
        global _active
        with _turn:
            if self.scope.entered:
                yield
                return
            before = _active
            saved = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in self._patches]
            try:
                _active, self.scope.thread = self, threading.get_ident()
                for owner, name, replacement in self._patches:
                    setattr(owner, name, replacement)
                yield
            finally:
                for owner, name, value in saved:
                    if value is _ABSENT:
                        vars(owner).pop(name, None)
                    else:
                        setattr(owner, name, value)
                _active, self.scope.thread = before, None

    def __str__(self) -> str:
        parts = [f"{count} {part}" for part, count in self.replaced.items()]
        kept = [f"{part} not ({reason})" for part, reason in self.kept.items()]
        return f"fused: {', '.join(parts) or 'nothing'}" + (f"; {'; '.join(kept)}" if kept else "")


@torch.inference_mode()
def fuse(model: nn.Module, launcher: Launcher, cache: Any, inputs: Inputs | None = None) -> Fused:
    """Replace what can be replaced in `model`'s decoding steps with the static `cache`.

    Args:
        model: transformers'.
        launcher: runs the kernels.
        cache: whose layers grow.
        inputs: what the model's packed layers share; None: nothing is packed.
    """
    dtype = next((p.dtype for p in model.parameters() if p.dim() == 2), torch.float32)
    fused = Fused(launcher, cache, dtype, inputs or Inputs())
    with _turn:  # nobody else's replacement is to be taken for transformers' own
        fuse_norms(fused, model)
        fuse_routers(fused, model)
        fuse_rotary(fused, model)
        fuse_cache(fused)
        _fuse_attention(fused, model)
    return fused


def _fuse_attention(fused: Fused, model: Any) -> None:
    from transformers.cache_utils import StaticLayer

    config = model.config.get_text_config()
    fused.implementation = config._attn_implementation or "eager"
    other = next((type(layer).__name__ for layer in fused.cache.layers if type(layer) is not StaticLayer), None)
    if other is not None:
        fused.declined("attention", f"the cache has a {other}")
    elif not getattr(model, "_supports_attention_backend", False):
        fused.declined("attention", "the model does not ask transformers' interface for it")
    else:
        register(_current)
        configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
        for one in {id(c): c for c in configs if hasattr(c, "_attn_implementation_internal")}.values():
            fused.replace("attention", one, "_attn_implementation_internal", NAME)
        fused.replaced["attention"] = len(fused.cache.layers)
