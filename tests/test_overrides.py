"""Layers with schemes of their own: two blob layouts in one artifact, in plans, and in both engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families.routes import assert_follows
from oracle import dequantized_model

import moeflow
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.packer import Packer
from moeflow.artifact.reader import Artifact
from moeflow.engine import Engine
from moeflow.errors import DocumentError
from moeflow.pipeline import _plan_for
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.probe.match import find_hardware
from moeflow.schema import Manifest, Plan, Profile, Quantization

BOUND = 5e-3  # as in test_device_engine
LAYERS = 4


def hqq(bits: int) -> dict[str, Any]:
    return {"backend": "hqq", "bits": bits, "group_size": 64}


EQUAL = {"experts": hqq(4), "overrides": [{"layers": "1-2", "experts": {"backend": "bitsandbytes", "format": "nf4"}}]}
MIXED = {
    "experts": hqq(2),
    "attention": hqq(4),
    "overrides": [
        {"layers": "0,3", "experts": hqq(8)},
        {"layers": "1", "experts": {"backend": "none"}, "attention": {"backend": "none"}},
        {"layers": "2-3", "attention": hqq(8)},
    ],
}


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory: Callable[..., Path]) -> Path:
    return checkpoint_factory(layers=LAYERS)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    profile = {
        "model": str(checkpoint), "quantization": MIXED, "hardware": "cpu-2-cores", "context_length": 128,
    }  # fmt: skip
    return moeflow.pack(profile, tmp_path_factory.mktemp("overrides") / "a")


def _ids(count: int) -> list[int]:
    seed = int(torch.randint(1 << 30, ()))
    print(f"ids from seed {seed}")
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_each_layer_is_stored_as_it_was_asked(artifact: Path, checkpoint: Path) -> None:
    opened = Artifact.open(artifact)
    manifest = opened.manifest
    assert list(opened.verify()) == []
    labels = [{m.scheme.label for m in manifest.layout_of(i).matrices} for i in range(LAYERS)]
    assert labels == [{"8-bit g64"}, {"unquantized"}, {"2-bit g64"}, {"8-bit g64"}]
    assert [layer.layout for layer in manifest.layers] == [0, 1, 2, 0]
    attention = {m.name.split(".")[2]: m.scheme.label for m in manifest.resident}
    assert attention == {"0": "4-bit g64", "2": "8-bit g64", "3": "8-bit g64"}
    errors = [layer.relative_error for layer in manifest.layers]
    assert errors[1] == 0 and errors[0] < 0.02 and errors[2] > 0.1
    sizes = ModelSizes.of_checkpoint(Checkpoint.open(checkpoint), manifest.quantization)
    assert sizes == ModelSizes.of_manifest(manifest)
    assert moeflow.pack(artifact / "profile.yaml", artifact) == artifact


@pytest.mark.parametrize("ram", ["auto", 0])
def test_the_host_computes_what_the_dequantized_weights_do(artifact: Path, ram: Any) -> None:
    model, ids = dequantized_model(artifact), _ids(24)
    with moeflow.load(artifact, experts_per_layer=2, ram=ram, cpu_experts="off") as engine:
        assert_follows(engine, model, ids, chunks=(512, 1))
    with moeflow.load(artifact, experts_per_layer=2, ram=ram) as engine:  # by the CPU's kernels where they are
        assert_follows(engine, model, ids, (512, 1), BOUND)


def test_the_device_computes_what_the_dequantized_weights_do(artifact: Path) -> None:
    """With few slots and guesses, so that buffers of every layout are given up and taken again."""
    emulator = pytest.importorskip("emulator.launcher")
    if not emulator.available():
        pytest.skip("no g++")
    ids, model = _ids(12), dequantized_model(artifact)
    opened = Artifact.open(artifact)
    found = []
    for k in (1, 3):
        plan = _plan_for(opened, {"execution": "device", "experts_per_layer": k})
        with Engine(opened, plan, launcher=emulator.EmulatedLauncher("forward")) as engine:
            assert engine.execution == "device-driven", engine.fallback
            assert_follows(engine, model, ids, (512, 1), BOUND)
            found.append(engine.logits(ids, chunk=1))
    assert torch.equal(*found)


def _pool_bytes(manifest: Manifest, plan: Plan) -> int:
    """What the caches allocate: for each layout its layers' slots and a set of landing buffers."""
    total = 0
    for number, layout in enumerate(manifest.layouts):
        slots = sum(k for k, y in zip(plan.cache_slots, manifest.layers, strict=True) if y.layout == number)
        total += (slots + plan.staging_slots) * layout.nbytes
    return total


