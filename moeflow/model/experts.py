"""The experts function that transformers calls in place of its own, and what it does: fetch, compute, sum.

transformers hands over a layer's hidden states with the router's choice; this fetches the chosen experts
through the cache, or streams whole layers when many tokens need most of them, and computes each on the tokens
that chose it. Results are summed in the router's order, whatever order the experts arrived in, so that cache
size, policy and guesses cannot change a single bit of the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moeflow.artifact.matrix import dequantize, parts_of
from moeflow.kernels.launcher import Launcher
from moeflow.kernels.unpack import unpack
from moeflow.model.routes import ForcedRoutes
from moeflow.offload.cache import ExpertCache
from moeflow.offload.device import DeviceCache
from moeflow.offload.predictor import NextGate
from moeflow.offload.stream import LayerStream
from moeflow.schema import BlobLayout, Manifest, PackedMatrix, Plan

__all__ = ["ExpertRunner", "IMPLEMENTATION", "offloaded_experts"]

IMPLEMENTATION = "moeflow"
# Streaming moves all experts of a layer, fetching only those needed; with this many choices per expert a uniform
# router touches 1 - exp(-2) = 86% of them.
STREAM_CHOICES_PER_EXPERT = 2


class ExpertRunner:
    """Runs the experts of all layers; one per engine."""

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        cache: ExpertCache | DeviceCache,
        stream: LayerStream | None,
        dtype: torch.dtype,
        launcher: Launcher | None = None,
        always_stream: bool = False,
    ):
        """With a launcher, blobs are unpacked by a kernel; a cache that only the device reads needs `always_stream`."""
        self.manifest = manifest
        self.plan = plan
        self.cache = cache
        self.stream = stream
        self.dtype = dtype
        self._launcher = launcher
        self._always_stream = always_stream or plan.strategy == "naive"
        self.predictor: NextGate | ForcedRoutes | None = None
        self.routes: ForcedRoutes | None = None

    def run(self, layer: int, module: Any, hidden_states: Tensor, top_k_index: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            layer: position among the MoE layers.
            module: transformers' experts module; gives the activation.
            hidden_states: [T, H].
            top_k_index: [T, K] expert ids.
            weights: [T, K] of the router.

        Returns:
            [T, H] in the dtype of `hidden_states`.
        """
        if self.routes is not None:
            top_k_index = self.routes.chosen(layer, top_k_index)
        tokens, top_k = top_k_index.shape
        stream = self._stream_for(layer, top_k_index.numel())
        chosen, guesses = self._ids(layer, hidden_states, top_k_index, guess=stream is None)
        groups = _Groups(chosen, top_k, top_k_index.device)
        outputs = hidden_states.new_empty(tokens * top_k, hidden_states.shape[1])  # [T * K, H]
        flat_weights = weights.reshape(-1, 1)
        layout = self.manifest.layout_of(layer)
        for expert, blob in self._blobs(layer, stream, groups.experts, chosen, guesses):
            users, choices = groups.of(expert)
            result = self._expert(module, layout, blob, hidden_states[users])
            outputs[choices] = (result * flat_weights[choices]).to(outputs.dtype)
        return outputs.view(tokens, top_k, -1).sum(dim=1)

    def reset(self) -> None:
        """Start with a cold cache, after a pass that was abandoned midway; no copy may be under way."""
        self.cache.reset()
        if self.stream is not None:
            self.stream.reset()

    def _ids(
        self, layer: int, hidden_states: Tensor, index: Tensor, guess: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The chosen ids, flat, and guesses for later layers: one transfer from the device for both."""
        if self.predictor is None or not guess:
            return index.flatten().tolist(), []
        guessed = self.predictor.guess(layer, hidden_states)
        flat = torch.cat([index.flatten(), *(g.T.flatten() for g in guessed)]).tolist()  # first choices first
        guesses: dict[tuple[int, int], None] = {}
        start = index.numel()
        for ahead, ids in enumerate(guessed, start=1):
            guesses.update(dict.fromkeys((layer + ahead, e) for e in flat[start : start + ids.numel()]))
            start += ids.numel()
        return flat[: index.numel()], list(guesses)

    def _stream_for(self, layer: int, choices: int) -> LayerStream | None:
        """The stream, if the layer shall go through it whole."""
        many = choices >= STREAM_CHOICES_PER_EXPERT * self.manifest.layers[layer].experts
        return self.stream if many or self._always_stream else None

    def _blobs(
        self,
        layer: int,
        stream: LayerStream | None,
        needed: Sequence[int],
        chosen: Sequence[int],
        guesses: Sequence[tuple[int, int]],
    ) -> Iterator[tuple[int, Tensor]]:
        if stream is None:
            assert isinstance(self.cache, ExpertCache), "a cache that only the device reads is streamed beside"
            return self.cache.fetch(layer, needed, guesses)
        return self._streamed(stream, layer, needed, chosen)

    def _streamed(
        self, stream: LayerStream, layer: int, needed: Sequence[int], chosen: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Needed experts from the layer's buffer, while the next layer is on its way; then the cache is warmed."""
        cached = self.cache.resident(layer)
        stream.begin(layer, cached)
        if layer + 1 < len(self.manifest.layers):
            stream.begin(layer + 1, self.cache.resident(layer + 1))
        blobs = {}
        for expert, blob in stream.take(layer, needed, cached):
            blobs[expert] = blob
            yield expert, blob
        recent = list(dict.fromkeys(reversed(chosen)))[: self.plan.cache_slots[layer]]
        self.cache.warm(layer, [(e, blobs[e]) for e in reversed(recent)])

    def _expert(self, module: Any, layout: BlobLayout, blob: Tensor, x: Tensor) -> Tensor:
        """One expert on its tokens x [t, H]."""
        (gate_up, gate_up_bias), (down, down_bias) = (self._matrix(m, blob) for m in layout.matrices)
        return functional.linear(module._apply_gate(functional.linear(x, gate_up, gate_up_bias)), down, down_bias)

    def _matrix(self, matrix: PackedMatrix, blob: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        bias = parts_of(matrix, blob)["bias"].to(self.dtype) if matrix.bias else None
        return self._weights(matrix, blob), bias

    def _weights(self, matrix: PackedMatrix, blob: Tensor) -> Tensor:
        if self._launcher is not None:
            return unpack(self._launcher, matrix, blob, self.dtype)
        return dequantize(matrix, parts_of(matrix, blob), self.dtype)


Rows = Tensor | slice


class _Groups:
    """Tokens by expert."""

    def __init__(self, chosen: list[int], top_k: int, device: torch.device):
        places: dict[int, list[int]] = {}
        for position, expert in enumerate(chosen):
            places.setdefault(expert, []).append(position)
        self.experts = sorted(places)
        self._places = places
        self._ranges: dict[int, slice] = {}
        # one token: slices need no index on the device, whose transfer would stall decoding; but a router that goes by
        # a table (DeepSeek-V4) may name an expert twice
        if len(chosen) == top_k == len(places):
            return
        end = 0
        for expert in self.experts:
            self._ranges[expert] = slice(end, end := end + len(places[expert]))
        self._choices = torch.tensor([p for e in self.experts for p in places[e]], device=device)  # [T * K]
        self._users = self._choices // top_k

    def of(self, expert: int) -> tuple[Rows, Rows]:
        """Rows of the hidden states [T] that chose `expert`, and their places among the flat choices [T * K]."""
        if not self._ranges:
            place = self._places[expert][0]
            return slice(0, 1), slice(place, place + 1)
        span = self._ranges[expert]
        return self._users[span], self._choices[span]


def offloaded_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Registered with transformers; finds the layer's runner on the module."""
    runner, layer = module.moeflow
    result: Tensor = runner.run(layer, module, hidden_states, top_k_index, top_k_weights)
    return result
