"""The CPU's kernels under a whole model: against the emulated device, against dequantized weights, and against themselves."""

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
from moeflow.kernels.library import why_not
from moeflow.schema import Plan

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
# 16-bit activations differ from float32 by at most 1.6e-5 of a chunk's largest; see BOUND in test_device_engine.py. On the
# device nf4's products are of halves.
APART = 1e-3


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
        assert_near(engine.logits(ids, chunk=1), expected, APART if name == "nf4" else APART / 10)
