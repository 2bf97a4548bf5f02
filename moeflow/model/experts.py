"""The experts function that transformers calls in place of its own, and what it does: fetch, compute, sum.

transformers hands over a layer's hidden states with the router's choice; this fetches the chosen experts
through the cache, or streams whole layers when many tokens need most of them, and computes each on the tokens
that chose it. Results are summed in the router's order, whatever order the experts arrived in, so that cache
size, policy and guesses cannot change a single bit of the output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeflow.artifact.matrix import dequantize, parts_of
from moeflow.kernels.launcher import Launcher
from moeflow.kernels.publish import Publisher
from moeflow.kernels.unpack import Unpacker, Workspace
from moeflow.model.cpu_experts import CpuExperts, Work
from moeflow.model.recorder import Recorder
from moeflow.model.routes import ForcedRoutes
from moeflow.offload.cache import ExpertCache
from moeflow.offload.device import DeviceCache
from moeflow.offload.in_place import InPlace
from moeflow.offload.predictor import Guesser, Keeper
from moeflow.offload.stream import LayerStream
from moeflow.schema import Manifest, PackedMatrix, Plan

__all__ = ["ExpertRunner", "IMPLEMENTATION", "multiply", "offloaded_experts"]

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
        workspace: Workspace | None = None,
        always_stream: bool = False,
        in_place: InPlace | None = None,
        cpu: CpuExperts | None = None,
    ):
        """With a launcher, blobs are unpacked by a kernel, into `workspace`; a cache that only the device reads needs
        `always_stream`. On a CPU, experts `in_place` are not copied, and `cpu` multiplies by kernels."""
        self.manifest = manifest
        self.plan = plan
        self.cache = cache
        self.stream = stream
        self.dtype = dtype
        self._workspace = workspace
        self._in_place, self._cpu = in_place, cpu
        self._unpackers: Sequence[Sequence[Callable[[Tensor, Workspace | None], Tensor] | None]] | None = None
        self._read: Callable[[Tensor], list[int]] = Tensor.tolist
        if launcher is not None and isinstance(cache, DeviceCache):
            self._read = Publisher(launcher, cache.device)
        if launcher is not None:
            self._unpackers = [[Unpacker(launcher, m, dtype) for m in y.matrices] for y in manifest.layouts]
        elif cpu is not None:
            self._unpackers = cpu.unpackers
        self._cached: Sequence[Mapping[int, Tensor]] | None = None  # as the pass under way found the cache
        self._always_stream = always_stream or plan.strategy == "naive"
        self.predictor: Guesser | ForcedRoutes | None = None
        self.routes: ForcedRoutes | None = None
        self.recorder: Recorder | None = None
        self.keeper: Keeper | None = None
        """Of the policy `learned`."""

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
        if self.recorder is not None:
            self.recorder.note(layer, hidden_states, top_k_index, weights)
        choices = top_k_index.numel()
        stream = self._stream_for(layer, choices)
        if stream is not None:  # before anything waits for the router: the link is not to wait with it
            if self._cached is None:
                self.expect(choices)
            self._begin(layer, choices)
            self._begin(layer + 1, choices)
        groups = _Groups(hidden_states, top_k_index)
        chosen, guesses = self._ids(layer, hidden_states, top_k_index, guess=stream is None)
        groups.split(chosen)
        here = self._in_place.take(layer, groups.experts) if self._in_place is not None else {}
        self._together(module, layer, here, groups)
        others = [expert for expert in groups.experts if expert not in here]
        for expert, blob in self._blobs(layer, stream, others, chosen, guesses):
            layout = self.manifest.layers[layer].layout_of(expert)
            self._expert(module, layout, blob, groups.inputs(expert), groups.results(expert))
        if layer + 1 == len(self.manifest.layers):
            self._cached = None
        return groups.sum(weights)

    def expect(self, choices: int) -> None:
        """A pass begins in which every layer makes so many choices: copies of its first layers start here.

        To be called before the model, so that they travel while the first layer's attention is computed; a pass that
        is not announced starts them when it comes to them.
        """
        self._cached = self.cache.residents()
        if self._in_place is not None:
            self._cached = [{**blobs, **self._in_place.all(layer)} for layer, blobs in enumerate(self._cached)]
        self._begin(0, choices)
        self._begin(1, choices)

    def reset(self) -> None:
        """Start with a cold cache, after a pass that was abandoned midway; no copy may be under way."""
        self.cache.reset()
        self._cached = None
        if self.stream is not None:
            self.stream.reset()

    def _ids(
        self, layer: int, hidden_states: Tensor, index: Tensor, guess: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The chosen ids, flat, and guesses for later layers; one transfer for these and the cache's scores."""
        guessed = self.predictor.guess(layer, hidden_states) if self.predictor is not None and guess else []
        parts = [index.flatten(), *(g.T.flatten() for g in guessed)]  # first choices first
        if self.keeper is not None:
            parts.append(self.keeper(layer, hidden_states).view(torch.int32).to(torch.int64))  # bits, among integers
        flat = self._read(torch.cat(parts) if len(parts) > 1 else parts[0])
        if self.keeper is not None and isinstance(self.cache, ExpertCache):
            self.cache.judge(layer, np.array(flat[-len(parts[-1]) :], np.int32).view(np.float32).tolist())
        guesses: dict[tuple[int, int], None] = {}
        start = index.numel()
        for ahead, ids in enumerate(guessed, start=1):
            guesses.update(dict.fromkeys((layer + ahead, e) for e in flat[start : start + ids.numel()]))
            start += ids.numel()
        return flat[: index.numel()], list(guesses)

    def _stream_for(self, layer: int, choices: int) -> LayerStream | None:
        """The stream, if the layer shall go through it whole."""
        if self._in_place is not None and self._in_place.whole(layer):
            return None
        many = choices >= STREAM_CHOICES_PER_EXPERT * self.manifest.layers[layer].experts
        return self.stream if many or self._always_stream else None

    def _begin(self, layer: int, choices: int) -> None:
        """Start copying what a layer lacks, if there is such a layer and it goes through the stream."""
        stream = self._stream_for(layer, choices) if layer < len(self.manifest.layers) else None
        if stream is not None:
            assert self._cached is not None
            stream.begin(layer, self._cached[layer])

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
        """Needed experts from the layer's buffer, while the next layer is on its way.

        Then the cache is warmed, and the buffer is given to the layer after next at once: what was issued until here
        is all that still reads it.
        """
        assert self._cached is not None
        blobs = {}
        for expert, blob in stream.take(layer, needed, self._cached[layer]):
            blobs[expert] = blob
            yield expert, blob
        hot = self.plan.hot_experts[layer] if self.plan.hot_experts else None  # nobody else would be kept
        last_first = [e for e in dict.fromkeys(reversed(chosen)) if hot is None or e in hot]
        recent = last_first[: self.plan.cache_slots[layer]]
        self.cache.warm(layer, [(e, blobs[e]) for e in reversed(recent)])
        self._begin(layer + 2, len(chosen))

    def _together(self, module: Any, layer: int, blobs: Mapping[int, Tensor], groups: _Groups) -> None:
        """Experts whose blobs all stay where they are."""
        works = []
        for expert, blob in blobs.items():
            work = (self.manifest.layers[layer].layout_of(expert), blob, groups.inputs(expert), groups.results(expert))
            if self._cpu is not None and self._cpu.few(work[0], len(work[2])):
                works.append(Work(*work))
            else:
                self._expert(module, *work)
        if self._cpu is not None and works:
            self._cpu.compute(module, works)

    def _expert(self, module: Any, layout: int, blob: Tensor, x: Tensor, out: Tensor) -> None:
        """One expert, stored in the layout of this number, on its tokens x [t, H] to out [t, H].

        One matrix after the other: with a workspace there is room for one.
        """
        if self._cpu is not None and self._cpu.few(layout, len(x)):
            self._cpu.compute(module, [Work(layout, blob, x, out)])
            return
        product = self._product(layout, 0, blob, x)
        self._product(layout, 1, blob, module._apply_gate(product), out)

    def _product(self, layout: int, index: int, blob: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [t, K] through one of the expert's matrices."""
        matrix = self.manifest.layouts[layout].matrices[index]
        unpack = self._unpackers[layout][index] if self._unpackers is not None else None
        if unpack is not None:
            weights = unpack(blob, self._workspace)
        else:
            weights = dequantize(matrix, parts_of(matrix, blob), self.dtype)
        return multiply(matrix, weights, blob, x, out)


def multiply(matrix: PackedMatrix, weights: Tensor, blob: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """x [t, K] through an expert's matrix, unpacked to `weights` [N, K], with its bias if it has one: [t, N]."""
    if not matrix.bias:
        return torch.mm(x, weights.T, out=out)
    return torch.addmm(parts_of(matrix, blob)["bias"].to(weights.dtype), x, weights.T, out=out)


class _Groups:
    """The choices of a pass, expert by expert: each expert's inputs and results lie side by side.

    They are sorted where they are, on the device, and the host only learns how many each expert has. One token is not
    sorted: all its experts read the same row, and a kernel saved is a tenth of a layer's time there.
    """

    def __init__(self, hidden_states: Tensor, index: Tensor):
        """hidden_states [T, H], index [T, K]."""
        tokens, self._top_k = index.shape
        self._hidden = hidden_states
        self._results = hidden_states.new_empty(index.numel(), hidden_states.shape[1])  # [T * K, H]
        self._order: Tensor | None = None
        if tokens > 1:
            self._order = index.reshape(-1).argsort(stable=True)  # [T * K], sorted place -> choice
            self._hidden = hidden_states.index_select(0, self._order // self._top_k)  # [T * K, H]

    def split(self, chosen: Sequence[int]) -> None:
        """Take note of the ids [T * K], flat, that `index` holds."""
        counts = Counter(chosen)
        self.experts = sorted(counts)
        self._spans: dict[int, slice] = {}
        if self._order is None and len(counts) < len(chosen):
            # A router that goes by a table (DeepSeek-V4) may name an expert twice.
            self._order = torch.tensor(sorted(range(len(chosen)), key=chosen.__getitem__), device=self._hidden.device)
            self._hidden = self._hidden.expand(len(chosen), -1)
        if self._order is None:
            self._spans = {expert: slice(place, place + 1) for place, expert in enumerate(chosen)}
            return
        end = 0
        for expert in self.experts:
            self._spans[expert] = slice(end, end := end + counts[expert])

    def inputs(self, expert: int) -> Tensor:
        """[t, H]: of the t choices of `expert`."""
        return self._hidden if self._order is None else self._hidden[self._spans[expert]]

    def results(self, expert: int) -> Tensor:
        """[t, H], to be filled."""
        return self._results[self._spans[expert]]

    def sum(self, weights: Tensor) -> Tensor:
        """Each token's results [T, H], weighted [T, K] and summed in the router's order."""
        del self._hidden  # its memory is wanted below
        results, flat = self._results, weights.reshape(-1, 1)
        if self._order is None:
            outputs = (results * flat).to(results.dtype)
        else:
            outputs = torch.empty_like(results)
            outputs[self._order] = (results * flat[self._order]).to(results.dtype)
        return outputs.view(-1, self._top_k, results.shape[1]).sum(dim=1)


def offloaded_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Registered with transformers; finds the layer's runner on the module."""
    runner, layer = module.moeflow
    result: Tensor = runner.run(layer, module, hidden_states, top_k_index, top_k_weights)
    return result
