"""The host-driven path on a CUDA device: `pytest -m gpu`. The other path: test_device_gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import checkpoint_model, greedy_of, logits_of

import moeflow
from moeflow.engine import Engine
from moeflow.probe.machine import probe

pytestmark = pytest.mark.gpu

STRATEGIES = ("full", "no-prefetch", "no-cache", "naive")
SCHEME = {"backend": "hqq", "group_size": 32}


@pytest.fixture(scope="session")
def gpu_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "gpu.yaml"
    probe(name="gpu").save(path)
    return path


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, gpu_file: Path, tiny_checkpoint: Path) -> Callable[[int], Path]:
    def pack(bits: int) -> Path:
        none = {"backend": "none"}
        scheme = {**SCHEME, "bits": bits} if bits < 16 else none
        quantization = {"experts": scheme, "attention": {**SCHEME, "bits": 4} if bits < 16 else none}
        profile = {"model": str(tiny_checkpoint), "quantization": quantization, "hardware": str(gpu_file)}
        return moeflow.pack(profile, tmp_path_factory.mktemp(f"bits-{bits}") / "a")

    return pack


def load(artifact: Path, **overrides: object) -> Engine:
    return moeflow.load(artifact, **{"dtype": "float32", "execution": "host", **overrides})


def random_ids(count: int) -> list[int]:
    seed = int(torch.randint(1 << 30, ()))
    print(f"ids from seed {seed}")
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_the_plan_is_for_this_gpu_and_experts_are_page_locked(packed: Callable[[int], Path]) -> None:
    with load(packed(4)) as engine:
        assert engine.device.type == "cuda"
        assert engine._store.pinned
        blob = engine._store.view(0, 0)
        assert _memory_type(blob) == "CU_MEMORYTYPE_HOST"
        assert blob.is_pinned()


def _memory_type(memory: torch.Tensor) -> str:
    """What the driver takes host memory for; it knows none that is not page-locked."""
    driver = pytest.importorskip("cuda.bindings.driver")
    wanted = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
    code, found = driver.cuPointerGetAttribute(wanted, memory.data_ptr())
    return driver.CUmemorytype(int(found)).name if int(code) == 0 else str(code.name)


def test_copies_from_page_locked_memory_do_not_wait(packed: Callable[[int], Path]) -> None:
    with load(packed(16)) as engine:
        blob = engine._store.view(1, 2)
        target = torch.empty_like(blob, device=engine.device)
        copied = torch.cuda.Event()
        torch.cuda.synchronize()
        torch.cuda._sleep(1 << 30)  # cycles: the stream is busy for half a second or more
        target.copy_(blob, non_blocking=True)
        copied.record()
        assert not copied.query()
        copied.synchronize()
        assert torch.equal(target.cpu(), blob)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_unquantized_equals_transformers(
    tiny_checkpoint: Path, packed: Callable[[int], Path], strategy: str, k: int
) -> None:
    """As on the CPU; float32 products on the GPU round in another order than the CPU's reference."""
    ids = random_ids(40)
    reference = logits_of(checkpoint_model(tiny_checkpoint), ids)
    with load(packed(16), experts_per_layer=k, strategy=strategy) as engine:
        for chunk in (512, 1):
            found = engine.logits(ids, chunk=chunk)
            assert (found - reference).abs().max() <= 5e-5 * reference.abs().max()
    assert found.shape == reference.shape


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_switch_gives_the_same_bits(packed: Callable[[int], Path], bits: int) -> None:
    artifact, ids = packed(bits), random_ids(60)
    settings = [{"experts_per_layer": k, "strategy": s} for k in (1, 3, 8) for s in STRATEGIES]
    settings += [{"policy": "lfu"}, {"prefetch_depth": 2}, {"ram": 0}, {"ram": 0, "strategy": "naive"}]
    with load(artifact, experts_per_layer=4) as engine:
        whole, stepwise = engine.logits(ids), engine.logits(ids, chunk=1)
    for setting in settings:
        with load(artifact, **setting) as engine:
            for _ in range(3):  # a race between copy and computation would not show every time
                assert torch.equal(engine.logits(ids), whole), setting
                assert torch.equal(engine.logits(ids, chunk=1), stepwise), setting


def test_greedy_text_of_the_demo_model_is_the_cpus(gpu_file: Path, demo_artifact: Path) -> None:
    """float32 on both: 64 tokens, each decided by a gap far above rounding."""
    with moeflow.load(demo_artifact, hardware="cpu-2-cores") as engine:
        expected = engine.generate("In the beginning", max_new_tokens=64, temperature=0).ids
    for strategy in STRATEGIES:
        with load(demo_artifact, hardware=str(gpu_file), strategy=strategy, experts_per_layer=4) as engine:
            assert engine.generate("In the beginning", max_new_tokens=64, temperature=0).ids == expected


def test_bfloat16_greedy_text_does_not_depend_on_the_switches(gpu_file: Path, demo_artifact: Path) -> None:
    texts = set()
    for strategy in STRATEGIES:
        with load(
            demo_artifact, dtype="auto", hardware=str(gpu_file), strategy=strategy, experts_per_layer=4
        ) as engine:
            assert engine.plan.dtype == "bfloat16"
            texts.add(engine.generate("The king said", max_new_tokens=64, temperature=0).text)
    assert len(texts) == 1


def test_reference_tokens(tiny_checkpoint: Path, packed: Callable[[int], Path]) -> None:
    ids = random_ids(10)
    with load(packed(16), experts_per_layer=2) as engine:
        from moeflow.generation import Sampler, TokenStream

        found = list(TokenStream(engine, ids, 20, Sampler(0.0), set()))
    assert found == greedy_of(checkpoint_model(tiny_checkpoint), ids, 20)


def test_memory_is_given_back(packed: Callable[[int], Path]) -> None:
    artifact = packed(4)
    load(artifact).close()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    load(artifact).close()
    assert torch.cuda.memory_allocated() <= before
