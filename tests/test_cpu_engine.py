"""The CPU's kernels under a whole model: against the emulated device, dequantized weights, and themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import decided_ids, dequantized_model, greedy_of, logits_of
from test_device_engine import assert_near, emulator, hqq, load, packed, random_ids

import moeflow
from moeflow.engine import Engine
from moeflow.errors import CapacityError, DeviceError
from moeflow.kernels.library import why_not

__all__ = ["packed"]

needs_kernels = pytest.mark.skipif(why_not() is not None, reason="no library of CPU kernels")
needs_emulator = pytest.mark.skipif(not emulator.available(), reason="no g++")

Packed = Callable[..., Path]


def experts(backend: str, **settings: object) -> dict[str, object]:
    return {**hqq(4), "experts": {"backend": backend, **settings}}


FORMATS = {
    **{f"{bits} bits": hqq(bits, attention={2: 4, 3: 2, 4: 8, 8: 3}[bits]) for bits in (2, 3, 4, 8)},
    "8-bit metadata": experts("hqq", bits=2, group_size=16, metadata_bits=8),
    "int8": experts("bitsandbytes", format="int8"),
    "nf4": experts("bitsandbytes", format="nf4"),
}
# 16-bit activations differ from float32 by at most 1.6e-5 of a chunk's largest; see BOUND in test_device_engine.py.
APART = 5e-3


def on_cpu(artifact: Path, **overrides: Any) -> Engine:
    return moeflow.load(artifact, context_length=128, **overrides)


@needs_kernels
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_that_of_its_dequantized_weights(tiny_checkpoint: Path, packed: Packed, name: str) -> None:
    artifact = packed(tiny_checkpoint, FORMATS[name])
    model = dequantized_model(artifact)
    ids = decided_ids(model, 24)
    reference = logits_of(model, ids)
    with on_cpu(artifact) as engine:
        assert engine.note is None and engine.plan.cpu is not None and max(engine.plan.cache_slots) == 0
        assert_near(engine.logits(ids, chunk=1), reference, APART)
        assert_near(engine.logits(ids, chunk=6), reference, APART)
        assert_near(engine.logits(ids), reference, APART)
        answer = engine.generate(ids, max_new_tokens=8, temperature=0)
    assert list(answer.ids) == greedy_of(model, ids, len(answer.ids))


@needs_kernels
@needs_emulator
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_what_the_device_computes(tiny_checkpoint: Path, packed: Packed, name: str) -> None:
    """The same products to the last bit, but for nf4; attention, norms and sums are torch's here."""
    artifact = packed(tiny_checkpoint, FORMATS[name])
    ids = decided_ids(dequantized_model(artifact), 16)
    with load(artifact, experts_per_layer=3) as engine:
        expected = engine.logits(ids, chunk=1)
    with on_cpu(artifact) as engine:
        assert_near(engine.logits(ids, chunk=1), expected, 2 * APART if name == "nf4" else APART)


@needs_kernels
def test_neither_threads_nor_slots_nor_order_change_a_bit(tiny_checkpoint: Path, packed: Packed) -> None:
    artifact, ids = packed(tiny_checkpoint, hqq(4)), random_ids(40)
    with on_cpu(artifact, cpu_threads=1) as engine:
        expected = [engine.logits(ids, chunk=chunk) for chunk in (1, 3, 40)]
    settings: list[dict[str, Any]] = [{"cpu_threads": 2}, {"experts_per_layer": 3, "cpu_threads": 2}, {"ram": "50KiB"}]
    settings += [{"strategy": "no-cache"}, {"strategy": "naive"}, {"experts_per_layer": 0, "ram": "50KiB"}]
    for setting in settings:
        with on_cpu(artifact, **setting) as engine:
            for chunk, logits in zip((1, 3, 40), expected, strict=True):
                assert torch.equal(engine.logits(ids, chunk=chunk), logits), (setting, chunk)


@needs_kernels
def test_a_crew_of_several_computes_what_one_does(checkpoint_factory: Callable[..., Path], packed: Packed) -> None:
    """Wide enough that rows are shared out; one thread alone has fewer than 256 KiB."""
    artifact = packed(checkpoint_factory(layers=1, hidden=512, intermediate=1024), hqq(4))
    ids = random_ids(6)
    logits = []
    for threads in (1, 2):
        with on_cpu(artifact, cpu_threads=threads) as engine:
            logits.append([engine.logits(ids, chunk=chunk) for chunk in (1, 6)])
    assert all(torch.equal(one, two) for one, two in zip(*logits, strict=True))


