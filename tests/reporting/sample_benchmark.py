"""A benchmark of four rows with invented figures, to be rendered."""

from __future__ import annotations

from typing import Any

from moeflow.schema import Benchmark, BenchmarkRow, Environment, Limits

BLOB = 55_050_240  # Mixtral's expert at 2.5 bits
LIMITS = {"link_peak": 54.7e9, "memory_bandwidth": 3.05e12}


def row(**change: Any) -> BenchmarkRow:
    """One row; only its speed was measured."""
    settings: dict[str, Any] = {
        "model": "mixtral-8x7b", "synthetic": True, "experts": 8, "top_k": 2, "expert_scheme": "2-bit g64",
        "attention_scheme": "4-bit g64", "strategy": "full", "execution": "device", "k": 4, "routing": "uniform",
        "prompt_tokens": 16, "tokens": 128, "batch": 1, "tokens_per_second": 27.9,
    }  # fmt: skip
    return BenchmarkRow(**{**settings, **change})


def ablation() -> tuple[BenchmarkRow, ...]:
    """The paper's four rows, all of their figures known."""
    common: dict[str, Any] = {
        "time_to_first_token": 0.31, "prefill_bytes": 256 * BLOB, "read_bytes": 64 * BLOB + 1.2e9,
        "cold_time_to_first_token": 0.28,
        "cold_prefill_bytes": 256 * BLOB, "memory_planned": 17_394_617_548, "memory_in_use": 17_609_365_913,
    }  # fmt: skip
    return (
        row(**common, hit_rate=0.5, recall=0.7, missed_bytes=30 * BLOB, guessed_bytes=4 * BLOB, wasted_bytes=2 * BLOB,
            guesses=512, guesses_used=400),
        row(**common, strategy="no-prefetch", tokens_per_second=27.6, hit_rate=0.5, missed_bytes=32 * BLOB),
        row(**common, strategy="no-cache", k=0, tokens_per_second=14.3, hit_rate=0.0, missed_bytes=64 * BLOB),
        row(**common, strategy="naive", k=0, tokens_per_second=3.7, streamed_bytes=256 * BLOB),
    )  # fmt: skip


def run(
    rows: tuple[BenchmarkRow, ...] | None = None, limits: dict[str, float] | None = None, **where: Any
) -> Benchmark:
    """The whole document; `where` changes its environment."""
    environment: dict[str, Any] = {
        "gpu": "NVIDIA H100 80GB HBM3", "gpu_memory": 81_559 << 20, "cpu": "Xeon", "cores": 16, "ram": 128 << 30,
        "driver": "580.1", "cuda": "13.0", "python": "3.12.3", "torch": "2.11.0+cu130", "transformers": "5.17.0",
        "moeflow": "0.1.0", "commit": "3d66d47",
    }  # fmt: skip
    return Benchmark(
        command="moeflow bench --synthetic mixtral-8x7b --ablations",
        date="2026-11-24T09:12:00Z",
        environment=Environment(**{**environment, **where}),
        limits=Limits(**(LIMITS if limits is None else limits)),
        rows=rows or ablation(),
    )
