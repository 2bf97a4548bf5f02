"""The device-driven path on a CUDA device: captured graphs against transformers, the host-driven path, each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import checkpoint_model, decided_ids, dequantized_model, logits_of
from test_recording import routes_of
from tiny_families import LONGROPE

import moeflow
from moeflow.artifact.architectures import architecture
from moeflow.artifact.families import FAMILIES
from moeflow.artifact.random_weights import RandomArtifact
from moeflow.engine import Engine
from moeflow.errors import DeviceError
from moeflow.offload.copy_engine import CopyEngine
from moeflow.offload.trace import load_trace
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.probe.machine import probe
from moeflow.recording import recording
from moeflow.schema import HardwareProfile, Profile

pytestmark = pytest.mark.gpu

# As in test_device_engine.py; products of the dense part round in another order than the CPU's.
BOUND = 5e-3
# Top-2 gaps, of the largest logit, below which rounding in bfloat16 may decide: 2^-8 a rounding, about ten in a row.
GAP = 0.04


@pytest.fixture(scope="session")
def gpu_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "gpu.yaml"
    probe(name="gpu").save(path)
    return path


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, gpu_file: Path) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def pack(checkpoint: Path, experts: object, attention: object = None) -> Path:
        key = f"{checkpoint} {experts} {attention}"
        if key not in made:
            quantization = {"experts": experts, "attention": attention or experts}
            profile = {"model": str(checkpoint), "quantization": quantization, "hardware": str(gpu_file)}
            made[key] = moeflow.pack(profile, tmp_path_factory.mktemp("artifact") / "a")
        return made[key]

    return pack


def load(artifact: Path, **overrides: object) -> Engine:
    engine = moeflow.load(artifact, **{"dtype": "float32", "context_length": 256, **overrides})
    assert engine.execution == "device-driven", engine.fallback
    return engine


def random_ids(count: int) -> list[int]:
    seed = int(torch.randint(1 << 30, ()))
    print(f"ids from seed {seed}")
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_near(found: torch.Tensor, reference: torch.Tensor, bound: float) -> None:
    error = float((found - reference).abs().max() / reference.abs().max())
    print(f"largest difference {error:.2e} of the largest logit")
    assert error <= bound


SCHEMES = [
    *({"backend": "hqq", "bits": bits, "group_size": 64} for bits in (2, 3, 4, 8)),
    {"backend": "hqq", "bits": 2, "group_size": 16, "metadata_bits": 8},
    {"backend": "bitsandbytes", "format": "nf4"},
    {"backend": "bitsandbytes", "format": "int8"},
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_logits_are_those_of_the_dequantized_weights(
    tiny_checkpoint: Path, packed: Callable[..., Path], scheme: dict[str, object]
) -> None:
    artifact, halves = packed(tiny_checkpoint, scheme), scheme.get("format") == "nf4"
    model = dequantized_model(artifact)
    ids = decided_ids(model, 40, 0.03 if halves else 0.01)
    reference = logits_of(model, ids)
    with load(artifact, experts_per_layer=3) as engine:
        assert_near(engine.logits(ids, chunk=1), reference, 5e-3 if halves else BOUND)
        assert_near(engine.logits(ids), reference, BOUND)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"jamba", "lfm2_moe"}))
def test_families_unquantized(
    checkpoint_factory: Callable[..., Path], packed: Callable[..., Path], family: str
) -> None:
    checkpoint, ids = checkpoint_factory(family), random_ids(30)
    with load(packed(checkpoint, {"backend": "none"}), experts_per_layer=3) as engine:
        assert_near(engine.logits(ids, chunk=1), logits_of(checkpoint_model(checkpoint), ids), 1e-4)


def test_positions_beyond_the_length_of_training(
    checkpoint_factory: Callable[..., Path], packed: Callable[..., Path]
) -> None:
    """PhiMoE's tables in a graph: another scale from position 16 on."""
    artifact, ids = packed(checkpoint_factory("phimoe", rope_parameters=LONGROPE), {"backend": "none"}), random_ids(24)
    with moeflow.load(artifact, dtype="float32", execution="host") as engine:
        expected = engine.logits(ids, chunk=1)
    with load(artifact, experts_per_layer=3) as engine:
        assert_near(engine.logits(ids, chunk=1), expected, 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_switch_gives_the_same_bits(tiny_checkpoint: Path, packed: Callable[..., Path], dtype: str) -> None:
    artifact, ids = packed(tiny_checkpoint, SCHEMES[0]), random_ids(60)
    with load(artifact, experts_per_layer=4, dtype=dtype) as engine:
        expected = engine.logits(ids, chunk=1)
    settings: list[dict[str, object]] = [{"experts_per_layer": k} for k in (0, 1, 3, 8)]
    settings += [{"strategy": "no-prefetch"}, {"strategy": "no-cache"}, {"policy": "lfu", "experts_per_layer": 3}]
    for setting in settings:
        with load(artifact, dtype=dtype, **setting) as engine:
            for _ in range(3):  # a race between copy and computation would not show every time
                assert torch.equal(engine.logits(ids, chunk=1), expected), setting


@pytest.mark.parametrize("k", [1, 8])
def test_a_few_tokens_at_once_are_graphs_and_as_one_by_one(
    tiny_checkpoint: Path, packed: Callable[..., Path], k: int
) -> None:
    ids = random_ids(60)
    with load(packed(tiny_checkpoint, SCHEMES[2]), experts_per_layer=k) as engine:
        expected, steps = engine.logits(ids, chunk=1), engine._execution.steps
        assert steps.most == 8
        for chunk in (2, 3, 5, 8):
            for _ in range(3):
                assert_near(engine.logits(ids, chunk=chunk), expected, BOUND)
            assert not steps.kept and steps._steps[chunk]._graph is not None
        assert torch.equal(engine.logits(ids, chunk=1), expected)
        assert engine.traffic.streamed_bytes == 0


def test_captured_steps_record_routes(tiny_checkpoint: Path, packed: Callable[..., Path], tmp_path: Path) -> None:
    """Graphs of one and of three tokens, one of them made amid the recording, and a device that runs ahead."""
    artifact = packed(tiny_checkpoint, {"backend": "none"})
    model = checkpoint_model(tiny_checkpoint)
    ids = decided_ids(model, 24)
    expected = routes_of(model, ids)
    with load(artifact, experts_per_layer=3, record_routes=True) as engine:
        for chunk in (1, 3, 3, 512):
            with recording(engine, tmp_path / "a.npz"):
                engine.logits(ids, chunk=chunk)
            assert (load_trace(tmp_path / "a.npz").routes == expected).all(), chunk
        plain = engine.generate(ids, max_new_tokens=16, temperature=0).ids
        with recording(engine, tmp_path / "b.npz"):
            assert engine.generate(ids, max_new_tokens=16, temperature=0).ids == plain
        trace = load_trace(tmp_path / "b.npz")
        assert trace.prompt == len(ids) and (trace.routes[: len(ids)] == expected).all()
        again = routes_of(model, [*ids, *plain])[: len(trace.routes)]
        assert (trace.routes == again).all(axis=(1, 2)).mean() > 0.9  # nobody chose the answer's tokens


def test_the_copy_engine_copies_in_order_and_announces() -> None:
    engine = CopyEngine(torch.device("cuda"))
    host = torch.randint(256, (64 << 20,), dtype=torch.uint8).pin_memory()
    target, flag = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda"), torch.zeros(1, dtype=torch.int32).cuda()
    torch.cuda.synchronize()
    failed: list[object] = []

    def feed() -> None:
        try:
            engine.enter()
            for start in range(0, 64 << 20, 8 << 20):
                engine.copy(target.data_ptr() + start, host.data_ptr() + start, 8 << 20)
            engine.announce(flag.data_ptr(), 7)
        except DeviceError as error:
            failed.append(error)

    thread = threading.Thread(target=feed)
    thread.start()
    thread.join()
    engine.wait()
    assert not failed and int(flag) == 7 and torch.equal(target.cpu(), host)


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[2], SCHEMES[4]], ids=str)
def test_a_graph_at_real_widths_computes_what_its_operations_do(gpu_file: Path, scheme: dict[str, object]) -> None:
    """Kernels overlap in a graph as they do nowhere else, and small matrices are over before the next begins."""
    config = {**architecture("mixtral-8x7b"), "num_hidden_layers": 4}
    attention = {"backend": "hqq", "bits": 4, "group_size": 64}
    quantization = {"experts": scheme, "attention": attention}
    profile = Profile.parse({"model": "m", "quantization": quantization, "context_length": 512}, "here")
    artifact = RandomArtifact(config, profile.quantization, "m")
    wanted = profile.model_copy(update={"cache": profile.cache.model_copy(update={"experts_per_layer": 3})})
    plan = make_plan(wanted, ModelSizes.of_manifest(artifact.manifest), HardwareProfile.load(gpu_file))
    ids = torch.randint(32000, (150,)).tolist()
    with Engine(artifact, plan, mover=False) as engine:
        alone = engine.logits(ids, chunk=1)
    with Engine(artifact, plan) as engine:
        assert engine.execution == "device-driven", engine.fallback
        replayed = [alone, *(engine.logits(ids, chunk=1) for _ in range(3))]
        mover = engine._execution._cache.mover  # type: ignore[attr-defined]
        assert mover is not None and mover.moved_bytes > 0.8 * engine.traffic.missed_bytes
        assert engine.note is None
        single = engine._execution.steps.single  # type: ignore[attr-defined]
        graph, single._graph = single._graph, None
        expected = engine.logits(ids, chunk=1)
        single._graph = graph
    assert expected.isfinite().all() and expected.std() > 0.1
    assert all(torch.equal(found, expected) for found in replayed)


