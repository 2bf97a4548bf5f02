"""What a decoded token costs in bytes and, at the machine's rates, at least in seconds.

The model is a bound, not a simulation: experts are taken to be equally likely, computation to be bound by
reading weights once, overheads to be nothing. Where copies overlap computation the longer counts, else the sum. Where
blobs of a layer differ in size, their mean is what an expert costs; that the cache may favour small ones is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeflow.planning.sizes import ModelSizes
from moeflow.schema import HardwareProfile, Prediction
from moeflow.schema.profile import Strategy

__all__ = ["predict"]


def predict(
    sizes: ModelSizes,
    hardware: HardwareProfile,
    cache_slots: Sequence[int],
    ram_experts: Sequence[int],
    strategy: Strategy,
) -> Prediction | None:
    """Bound the decode speed; None where the hardware profile lacks a rate that is needed.

    Args:
        sizes: of the model.
        hardware: rates.
        cache_slots: k per layer.
        ram_experts: experts in host memory, per layer; the others are on disk.
        strategy: which row of the paper's ablation.
    """
    memory_rate = hardware.gpu.memory_bandwidth if hardware.gpu else hardware.cpu.memory_bandwidth
    missed = on_disk = read = hits = 0.0
    for layer, slots, in_ram in zip(sizes.layers, cache_slots, ram_experts, strict=True):
        hit_rate = slots / layer.experts
        copies = layer.experts if strategy == "naive" else sizes.top_k * (1 - hit_rate)
        hits += hit_rate / len(sizes.layers)
        missed += copies * layer.mean_nbytes
        on_disk += copies * (layer.nbytes - layer.of_first(in_ram)) / layer.experts
        read += sizes.top_k * layer.mean_nbytes
    read += sizes.resident_packed + sizes.resident_dense
    if memory_rate is None or (on_disk and hardware.disk is None):
        return None
    link_seconds = missed / hardware.link.host_to_device
    disk_seconds = on_disk / hardware.disk.read if on_disk and hardware.disk else 0.0
    memory_seconds = read / memory_rate
    waiting = max(link_seconds, disk_seconds)
    seconds = max(waiting, memory_seconds) if strategy in ("full", "naive") else waiting + memory_seconds
    return Prediction(
        tokens_per_second=_digits(1 / seconds),
        hit_rate=_digits(hits),
        missed_bytes=round(missed),
        read_bytes=round(read),
        link_seconds=_digits(link_seconds),
        disk_seconds=_digits(disk_seconds),
        memory_seconds=_digits(memory_seconds),
    )


def _digits(value: float) -> float:
    """Four significant digits: a bound has no more."""
    return float(f"{value:.4g}")
