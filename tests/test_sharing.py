"""Decoding with a share of the misses computed by the CPU: the real crew and its kernels beside the emulated device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_device_engine import assert_near, hqq, load, packed, random_ids

from moeflow.engine import Engine
from moeflow.kernels.library import why_not
from moeflow.offload import sharing as sharing_module
from moeflow.offload.sharing import Sharing
from moeflow.offload.splits import ALONE, CLASSES, ONE, RATIO, STEP

__all__ = ["packed"]

emulator = pytest.importorskip("emulator.launcher")
pytestmark = [
    pytest.mark.skipif(not emulator.available(), reason="no g++"),
    pytest.mark.skipif(why_not() is not None, reason="no library"),
]

SHARED: dict[str, object] = {"cpu_experts": "on", "cpu_threads": 2}
FORMATS = {
    **{f"hqq {bits}": hqq(bits) for bits in (2, 3, 4, 8)},
    "metadata of 8 bits": {**hqq(2), "experts": {"backend": "hqq", "bits": 2, "group_size": 16, "metadata_bits": 8}},
    "int8": {**hqq(2), "experts": {"backend": "bitsandbytes", "format": "int8"}},
}


def sharing_of(engine: Engine) -> Sharing:
    sharing = engine._execution.sharing  # type: ignore[union-attr]
    assert isinstance(sharing, Sharing)
    return sharing


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_who_computes_a_row_changes_no_bit(tiny_checkpoint: Path, packed: Callable[..., Path], name: str) -> None:
    artifact, ids = packed(tiny_checkpoint, FORMATS[name]), random_ids(24)
    with load(artifact, experts_per_layer=3) as engine:
        expected = engine.logits(ids, chunk=1)
    with load(artifact, experts_per_layer=3, **SHARED) as engine:
        assert torch.equal(engine.logits(ids, chunk=1), expected)
        assert engine.traffic.computed_bytes > 0
        assert engine.note is None


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("share", ["all", "some", "other", "more of down", "less of down", "none"])
def test_no_split_changes_a_bit(tiny_checkpoint: Path, packed: Callable[..., Path], order: str, share: str) -> None:
    """Down begins in the piece that gate and up end in, and may be brought whole where their last rows are not."""
    artifact, ids = packed(tiny_checkpoint, FORMATS["metadata of 8 bits"]), random_ids(16)
    with load(artifact, experts_per_layer=2) as engine:
        expected = engine.logits(ids, chunk=1)
    halves = {
        "all": (0, 0), "some": (ONE // 2, ONE // 2), "other": (ONE // 3, ONE // 3),
        "more of down": (ONE // 4, ONE * 6 // 10), "less of down": (ONE * 6 // 10, ONE // 4), "none": (ONE, ONE),
    }  # fmt: skip
    with load(artifact, order, experts_per_layer=2, **SHARED) as engine:
        sharing = sharing_of(engine)
        sharing.desk[RATIO::2], sharing.desk[RATIO + 1 :: 2] = halves[share]
        sharing.desk[STEP] = 0
        assert torch.equal(engine.logits(ids, chunk=1), expected)
        assert (engine.traffic.computed_bytes > 0) == (share != "none")
        assert (engine.traffic.missed_bytes > 0) == (share != "all")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_splits_of_any_kind_in_turns(
    checkpoint_factory: Callable[..., Path], packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Halves of several steps of rows, whose arrays begin anywhere in a piece; other ratios for every token."""
    checkpoint = checkpoint_factory(hidden=128, intermediate=192)
    artifact, ids = packed(checkpoint, FORMATS[name]), random_ids(24)
    with load(artifact, experts_per_layer=2) as engine:
        expected = engine.logits(ids, chunk=1)
    with load(artifact, experts_per_layer=2, **SHARED) as engine:
        sharing, before = sharing_of(engine), Sharing.begin

        def begin(self: Sharing) -> None:
            self.desk[RATIO:] = torch.randint(ONE + 1, (2 * CLASSES,))
            before(self)

        monkeypatch.setattr(Sharing, "begin", begin)
        sharing.desk[STEP] = 0
        assert torch.equal(engine.logits(ids, chunk=1), expected)
        assert engine.traffic.computed_bytes > 0 and engine.traffic.missed_bytes > 0


