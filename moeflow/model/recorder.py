"""Which experts every token used, noted where a layer's experts are run, on the device and without waiting for it.

A decoding step on a GPU is a graph that is replayed without Python, so what it notes must be part of it: two small
kernels per layer write ids and weights to a buffer at a fixed address. The buffer is copied, again on the device, once
a pass was computed; the host reads all passes when it asks. Engines that were not asked to record have no recorder.
It keeps neither tokens nor text, and knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeflow.kernels.gemv import MOST_TOKENS
from moeflow.offload.trace import Routes

__all__ = ["Recorder", "RouteRecorder"]


class Recorder(Protocol):
    """Is told of every layer of every pass."""

    def note(self, layer: int, hidden_states: Tensor, index: Tensor, weights: Tensor, /) -> None:
        """What a layer is about to run: hidden states [T, H], expert ids and the router's weights, [T, K] each."""

    def end(self, tokens: int, /) -> None:
        """A pass of so many tokens was computed or replayed, and counts; others are noted over."""


@dataclass(frozen=True)
class _Noted:
    """Of one pass."""

    ids: Tensor  # int16 [T, L, K]
    weights: Tensor  # float32 [T, L, K]


class RouteRecorder:
    """Takes note of all layers of a pass, and keeps passes between `start` and `stop`."""

    def __init__(self, layers: int, top_k: int, device: torch.device):
        self._layers, self._top_k, self._device = layers, top_k, device
        self._few = self._room(MOST_TOKENS)  # no captured step has more tokens
        self._many: _Noted | None = None
        self._kept: list[_Noted] = []
        self._active = False
        self.listener: Recorder | None = None
        """Is told the same, of passes of more tokens than are captured."""

    def _room(self, tokens: int) -> _Noted:
        shape = (tokens, self._layers, self._top_k)
        ids = torch.empty(shape, dtype=torch.int16, device=self._device)
        return _Noted(ids, torch.empty(shape, dtype=torch.float32, device=self._device))

    def note(self, layer: int, hidden_states: Tensor, index: Tensor, weights: Tensor) -> None:
        """As `Recorder.note`. May be captured."""
        tokens = index.shape[0]
        if self.listener is not None and tokens > MOST_TOKENS:
            self.listener.note(layer, hidden_states, index, weights)
        if tokens > MOST_TOKENS and layer == 0:
            self._many = self._room(tokens)
        target = self._few if tokens <= MOST_TOKENS else self._many
        assert target is not None, "layers come in order"
        # Kernels both: a copy between equal dtypes may be the copy engine's, which is busy.
        target.ids[:tokens, layer].copy_(index)
        torch.add(weights, 0, out=target.weights[:tokens, layer])

    def end(self, tokens: int) -> None:
        """As `Recorder.end`."""
        many, self._many = self._many, None
        if self.listener is not None and tokens > MOST_TOKENS:
            self.listener.end(tokens)
        if not self._active:
            return
        if tokens > MOST_TOKENS:
            assert many is not None
            self._kept.append(many)
        else:  # added, not copied, as above
            self._kept.append(_Noted(self._few.ids[:tokens] + 0, self._few.weights[:tokens] + 0))

    def start(self) -> None:
        """Keep what passes note from now on, and nothing older."""
        self._kept.clear()
        self._active = True

    def stop(self) -> None:
        """Keep nothing more, and forget what was not taken."""
        self._kept.clear()
        self._active = False

    @torch.inference_mode()
    def take(self) -> Routes:
        """The routes [T, L, K] of the passes kept so far, which are forgotten; waits for them to end.

        By the router's weights, heaviest first: not every family's router gives its choice in that order.
        """
        kept, self._kept = self._kept, []
        if self._device.type == "cuda":  # a read would keep the driver from the thread that feeds the pass
            torch.cuda.current_stream(self._device).synchronize()
        empty = [torch.empty(0, self._layers, self._top_k, dtype=torch.int16, device=self._device)]
        ids = torch.cat([noted.ids for noted in kept] or empty)
        if kept:
            order = torch.cat([noted.weights for noted in kept]).argsort(dim=-1, descending=True, stable=True)
            ids = ids.gather(-1, order)
        routes: Routes = ids.cpu().numpy()
        return routes
