"""Two ways to run the same model: driven by the host, or by the device.

Host-driven, Python reads the router's choice of every layer, fetches through the cache, and computes: on any device,
with blobs in any tier. Device-driven, kernels look up, copy and compute, and a decoding step is one CUDA graph
that the host only starts: wherever all blobs lie in page-locked memory. Both compute the same function; rounding
differs, because the kernels multiply packed weights where the host multiplies weights rounded to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moeflow.artifact.layout import row_blocks
from moeflow.errors import DeviceError
from moeflow.kernels.gemv import MOST_TOKENS
from moeflow.kernels.launcher import Launcher
from moeflow.kernels.publish import Publisher
from moeflow.kernels.unpack import Workspace
from moeflow.model.cpu_experts import CpuExperts
from moeflow.model.device_experts import DeviceRunner, unsupported_layout
from moeflow.model.experts import ExpertRunner
from moeflow.model.fused import fuse
from moeflow.model.fused_positions import fuse_positions
from moeflow.model.kv import GrowingKv, KvCache, StaticKv, cache_argument, make_static
from moeflow.model.linear import PackedLinear, merge, use_kernels, use_products
from moeflow.model.plain_linear import keep_sixteen_bits
from moeflow.model.products import products_of
from moeflow.model.steps import Steps
from moeflow.offload.cache import ExpertCache
from moeflow.offload.device import DeviceCache, MakeMover
from moeflow.offload.in_place import InPlace
from moeflow.offload.link import Link
from moeflow.offload.sharing import Sharing
from moeflow.offload.store import HostStore
from moeflow.offload.stream import LayerStream
from moeflow.offload.traffic import Traffic
from moeflow.schema import Manifest, Plan

__all__ = ["DeviceExecution", "Execution", "HostExecution"]


class Execution(Protocol):
    """How passes are carried out."""

    runner: Any
    """Computes a layer's experts; has `predictor`, `recorder` and `reset`."""

    @property
    def traffic(self) -> Traffic:
        """What the link carried since the start; waits for the device."""

    @property
    def problem(self) -> str | None:
        """What is not used as planned, and why."""

    def bind(self, model: Any) -> None:
        """Take the model that calls `runner`."""

    def close(self) -> None:
        """End the threads of its own; nothing may be under way."""

    def new_kv(self) -> KvCache:
        """An empty KV cache."""

    def forward(self, ids: Sequence[int] | Tensor, kv: KvCache, last: int) -> Tensor:
        """Logits of the last `last` tokens (0: all) of `ids`, which follow those in `kv`; one may be a Tensor [1]."""

    def send(self, token: Tensor) -> Callable[[], int]:
        """Start reading a token [1] back; the result waits for it."""