def test_no_slots_and_the_cpu_computes_all(tiny_checkpoint: Path, packed: Callable[..., Path]) -> None:
    artifact, ids = packed(tiny_checkpoint, hqq(2)), random_ids(16)
    with load(artifact, experts_per_layer=0) as engine:
        expected = engine.logits(ids, chunk=1)
    with load(artifact, cpu_experts="only", cpu_threads=1) as engine:
        assert torch.equal(engine.logits(ids, chunk=1), expected)
        assert engine.traffic.missed_bytes == 0 and engine.traffic.hits == 0
        manifest = engine.artifact.manifest
        weights = sum(s.nbytes for m in manifest.layouts[0].matrices for s in m.segments)
        uses = len(ids) * len(manifest.layers) * manifest.model.top_k
        assert engine.traffic.computed_bytes == weights * uses


def test_nf4_differs_by_a_rounding(tiny_checkpoint: Path, packed: Callable[..., Path]) -> None:
    quantization = {**hqq(2), "experts": {"backend": "bitsandbytes", "format": "nf4"}}
    artifact, ids = packed(tiny_checkpoint, quantization), random_ids(16)
    with load(artifact, experts_per_layer=2) as engine:
        expected = engine.logits(ids, chunk=1)
    with load(artifact, experts_per_layer=2, **SHARED) as engine:
        assert_near(engine.logits(ids, chunk=1), expected, 5e-3)  # the device multiplies halves
        assert engine.traffic.computed_bytes > 0


def test_guesses_go_on_beside_the_cpu(tiny_checkpoint: Path, packed: Callable[..., Path]) -> None:
    artifact, ids = packed(tiny_checkpoint, hqq(2)), random_ids(24)
    with load(artifact, experts_per_layer=2, strategy="no-prefetch") as engine:
        expected = engine.logits(ids, chunk=1)
    with load(artifact, "random", experts_per_layer=2, **SHARED) as engine:
        assert torch.equal(engine.logits(ids, chunk=1), expected)
        traffic = engine.traffic
        assert traffic.guesses_used > 0 and traffic.computed_bytes > 0


def test_ratios_move(tiny_checkpoint: Path, packed: Callable[..., Path]) -> None:
    with load(packed(tiny_checkpoint, hqq(2)), experts_per_layer=2, **SHARED) as engine:
        before = sharing_of(engine).ratios
        engine.logits(random_ids(40), chunk=1)
        after = sharing_of(engine).ratios
    assert before != after and len(after) == CLASSES


def test_several_tokens_take_all_over_the_link(tiny_checkpoint: Path, packed: Callable[..., Path]) -> None:
    artifact, ids = packed(tiny_checkpoint, hqq(2)), random_ids(12)
    with load(artifact, experts_per_layer=3) as engine:
        expected = engine.logits(ids, chunk=3)
    with load(artifact, experts_per_layer=3, **SHARED) as engine:
        assert torch.equal(engine.logits(ids, chunk=3), expected)
        assert engine.traffic.computed_bytes == 0


def test_a_crew_that_stalls_changes_no_bit(
    tiny_checkpoint: Path, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device computes from host memory what nobody answered, shares again, and gives up after a few times."""
    monkeypatch.setattr(sharing_module, "PATIENCE", 2_000_000)
    artifact, ids = packed(tiny_checkpoint, hqq(3)), random_ids(40)
    with load(artifact, experts_per_layer=2) as engine:
        expected = engine.logits(ids, chunk=1)
    with load(artifact, experts_per_layer=2, **SHARED) as engine:
        sharing = sharing_of(engine)
        assert torch.equal(engine.logits(ids[:8], chunk=1), expected[:8])
        assert sharing.problem is None
        sharing.crew.pause(True)
        assert torch.equal(engine.logits(ids[:4], chunk=1), expected[:4])
        assert int(sharing.desk[ALONE]) and sharing.problem is None
        sharing.crew.pause(False)
        before = engine.traffic.computed_bytes
        assert torch.equal(engine.logits(ids[:8], chunk=1), expected[:8])
        assert engine.traffic.computed_bytes > before and sharing.problem is None
        sharing.crew.pause(True)
        assert torch.equal(engine.logits(ids, chunk=1), expected)
        assert sharing.problem is not None and "too slow" in str(engine.note)


def test_a_crew_that_is_gone_is_not_waited_for(
    tiny_checkpoint: Path, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing_module, "PATIENCE", 2_000_000)
    artifact, ids = packed(tiny_checkpoint, hqq(2)), random_ids(8)
    with load(artifact, experts_per_layer=2) as engine:
        expected = engine.logits(ids, chunk=1)
    with load(artifact, experts_per_layer=2, **SHARED) as engine:
        sharing_of(engine).crew.close()
        assert torch.equal(engine.logits(ids, chunk=1), expected)
        engine.close()
        engine.close()