@pytest.mark.parametrize("quantization", [MIXED, EQUAL], ids=["three layouts", "two of one size"])
@pytest.mark.parametrize("hardware", ["cpu-2-cores", "rtx-3060"])
@pytest.mark.parametrize("k", ["auto", 1, 3])
def test_a_plan_counts_what_the_caches_allocate(
    checkpoint: Path, tmp_path: Path, quantization: dict[str, Any], hardware: str, k: Any
) -> None:
    profile = Profile.parse({"model": "x", "quantization": quantization, "cache": {"experts_per_layer": k}}, "test")
    manifest = Packer(Checkpoint.open(checkpoint), "x", profile.quantization, tmp_path).run()
    sizes = ModelSizes.of_manifest(manifest)
    plan = make_plan(profile, sizes, find_hardware(hardware))
    memory = plan.memory
    assert memory.slots + memory.staging == _pool_bytes(manifest, plan)
    assert memory.stream in (0, 2 * max(y.experts * y.blob_nbytes for y in sizes.layers))
    assert plan.ram_nbytes + plan.disk_nbytes == manifest.expert_nbytes
    parts = (memory.resident, memory.kv_cache, memory.slots, memory.staging, memory.stream, memory.workspace)
    assert sum(parts) == memory.total <= memory.limit


def test_layouts_of_one_size_land_apart(checkpoint: Path) -> None:
    quantization = Quantization.model_validate(EQUAL)
    sizes = ModelSizes.of_checkpoint(Checkpoint.open(checkpoint), quantization)
    one = replace(sizes, layers=(replace(sizes.layers[0], layout=0),) * LAYERS)
    two = replace(sizes, layers=tuple(replace(sizes.layers[0], layout=i % 2) for i in range(LAYERS)))
    profile = Profile(model="x", quantization=quantization)
    plans = [make_plan(profile, s, find_hardware("cpu-2-cores")) for s in (one, two)]
    assert plans[1].memory.staging == 2 * plans[0].memory.staging


def _refusal(checkpoint: Path, *overrides: dict[str, Any]) -> str:
    with pytest.raises(DocumentError) as caught:
        quantization = Quantization.model_validate({"overrides": overrides})
        ModelSizes.of_checkpoint(Checkpoint.open(checkpoint), quantization)
    return str(caught.value)


def test_layers_that_are_not_there_are_refused_before_packing(
    checkpoint_factory: Callable[..., Path], checkpoint: Path
) -> None:
    fine = {"layers": "0", "attention": hqq(8)}
    assert _refusal(checkpoint, fine, {"layers": "2-4", "experts": hqq(2)}) == (
        "quantization.overrides.1.layers is 2-4; this mixtral has layers 0 to 3: name some of these"
    )
    assert _refusal(checkpoint, {"layers": 3, "shared_experts": hqq(2)}) == (
        "quantization.overrides.0.shared_experts is 2-bit g64; 3 matches nothing: "
        "no layer of this model has shared experts"
    )
    dense_first = checkpoint_factory("deepseek_v2", layers=3)
    assert _refusal(dense_first, {"layers": "0", "experts": hqq(2)}) == (
        "quantization.overrides.0.experts is 2-bit g64; 0 matches nothing: layers 1-2 have experts"
    )
    assert "group_size 64, 32, 16 would fit" in _refusal(
        checkpoint, {"layers": "1", "experts": {**hqq(2), "group_size": 128}}
    )
