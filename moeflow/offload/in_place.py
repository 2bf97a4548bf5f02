"""Experts that the CPU computes where they lie: of layers without slots, on a machine whose one memory is the device's.

A copy into a slot would read and write what the product reads anyway. Which layers these are is said by the plan; here
are their blobs, and the count of what was read. What lies on the disk goes through the cache's landing buffers.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from moeflow.offload.store import HostStore
from moeflow.offload.traffic import Traffic
from moeflow.schema import Manifest, Plan

__all__ = ["InPlace"]


class InPlace:
    """Blobs in host memory, not copied."""

    def __init__(self, manifest: Manifest, plan: Plan, store: HostStore, traffic: Traffic):
        able = plan.cpu is not None and plan.device == "cpu" and plan.strategy in ("full", "no-prefetch")
        self._here = [n if able and not k else 0 for n, k in zip(plan.ram_experts, plan.cache_slots, strict=True)]
        self._manifest, self._store, self._traffic = manifest, store, traffic
        self._nbytes = [sum(s.nbytes for m in y.matrices for s in m.segments) for y in manifest.layouts]

    def whole(self, layer: int) -> bool:
        """Whether all of a layer's are."""
        return self._here[layer] == self._manifest.layers[layer].experts

    def all(self, layer: int) -> dict[int, Tensor]:
        """Every such expert of a layer with its blob."""
        return {expert: self._store.view(layer, expert) for expert in range(self._here[layer])}

    def take(self, layer: int, needed: Iterable[int]) -> dict[int, Tensor]:
        """Those of the needed experts that are here, each with its blob; they count as read."""
        entry = self._manifest.layers[layer]
        blobs = {expert: self._store.view(layer, expert) for expert in needed if expert < self._here[layer]}
        self._traffic.computed_bytes += sum(self._nbytes[entry.layout_of(expert)] for expert in blobs)
        return blobs