class HostExecution:
    """Any device, any tier."""

    def __init__(self, manifest: Manifest, plan: Plan, store: HostStore, link: Link, device: torch.device):
        self.traffic = Traffic()
        self._device = device
        dtype: torch.dtype = getattr(torch, plan.dtype)
        cache = ExpertCache(manifest, plan, link, device, self.traffic)
        stream = LayerStream(manifest, link, device, self.traffic) if plan.stream_layers else None
        self.products, self.problem = products_of(manifest, plan, device)
        experts = CpuExperts(manifest, plan.cpu, self.products) if plan.cpu and self.products else None
        in_place = InPlace(manifest, plan, store, self.traffic)
        workspace = self.products.workspace if self.products else None
        self.runner = ExpertRunner(
            manifest, plan, cache, stream, dtype, workspace=workspace, in_place=in_place, cpu=experts
        )  # fmt: skip
        self._model: Any = None

    def bind(self, model: Any) -> None:
        """Take the model that calls `runner`."""
        self._model = model
        if self.products is not None:
            keep_sixteen_bits(model)
            use_products(model, self.products)

    def close(self) -> None:
        """End the threads that multiply."""
        if self.products is not None:
            self.products.close()

    def new_kv(self) -> KvCache:
        """An empty KV cache."""
        return GrowingKv(self._model.config)

    def send(self, token: Tensor) -> Callable[[], int]:
        """Read a token when it is asked for."""
        return lambda: int(token)

    def forward(self, ids: Sequence[int] | Tensor, kv: KvCache, last: int) -> Tensor:
        """Logits of the last `last` tokens."""
        inputs = torch.tensor([ids.tolist() if isinstance(ids, Tensor) else list(ids)], device=self._device)
        rows = []
        for piece in inputs.split(1, dim=1) if self._stepwise and kv.length else [inputs]:
            output = self._model(input_ids=piece, use_cache=True, logits_to_keep=last, **{self._cache_name: kv.cache})
            kv.length += piece.shape[1]
            if self.runner.recorder is not None:
                self.runner.recorder.end(piece.shape[1])
            rows.append(output.logits[0])
        return rows[0] if len(rows) == 1 else torch.cat(rows)[-last:]

    @cached_property
    def _cache_name(self) -> str:
        return cache_argument(self._model)

    @cached_property
    def _stepwise(self) -> bool:
        """Whether tokens that follow others go one by one: transformers' Mamba scans of several start from nothing."""
        config = self._model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
        return not {"mamba", "mamba2", "linear_attention", "recurrent"}.isdisjoint(kinds)