def test_the_demo_models_greedy_text(gpu_file: Path, demo_artifact: Path) -> None:
    """128 tokens: the same under every switch; the host's, or the first difference where rounding may decide."""
    hardware = str(gpu_file)
    with moeflow.load(demo_artifact, hardware=hardware, execution="host") as engine:
        host = engine.generate("In the beginning", max_new_tokens=128, temperature=0).ids
    found = set()
    for setting in ({"experts_per_layer": 4}, {"experts_per_layer": 1}, {"strategy": "no-prefetch"}, {"policy": "lfu"}):
        with load(demo_artifact, dtype="auto", hardware=hardware, **setting) as engine:
            found.add(engine.generate("In the beginning", max_new_tokens=128, temperature=0).ids)
            prompt = engine.tokenizer("In the beginning").input_ids
    assert len(found) == 1
    ids = found.pop()
    first = next((i for i, pair in enumerate(zip(ids, host, strict=False)) if pair[0] != pair[1]), None)
    if first is not None:
        with load(demo_artifact, hardware=hardware) as engine:
            top = engine.logits([*prompt, *ids[:first]], chunk=1)[-1].topk(2).values
        print(f"differs from the host's at token {first}, where the gap is {float(top[0] - top[1]):.3f}")
        assert float(top[0] - top[1]) <= GAP * float(top[0].abs())


def test_device_memory_is_as_planned(tiny_checkpoint: Path, packed: Callable[..., Path]) -> None:
    artifact = packed(tiny_checkpoint, SCHEMES[2])
    torch.cuda.synchronize()
    with load(artifact) as engine:
        engine.generate(random_ids(20), max_new_tokens=8, temperature=0)
    del engine
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with load(artifact) as engine:
        engine.generate(random_ids(20), max_new_tokens=8, temperature=0)
    del engine
    assert torch.cuda.memory_allocated() <= before + (8 << 20)
