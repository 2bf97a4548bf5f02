"""Experts of one layer under schemes of their own: packed, verified, planned, and run.

Experts 1 and 3 of layer 1 have 4 bits and all others 2. What each blob must be is known without the code under test:
the bytes that the same expert has in a model that is 4 or 2 bits throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from families.routes import assert_follows
from oracle import dequantized_model
from rich.console import Console
from safetensors.torch import load_file

import moeflow
from moeflow.artifact.blueprint import Blueprint
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.packer import Packer
from moeflow.artifact.reader import Artifact
from moeflow.artifact.role_sizes import role_sizes
from moeflow.artifact.safetensors import ShardWriter
from moeflow.console import show_manifest
from moeflow.engine import Engine
from moeflow.errors import DocumentError
from moeflow.offload.link import CudaLink
from moeflow.offload.store import HostStore
from moeflow.pipeline import _plan_for
from moeflow.planning.cost import Running, predict
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.planning.workspace import matrices
from moeflow.probe.match import find_hardware
from moeflow.schema import Manifest, Profile, Quantization

BOUND = 5e-3  # as in test_device_engine

LAYERS, EXPERTS, ODD = 3, 8, (1, 3)


def hqq(bits: int) -> dict[str, Any]:
    return {"backend": "hqq", "bits": bits, "group_size": 64}


def quantization(bits: int, *overrides: dict[str, Any]) -> Quantization:
    return Quantization.model_validate({"experts": hqq(bits), "overrides": overrides})


MIXED = quantization(2, {"layers": 1, "only_experts": "1,3", "experts": hqq(4)})


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory: Callable[..., Path]) -> Path:
    return checkpoint_factory(layers=LAYERS)


@pytest.fixture(scope="module")
def pack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Quantization], Path]:
    def run(wanted: Quantization) -> Path:
        profile = {"model": str(checkpoint), "quantization": wanted.model_dump(), "hardware": "cpu-2-cores"}
        return moeflow.pack({**profile, "context_length": 128}, tmp_path_factory.mktemp("experts") / "a")

    return run


@pytest.fixture(scope="module")
def artifact(pack: Callable[[Quantization], Path]) -> Path:
    return pack(MIXED)


def _ids(count: int) -> list[int]:
    seed = int(torch.randint(1 << 30, ()))
    print(f"ids from seed {seed}")
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


def test_every_blob_is_that_of_a_model_packed_alike_throughout(
    artifact: Path, pack: Callable[[Quantization], Path]
) -> None:
    alike = {bits: pack(quantization(bits)) for bits in (2, 4)}
    manifest = Artifact.open(artifact).manifest
    for layer, entry in enumerate(manifest.layers):
        found = load_file(artifact / entry.shard)
        for expert in range(EXPERTS):
            bits = 4 if layer == 1 and expert in ODD else 2
            name = f"layers.{layer}.experts.{expert}"
            assert torch.equal(found[name], load_file(alike[bits] / entry.shard)[name]), name
            assert manifest.layout_of(layer, expert).nbytes == found[name].nbytes


def test_the_manifest_says_where_each_expert_lies(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    assert list(opened.verify()) == []
    small, large = (layout.nbytes for layout in opened.manifest.layouts)
    entry = opened.manifest.layers[1]
    assert small < large and entry.layout == 1 and entry.expert_layouts == (0, 1, 0, 1, 0, 0, 0, 0)
    assert opened.manifest.layout_of(1).nbytes == large, "without an expert, the largest"
    sizes = [large if expert in ODD else small for expert in range(EXPERTS)]
    starts = [entry.data_offset + sum(sizes[:expert]) for expert in range(EXPERTS)]
    assert [opened.blob_offset(1, expert) for expert in range(EXPERTS)] == starts
    assert opened.manifest.expert_nbytes == (LAYERS * EXPERTS - 2) * small + 2 * large
    for expert, start in enumerate(starts):
        blob = bytearray(sizes[expert])
        opened.read_blob(1, expert, memoryview(blob))
        assert bytes(blob) == (artifact / entry.shard).read_bytes()[start : start + len(blob)]
    others = [opened.manifest.layers[0], opened.manifest.layers[2]]
    assert all(y.layout == 0 and "expert_layouts" not in y.model_dump() for y in others)
    assert moeflow.pack(artifact / "profile.yaml", artifact) == artifact


def test_an_entry_for_all_experts_of_a_layer_is_an_entry_for_the_layer(pack: Callable[[Quantization], Path]) -> None:
    by_experts = Artifact.open(pack(quantization(2, {"layers": 1, "only_experts": "0-7", "experts": hqq(4)}))).manifest
    by_layer = Artifact.open(pack(quantization(2, {"layers": 1, "experts": hqq(4)}))).manifest
    assert (by_experts.layouts, by_experts.layers) == (by_layer.layouts, by_layer.layers)
    assert by_experts.shards == by_layer.shards


@pytest.mark.parametrize("after", [2, EXPERTS + 2, EXPERTS + 4, 2 * EXPERTS + 1])
def test_an_interrupted_pack_goes_on_to_the_same_bytes(
    artifact: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Interrupted at a blob of the layer before, at both layouts of the mixed layer, and of the layer behind."""
    whole = Artifact.open(artifact).manifest
    calls, original = 0, ShardWriter.write

    def write(writer: ShardWriter, content: memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt
        original(writer, content)

    packer = Packer(Checkpoint.open(checkpoint), whole.model.source, MIXED, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", write)
        with pytest.raises(KeyboardInterrupt):
            packer.run()
    assert not packer.finished()
    packer.run()
    kept = _files(tmp_path)
    expected = {name: content for name, content in _files(artifact).items() if name in kept}
    assert kept == expected and set(kept) >= {"manifest.json", *(shard.file for shard in whole.shards)}


def test_shards_that_other_overrides_left_are_kept_and_their_layouts_numbered_anew(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Layer 1 stays as it is while layer 0 changes, and with it the order in which layouts are met."""
    before = quantization(2, {"layers": 0, "experts": hqq(8)}, *MIXED.model_dump(mode="json")["overrides"])
    first = _manifest(checkpoint, before, tmp_path / "a")
    made = (tmp_path / "a" / first.layers[1].shard).stat()
    again = _manifest(checkpoint, MIXED, tmp_path / "a")
    now = (tmp_path / "a" / first.layers[1].shard).stat()
    assert (made.st_ino, made.st_mtime_ns) == (now.st_ino, now.st_mtime_ns), "not made again"
    assert first.layers[1].expert_layouts != again.layers[1].expert_layouts
    assert again == _manifest(checkpoint, MIXED, tmp_path / "b")
    assert list(Artifact.open(tmp_path / "a").verify()) == []


def test_a_shard_is_made_anew_when_other_experts_are_meant(checkpoint: Path, tmp_path: Path) -> None:
    """The same layouts, as many of each, met in the same order."""
    moved = quantization(2, {"layers": 1, "only_experts": "1,4", "experts": hqq(4)})
    _manifest(checkpoint, MIXED, tmp_path / "a")
    assert _manifest(checkpoint, moved, tmp_path / "a") == _manifest(checkpoint, moved, tmp_path / "b")
    assert list(Artifact.open(tmp_path / "a").verify()) == []


@pytest.mark.parametrize("expert", [1, 2, 3, 7])
def test_verify_names_the_expert_that_a_flipped_bit_hit(artifact: Path, expert: int) -> None:
    opened = Artifact.open(artifact)
    path = opened.shard_path(1)
    position = opened.blob_offset(1, expert) + opened.manifest.layout_of(1, expert).matrices[1].segments[0].offset
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        (fault,) = opened.verify()
        assert fault == f"{path.name}: SHA-256 differs from the manifest's (layer 1, expert {expert})"
    finally:
        path.write_bytes(before)
    assert list(opened.verify()) == []


def test_inspect_shows_the_mix(artifact: Path) -> None:
    page = StringIO()
    show_manifest(Artifact.open(artifact).manifest, Console(file=page, width=160))
    shown = " ".join(page.getvalue().split())
    assert "in 1: experts 1,3 4-bit g64" in shown
    assert "blob 0: 2-bit g64" in shown and "layers 0,2; experts 0,2,4-7 of layer 1" in shown
    assert "blob 1: 4-bit g64" in shown and "bytes; experts 1,3 of layer 1" in shown


# -- planning ----------------------------------------------------------------------------------------------


def _manifest(checkpoint: Path, wanted: Quantization, output: Path) -> Manifest:
    return Packer(Checkpoint.open(checkpoint), "x", wanted, output).run()


def test_sizes_are_known_before_and_after_packing(artifact: Path, checkpoint: Path) -> None:
    manifest = Artifact.open(artifact).manifest
    opened = Checkpoint.open(checkpoint)
    sizes = ModelSizes.of_checkpoint(opened, MIXED)
    assert sizes == ModelSizes.of_manifest(manifest) and sizes.expert_nbytes == manifest.expert_nbytes
    small, large = (layout.nbytes for layout in manifest.layouts)
    layer = sizes.layers[1]
    assert layer.blob_nbytes == large, "a slot holds any of them"
    assert layer.nbytes == 6 * small + 2 * large == EXPERTS * layer.mean_nbytes
    assert [layer.of_first(count) for count in (0, 1, 2, 3)] == [0, small, small + large, 2 * small + large]
    roles = {r.scheme.label: (r.weights, r.nbytes) for r in role_sizes(Blueprint(opened, "x", MIXED))
             if r.role == "experts"}  # fmt: skip
    each = sum(m.rows * m.columns for m in manifest.layouts[0].matrices)
    assert roles == {"2-bit g64": (22 * each, 22 * small), "4-bit g64": (2 * each, 2 * large)}


@pytest.mark.parametrize("hardware", ["cpu-2-cores", "rtx-3060"])
@pytest.mark.parametrize("k", ["auto", 1, 3])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_a_plan_counts_what_is_allocated(artifact: Path, hardware: str, k: Any, share: float) -> None:
    manifest = Artifact.open(artifact).manifest
    budget = int(share * manifest.expert_nbytes)
    profile = Profile.parse({"model": "x", "cache": {"experts_per_layer": k}, "memory": {"ram": budget}}, "test")
    plan = make_plan(profile, ModelSizes.of_manifest(manifest), find_hardware(hardware))
    small, large = (layout.nbytes for layout in manifest.layouts)
    slots = plan.cache_slots
    assert plan.memory.slots + plan.memory.staging == (
        (slots[0] + slots[2] + plan.staging_slots) * small + (slots[1] + plan.staging_slots) * large
    )
    assert plan.memory.stream in (0, 2 * (6 * small + 2 * large))
    in_ram = sum(
        manifest.layout_of(layer, expert).nbytes for layer, n in enumerate(plan.ram_experts) for expert in range(n)
    )
    assert plan.ram_nbytes == in_ram <= budget
    assert plan.ram_nbytes + plan.disk_nbytes == manifest.expert_nbytes


def test_a_prediction_takes_the_mean_blob(artifact: Path) -> None:
    """Experts are taken to be equally likely: a layer's copies cost what its blobs weigh on average."""
    manifest, hardware = Artifact.open(artifact).manifest, find_hardware("rtx-3060")
    sizes = ModelSizes.of_manifest(manifest)
    running = Running((4, 4, 4), (EXPERTS,) * LAYERS, "no-prefetch")
    found = predict(sizes, hardware, running, hits=[0.5] * LAYERS)
    assert found is not None
    assert found.missed_bytes == manifest.expert_nbytes / EXPERTS  # of two experts a layer, half are cached
    assert found.read_bytes == 2 * manifest.expert_nbytes / EXPERTS + sizes.read_resident


def test_a_plan_for_the_device_has_room_for_the_host_that_takes_over(artifact: Path, checkpoint: Path) -> None:
    sizes = ModelSizes.of_manifest(Artifact.open(artifact).manifest)
    alike = ModelSizes.of_checkpoint(Checkpoint.open(checkpoint), quantization(2))
    assert matrices(sizes, "float16", "device") == matrices(sizes, "float16", "host")
    assert matrices(alike, "float16", "device") < matrices(alike, "float16", "host")


# -- running -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ram", ["auto", 0, "tenth"])
@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("k", [1, 3])
def test_the_host_computes_what_the_dequantized_weights_do(artifact: Path, ram: Any, prefetch: int, k: int) -> None:
    """Token by token through the cache, and as a prompt through the layers' buffers."""
    model, ids = dequantized_model(artifact), _ids(24)
    if ram == "tenth":
        ram = int(0.6 * Artifact.open(artifact).manifest.expert_nbytes)  # the mixed layer lies in both tiers
    settings = {"experts_per_layer": k, "ram": ram, "prefetch_depth": prefetch}
    with moeflow.load(artifact, cpu_experts="off", **settings) as engine:
        assert (engine.plan.prefetch.depth > 0) == bool(prefetch)
        assert_follows(engine, model, ids, chunks=(512, 1))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_of_every_backend_in_one_layer(
    checkpoint_factory: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """gpt-oss has biases, and interleaved gates."""
    schemes = [
        {**hqq(3), "metadata_bits": 8}, {"backend": "none"}, {"backend": "bitsandbytes", "format": "nf4"},
        {"backend": "bitsandbytes", "format": "int8"}, hqq(8),
    ]  # fmt: skip
    entries = [{"layers": "0-1", "only_experts": i, "experts": scheme} for i, scheme in enumerate(schemes, start=2)]
    wanted = quantization(2, *entries)
    profile = {"model": str(checkpoint_factory(family)), "quantization": wanted.model_dump(), "context_length": 128}
    directory = moeflow.pack({**profile, "hardware": "cpu-2-cores"}, tmp_path / "a")
    assert [len(set(layer.expert_layouts)) for layer in Artifact.open(directory).manifest.layers[:2]] == [6, 6]
    model, ids = dequantized_model(directory), _ids(24)
    with moeflow.load(directory, experts_per_layer=2, cpu_experts="off") as engine:
        assert_follows(engine, model, ids, chunks=(512, 1))
    with moeflow.load(directory) as engine:  # by the CPU's kernels where they are, of each expert's own layout
        assert_follows(engine, model, ids, (512, 1), BOUND)


def test_the_expected_weights_are_no_other_models(artifact: Path, pack: Callable[[Quantization], Path]) -> None:
    """The comparison above could tell: with every expert at 2 bits, or at 4, other logits come out."""
    ids = _ids(24)
    with moeflow.load(artifact, experts_per_layer=2) as engine:
        logits = engine.logits(ids)
    for bits in (2, 4):
        with moeflow.load(pack(quantization(bits)), experts_per_layer=2) as engine:
            assert not torch.allclose(engine.logits(ids), logits, atol=1e-2)


def test_bytes_that_travelled_are_the_blobs_own(artifact: Path) -> None:
    with moeflow.load(artifact, strategy="no-cache", predictor="none") as engine:
        manifest, moved = engine.artifact.manifest, 0
        original = engine._execution.runner.cache._link.fetch

        def fetch(layer: int, expert: int, target: torch.Tensor) -> Any:
            nonlocal moved
            assert target.nbytes == manifest.layout_of(layer, expert).nbytes
            moved += target.nbytes
            return original(layer, expert, target)

        engine._execution.runner.cache._link.fetch = fetch
        engine.logits(_ids(16), chunk=1)
        assert engine.traffic.missed_bytes == moved > 0


def test_neighbours_of_different_sizes_travel_together_up_to_a_bound(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA link copies at once, without CUDA: runs tile the layer, and each blob lands in its place."""
    opened = Artifact.open(artifact)
    store = HostStore(opened, (EXPERTS,) * LAYERS, pin=False)
    monkeypatch.setattr(store, "locked", lambda _: True)
    small, large = (layout.nbytes for layout in opened.manifest.layouts)
    assert large == 2 * small
    link = object.__new__(CudaLink)
    link._store = store
    for bound, expected in (
        (3 * small, [(0, 2), (2, 2), (4, 3), (7, 1)]),
        (small, [(e, 1) for e in range(EXPERTS)]),
        (EXPERTS * large, [(0, EXPERTS)]),
    ):
        monkeypatch.setattr("moeflow.offload.link.RUN", bound)
        runs = list(link._runs(1, range(EXPERTS)))
        assert runs == expected
        buffer = torch.zeros(opened.manifest.starts(1)[-1], dtype=torch.uint8)
        for first, count in runs:
            buffer[store.place(1, first, count)].copy_(store.view(1, first, count))
        start = 0
        for blob in load_file(opened.shard_path(1)).values():
            assert torch.equal(buffer[start : (start := start + blob.nbytes)], blob)


def test_the_device_path_refuses_and_the_host_takes_over(artifact: Path) -> None:
    emulator = pytest.importorskip("emulator.launcher")
    if not emulator.available():
        pytest.skip("no g++")
    opened = Artifact.open(artifact)
    plan = _plan_for(opened, {"execution": "device", "experts_per_layer": 2})
    with Engine(opened, plan, launcher=emulator.EmulatedLauncher("forward")) as engine:
        assert engine.execution == "host-driven"
        assert engine.fallback == (
            "host-driven instead of device-driven: experts of model.layers.1.mlp.experts have different layouts, "
            "which the kernels cannot multiply yet"
        )
        assert engine.note == engine.fallback
        assert_follows(engine, dequantized_model(artifact), _ids(16), chunks=(512, 1))


# -- refusals ----------------------------------------------------------------------------------------------


def test_experts_that_are_not_there_are_refused_before_packing(
    checkpoint: Path, checkpoint_factory: Callable[..., Path]
) -> None:
    def refusal(path: Path, entry: dict[str, Any]) -> str:
        with pytest.raises(DocumentError) as caught:
            ModelSizes.of_checkpoint(Checkpoint.open(path), quantization(2, entry))
        return str(caught.value)

    assert refusal(checkpoint, {"layers": "0-2", "only_experts": "0,5-8", "experts": hqq(4)}) == (
        "quantization.overrides.0.only_experts is 0,5-8; layer 0 of this mixtral has experts 0 to 7: name some of these"
    )
    dense_first = checkpoint_factory("deepseek_v2", layers=3)
    assert refusal(dense_first, {"layers": "0", "only_experts": "1", "experts": hqq(4)}) == (
        "quantization.overrides.0.experts is 4-bit g64; 0 matches nothing: layers 1-2 have experts"
    )