class DeviceExecution:
    """CUDA with all blobs in page-locked memory; under test also a CPU that emulates the kernels.

    `mover` makes the thread that feeds the copy engine; None leaves all copies to kernels.

    Raises:
        DeviceError: the kernels cannot serve this model or this machine; the message says why.
    """

    def __init__(
        self, manifest: Manifest, plan: Plan, store: HostStore, link: Link, launcher: Launcher, device: torch.device,
        mover: MakeMover | None = None,
    ):  # fmt: skip
        if reason := unsupported_layout(manifest):
            raise DeviceError(reason)
        if store.refused:
            raise DeviceError(store.refused)
        self._top_k = top_k = manifest.model.top_k
        sources = [store.address(layer) for layer in range(len(manifest.layers))]
        self._unshared: str | None = None
        self.sharing = self._sharing(manifest, plan, store, launcher, sources, device)
        """What the CPU computes beside the device."""
        self._cache = DeviceCache(manifest, plan, launcher, sources, device, mover, self.sharing)
        if self._cache.most_choices < top_k:
            raise DeviceError(f"{plan.staging_slots} landing buffers; one step needs {top_k + self._cache.guesses}")
        dtype: torch.dtype = getattr(torch, plan.dtype)
        resident = [block for matrix in manifest.resident for block in row_blocks(matrix)]
        packed = [*resident, *(m for layout in manifest.layouts for m in layout.matrices)]
        self._workspace = Workspace(packed, dtype, device)
        self._streamed = Traffic()
        stream = LayerStream(manifest, link, device, self._streamed)
        many = ExpertRunner(manifest, plan, self._cache, stream, dtype, launcher, self._workspace, always_stream=True)
        self.runner = DeviceRunner(manifest, self._cache, launcher, many)
        self._plan, self._launcher, self._device = plan, launcher, device
        self._publisher = Publisher(launcher, device)
        self._lease: StaticKv | None = None
        self._model: Any = None

    def _sharing(
        self, manifest: Manifest, plan: Plan, store: HostStore, launcher: Launcher, sources: Sequence[int],
        device: torch.device,
    ) -> Sharing | None:  # fmt: skip
        """The CPU's part, if it is to have one and can."""
        if plan.cpu is None:
            return None
        blobs = [store.view(layer, 0) for layer in range(len(manifest.layers))]
        try:
            return Sharing(manifest, plan.cpu, launcher, blobs, sources, device)
        except DeviceError as error:
            if plan.cpu.fixed:
                raise
            self._unshared = f"the link brings all that is missing: {error}"
            return None

    @property
    def traffic(self) -> Traffic:
        """What the link carried since the start; waits for the device."""
        return self._cache.count(self._streamed)

    @property
    def problem(self) -> str | None:
        """Why the CPU or the copy engine is not used as it was to be."""
        if self.sharing:
            return self.sharing.problem
        return self._unshared or (self._cache.mover.problem if self._cache.mover else self._cache.alone)

    def close(self) -> None:
        """End the threads beside the device; nothing may be under way."""
        if self._cache.mover:
            self._cache.mover.close()
        if self.sharing:
            self.sharing.close()

    @property
    def wasted_bytes(self) -> int:
        """Copied on guesses that were not used."""
        return self._cache.wasted_bytes

    def bind(self, model: nn.Module) -> None:
        """Take the model that calls `runner`, and capture its decoding step; those of several tokens, when they come.

        Raises:
            RuntimeError: an operation of the model cannot be captured.
        """
        inputs = use_kernels(model, self._launcher, self._workspace)
        self._model = model
        self._kv = make_static(self._model.config, self._plan.context_length, self._device)
        self.fused = fuse(model, self._launcher, self._kv, inputs)
        fuse_positions(self.fused, model)
        self.runner.inputs, scope = inputs, self.fused.scope
        self.runner.deferring = lambda: scope.entered
        most = max(1, min(MOST_TOKENS, self._cache.most_choices // self._top_k))
        runner, uncounted = self.runner, self._cache.uncounted
        active = self.fused.active
        self.steps = Steps(
            model, self._kv, self._device, active, most, self._begin, uncounted, runner.reset, self._announce,
            self._counted,
        )  # fmt: skip
        layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
        self.steps.single.learn(lambda: [merge(family, layers) for family in inputs.families()])
        self.steps.capture()
        inputs.freeze()
        self._begin()
        self.runner.reset()
        self._cache.forget()

    @torch.inference_mode()
    def _begin(self) -> None:
        """Nothing was computed yet: no tokens, the first of forced routes."""
        self._kv.reset()
        if self.runner.routes is not None:
            self.runner.routes.rewind()

    def _announce(self, replayed: bool) -> None:
        """A step begins, as a graph or operation by operation."""
        if self._cache.mover:
            self._cache.mover.begin(hand_over=replayed or self._device.type != "cuda")
        if self.sharing:
            self.sharing.begin()

    def _counted(self, tokens: int) -> None:
        """A pass of so many tokens was computed, and is part of a text."""
        if self.runner.recorder is not None:
            self.runner.recorder.end(tokens)

    def new_kv(self) -> KvCache:
        """An empty KV cache: the engine's one, taken from whoever had it."""
        self._lease = StaticKv(self._kv, self._lease)
        return self._lease

    def send(self, token: Tensor) -> Callable[[], int]:
        """Start reading a token back, beside what the copy engine does."""
        return self._publisher.send(token)

    def forward(self, ids: Sequence[int] | Tensor, kv: KvCache, last: int) -> Tensor:
        """Logits of the last `last` tokens."""
        if kv.stale:
            raise DeviceError("this KV cache was given to another sequence; ask the engine for a new one")
        if len(ids) <= self.steps.most:
            logits = self.steps.run(ids, kv.length)[-last:]
            if self._cache.mover and not isinstance(ids, Tensor):
                # Callers may copy logits to ordinary memory, which keeps the driver from the thread that feeds the copy
                # engine until the pass is over; and the pass waits for the thread.
                self.runner.lanes.wait()
        else:
            if self._cache.mover:
                self._cache.mover.begin(hand_over=False)
            inputs = torch.tensor([list(ids)], device=self._device)
            positions = torch.arange(kv.length, kv.length + len(ids), device=self._device)[None]
            self.runner.expect(len(ids))  # behind the ids: their copy would wait for those of whole layers
            named = {cache_argument(self._model): kv.cache}
            output = self._model(input_ids=inputs, position_ids=positions, use_cache=True, logits_to_keep=last, **named)
            logits = output.logits[0]
            self._counted(len(ids))
        kv.length += len(ids)
        return logits