@needs_kernels
def test_what_is_computed_in_place_is_counted_and_not_copied(tiny_checkpoint: Path, packed: Packed) -> None:
    artifact, ids = packed(tiny_checkpoint, hqq(2)), random_ids(16)
    with on_cpu(artifact) as engine:
        engine.logits(ids, chunk=1)
        traffic, manifest = engine.traffic, engine.artifact.manifest
        assert not engine.guessing
    weights = sum(s.nbytes for m in manifest.layouts[0].matrices for s in m.segments)
    assert traffic.computed_bytes == weights * len(ids) * len(manifest.layers) * manifest.model.top_k
    assert (traffic.moved_bytes, traffic.uses, traffic.guesses) == (0, 0, 0)


@needs_kernels
def test_what_lies_on_the_disk_travels_and_the_rest_does_not(tiny_checkpoint: Path, packed: Packed) -> None:
    artifact, ids = packed(tiny_checkpoint, hqq(2)), random_ids(40)
    with on_cpu(artifact, experts_per_layer=0, ram="50KiB") as engine:
        here = engine.plan.ram_experts[0]
        assert 0 < here < 8
        engine.logits(ids, chunk=1)
        assert engine.traffic.missed_bytes > 0 < engine.traffic.computed_bytes
        before = engine.traffic
        engine.logits(ids)
        streamed = engine.traffic.since(before).streamed_bytes
        blob = engine.artifact.manifest.layout_of(0).nbytes
    assert streamed == sum(8 - n for n in engine.plan.ram_experts) * blob


@needs_kernels
def test_eight_bit_activations_are_near(tiny_checkpoint: Path, packed: Packed) -> None:
    """A random model of 64 columns is the worst there is: its logits differ by some hundredths."""
    artifact = packed(tiny_checkpoint, hqq(4))
    ids = decided_ids(dequantized_model(artifact), 12, gap=0.05)
    with on_cpu(artifact) as engine:
        expected = engine.logits(ids, chunk=1)
    with on_cpu(artifact, cpu_activations="int8") as engine:
        found = engine.logits(ids, chunk=1)
    assert not torch.equal(found, expected)
    assert_near(found, expected, 0.1)


@pytest.mark.parametrize("k", ["auto", 3])
def test_without_the_library_torch_multiplies_and_the_note_says_so(
    tiny_checkpoint: Path, packed: Packed, monkeypatch: pytest.MonkeyPatch, k: str | int
) -> None:
    def missing() -> None:
        raise DeviceError("CPU kernels are off: _cpu.so was not built; install moeflow again")

    artifact, ids = packed(tiny_checkpoint, hqq(4)), random_ids(24)
    with on_cpu(artifact, experts_per_layer=3, cpu_experts="off") as engine:
        assert engine.note is None and engine.plan.cpu is None
        expected = [engine.logits(ids, chunk=chunk) for chunk in (1, 24)]
    monkeypatch.setattr("moeflow.kernels.crew.library", missing)
    with on_cpu(artifact, experts_per_layer=k) as engine:
        assert engine.note is not None and "torch multiplies" in engine.note and "was not built" in engine.note
        for chunk, logits in zip((1, 24), expected, strict=True):
            assert torch.equal(engine.logits(ids, chunk=chunk), logits)


def test_more_threads_than_cores_are_refused(tiny_checkpoint: Path, packed: Packed) -> None:
    with pytest.raises(CapacityError, match=r"cpu\.threads is 9; cpu-2-cores has 2 cores for this process"):
        on_cpu(packed(tiny_checkpoint, hqq(4)), cpu_threads=9)


@needs_kernels
def test_threads_end_with_the_engine(tiny_checkpoint: Path, packed: Packed) -> None:
    artifact = packed(tiny_checkpoint, hqq(4))
    tasks = Path("/proc/self/task")
    with on_cpu(artifact) as engine:
        engine.logits(random_ids(40))
        during = len(list(tasks.iterdir()))
    assert len(list(tasks.iterdir())) <= during - 2  # the crew's one beside its caller, and the link's
