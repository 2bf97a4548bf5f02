"""The bound on decode speed, against numbers worked out by hand."""

from __future__ import annotations

import itertools
import random
from typing import Any, get_args

import pytest

from moeflow.planning.cost import predict
from moeflow.planning.sizes import LayerSize, ModelSizes
from moeflow.schema import Cpu, Disk, Gpu, HardwareProfile, Link
from moeflow.schema.profile import Strategy

# Two layers of 8 experts of 1 MB, 2 chosen per token, 1 MB resident.
SIZES = ModelSizes(
    layers=(LayerSize(8, 1_000_000, 1), LayerSize(8, 1_000_000, 1)),
    top_k=2,
    dtype="bfloat16",
    resident_packed=600_000,
    resident_dense=400_000,
    kv_values_per_token=1,
    max_context=1,
)


def _machine(memory: int | None = 100_000_000, disk: int | None = 1_000_000, gpu: bool = True) -> HardwareProfile:
    """100 MB/s of memory, 10 MB/s of link, 1 MB/s of disk."""
    board = Gpu(name="g", memory=1 << 30, compute_capability="8.0", memory_bandwidth=memory)
    return HardwareProfile(
        name="m",
        origin="measured",
        gpu=board if gpu else None,
        cpu=Cpu(cores=1, memory_bandwidth=memory),
        ram=1 << 30,
        link=Link(host_to_device=10_000_000),
        disk=Disk(read=disk) if disk else None,
    )


def _numbers(**arguments: Any) -> tuple[float, ...]:
    given = {"sizes": SIZES, "hardware": _machine(), "cache_slots": (4, 4), "ram_experts": (8, 8), "strategy": "full"}
    prediction = predict(**{**given, **arguments})
    assert prediction is not None
    return tuple(prediction.model_dump().values())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # half of 4 uses miss: 2 MB at 10 MB/s; 4 experts and the resident MB are read at 100 MB/s meanwhile
        ({}, (5.0, 0.5, 2_000_000, 5_000_000, 0.2, 0.0, 0.05)),
        # nothing overlaps
        ({"strategy": "no-prefetch"}, (4.0, 0.5, 2_000_000, 5_000_000, 0.2, 0.0, 0.05)),
        ({"strategy": "no-cache", "cache_slots": (0, 0)}, (2.222, 0.0, 4_000_000, 5_000_000, 0.4, 0.0, 0.05)),
        # all 16 experts cross the link for every token
        ({"strategy": "naive", "cache_slots": (0, 0)}, (0.625, 0.0, 16_000_000, 5_000_000, 1.6, 0.0, 0.05)),
        # everything cached: memory alone bounds
        ({"cache_slots": (8, 8)}, (20.0, 1.0, 0, 5_000_000, 0.0, 0.0, 0.05)),
        # slots may differ by layer: 1.5 MB miss in the first, 0.5 MB in the second
        ({"cache_slots": (2, 6)}, (5.0, 0.5, 2_000_000, 5_000_000, 0.2, 0.0, 0.05)),
        # half of one layer on disk: 0.5 of the 2 MB are read at 1 MB/s, while the link waits
        ({"ram_experts": (8, 4)}, (2.0, 0.5, 2_000_000, 5_000_000, 0.2, 0.5, 0.05)),
        ({"ram_experts": (8, 4), "strategy": "no-prefetch"}, (1.818, 0.5, 2_000_000, 5_000_000, 0.2, 0.5, 0.05)),
        # the CPU's own memory is what is read where there is no GPU
        ({"hardware": _machine(gpu=False)}, (5.0, 0.5, 2_000_000, 5_000_000, 0.2, 0.0, 0.05)),
    ],
)
def test_the_bound_is_the_one_worked_out_by_hand(arguments: dict[str, Any], expected: tuple[float, ...]) -> None:
    assert _numbers(**arguments) == expected


def test_layers_of_different_sizes_are_weighed_by_their_bytes() -> None:
    sizes = ModelSizes((LayerSize(8, 3_000_000, 1), LayerSize(4, 1_000_000, 1)), 2, "bfloat16", 0, 0, 1, 1)
    prediction = predict(sizes, _machine(), (4, 1), (8, 4), "full")
    assert prediction is not None
    assert prediction.hit_rate == (4 / 8 + 1 / 4) / 2
    assert prediction.missed_bytes == 2 * 3_000_000 * 0.5 + 2 * 1_000_000 * 0.75
    assert prediction.read_bytes == 2 * 3_000_000 + 2 * 1_000_000


def test_without_a_rate_that_is_needed_there_is_no_bound() -> None:
    assert predict(SIZES, _machine(memory=None), (4, 4), (8, 8), "full") is None
    assert predict(SIZES, _machine(memory=None, gpu=False), (4, 4), (8, 8), "full") is None
    assert predict(SIZES, _machine(disk=None), (4, 4), (8, 7), "full") is None


def test_a_rate_that_is_not_needed_may_lack() -> None:
    assert predict(SIZES, _machine(disk=None), (4, 4), (8, 8), "full") is not None
    assert predict(SIZES, _machine(disk=None), (8, 8), (0, 0), "full") is not None


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_more_slots_are_never_slower(strategy: Strategy) -> None:
    for ram in (0, 3, 8):
        speeds = [_numbers(cache_slots=(k, k), ram_experts=(ram, ram), strategy=strategy) for k in range(9)]
        assert all(a[0] <= b[0] and a[2] >= b[2] for a, b in itertools.pairwise(speeds))
        if strategy != "naive":
            assert speeds[0][0] < speeds[8][0]


def test_more_experts_in_memory_and_faster_parts_are_never_slower() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(200):
        slots, ram = draw.randrange(9), draw.randrange(8)
        slow = _numbers(cache_slots=(slots, slots), ram_experts=(ram, ram))[0]
        assert _numbers(cache_slots=(slots, slots), ram_experts=(ram + 1, ram))[0] >= slow
        fast = _machine(memory=200_000_000, disk=2_000_000)
        assert _numbers(cache_slots=(slots, slots), ram_experts=(ram, ram), hardware=fast)[0] >= slow


def test_the_ablation_is_in_the_papers_order() -> None:
    full = _numbers()[0]
    no_prefetch = _numbers(strategy="no-prefetch")[0]
    no_cache = _numbers(strategy="no-cache", cache_slots=(0, 0))[0]
    naive = _numbers(strategy="naive", cache_slots=(0, 0))[0]
    assert full > no_prefetch > no_cache > naive
