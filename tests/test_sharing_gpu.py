"""Decoding with a share of the misses computed by the CPU, on a CUDA device: the captured graph and the real crew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_device_gpu import assert_near, gpu_file, load, packed, random_ids

from moeflow.engine import Engine
from moeflow.offload import sharing as sharing_module
from moeflow.offload.sharing import Sharing
from moeflow.offload.splits import ONE, RATIO

__all__ = ["gpu_file", "packed"]

pytestmark = pytest.mark.gpu

SHARED: dict[str, object] = {"cpu_experts": "on", "cpu_threads": 4}
SCHEMES: list[dict[str, object]] = [
    *({"backend": "hqq", "bits": bits, "group_size": 64} for bits in (2, 3, 4, 8)),
    {"backend": "hqq", "bits": 2, "group_size": 16, "metadata_bits": 8},
    {"backend": "bitsandbytes", "format": "int8"},
]


def share_evenly(engine: Engine) -> Sharing:
    """As the split may be on a machine whose CPU is as fast as its link; tiny experts would all travel."""
    sharing = engine._execution.sharing  # type: ignore[union-attr]
    assert isinstance(sharing, Sharing)
    if engine.plan.cpu is not None and not engine.plan.cpu.fixed:
        sharing.desk[RATIO:] = ONE // 2
    return sharing


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_who_computes_a_row_changes_no_bit(
    tiny_checkpoint: Path, packed: Callable[..., Path], scheme: dict[str, object]
) -> None:
    artifact, ids = packed(tiny_checkpoint, scheme), random_ids(64)
    with load(artifact, experts_per_layer=3, cpu_experts="off") as engine:
        expected = engine.logits(ids, chunk=1)
        text = engine.generate(ids[:5], max_new_tokens=64, temperature=0).ids
    for shared in ({"experts_per_layer": 3, **SHARED}, {"cpu_experts": "only", "cpu_threads": 4}):
        with load(artifact, **shared) as engine:
            share_evenly(engine)
            assert torch.equal(engine.logits(ids, chunk=1), expected)
            assert engine.generate(ids[:5], max_new_tokens=64, temperature=0).ids == text
            assert engine.traffic.computed_bytes > 0 and engine.note is None


def test_nf4_differs_by_a_rounding(tiny_checkpoint: Path, packed: Callable[..., Path]) -> None:
    artifact, ids = packed(tiny_checkpoint, {"backend": "bitsandbytes", "format": "nf4"}), random_ids(32)
    with load(artifact, experts_per_layer=3, cpu_experts="off") as engine:
        expected = engine.logits(ids, chunk=1)
    with load(artifact, experts_per_layer=3, **SHARED) as engine:
        share_evenly(engine)
        assert_near(engine.logits(ids, chunk=1), expected, 5e-3)
        assert engine.traffic.computed_bytes > 0


def test_a_crew_that_stalls_changes_no_bit(
    tiny_checkpoint: Path, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing_module, "PATIENCE", 50_000_000)  # other processes may have the cores
    artifact, ids = packed(tiny_checkpoint, {"backend": "hqq", "bits": 2, "group_size": 64}), random_ids(48)
    with load(artifact, experts_per_layer=2, cpu_experts="off") as engine:
        expected = engine.logits(ids, chunk=1)
    with load(artifact, experts_per_layer=2, **SHARED) as engine:
        sharing = share_evenly(engine)
        sharing.crew.pause(True)
        assert torch.equal(engine.logits(ids[:4], chunk=1), expected[:4])
        sharing.crew.pause(False)
        assert torch.equal(engine.logits(ids, chunk=1), expected)
        assert sharing.problem is None
        sharing.crew.pause(True)
        assert torch.equal(engine.logits(ids, chunk=1), expected)
        assert "too slow" in str(engine.note)
