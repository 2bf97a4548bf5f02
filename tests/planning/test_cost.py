"""The cost model: sums done by hand on a round machine, and what must hold on any."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from machines import KERNELS, MACHINE, PLAIN, RUNNING, SIZES, machine

from moeflow.planning.cost import Running, predict
from moeflow.planning.sizes import LayerSize, ModelSizes
from moeflow.schema import Cpu, Disk, Gpu, HardwareProfile, Link, LinkPoint, Prediction

US, MB, GB = 1e-6, 10**6, 10**9
HALF = (0.5, 0.5)
GIVEN = 5e-4  # a prediction has four digits


def predicted(running: Running, hardware: HardwareProfile = MACHINE, **more: Any) -> Prediction:
    found = predict(more.pop("sizes", SIZES), hardware, running, **more)
    assert found is not None
    return found


def close(seconds: float) -> Any:
    return pytest.approx(seconds, rel=GIVEN)


# -- by hand -----------------------------------------------------------------------------------------------


def test_a_token_whose_misses_wait() -> None:
    found = predicted(PLAIN, hits=HALF)
    parts = found.decode
    assert parts.dense == close(100 * US)  # 95 MB at 0.95 of 1,000 GB/s
    # Two experts a layer are 6 MB: 4 and then 2 at 500 GB/s, 2 us before each: 10 + 6.
    assert parts.experts == close(32 * US)
    assert parts.launches == close(2 * (20 + 4 * 0.042) * US)  # four experts to route to
    # No miss in 1 layer of 4, one in 2 (5 + 375 us), two in 1 (5 + 750); the first product hides 10 us of each.
    assert parts.misses == close(2 * (0.5 * 370 + 0.25 * 745) * US)
    assert parts.disk == 0
    assert found.hidden == close(2 * 0.75 * 10 * US)
    assert (found.missed_bytes, found.guessed_bytes, found.wasted_bytes) == (6 * MB, 0, 0)
    assert found.read_bytes == 95 * MB + 2 * 6 * MB
    assert found.hit_rate == 0.5
    assert found.tokens_per_second == close(1 / (914.836 * US))
    assert (found.low, found.high) == (close(0.9 / (914.836 * US)), close(1.1 / (914.836 * US)))
    assert found.assumed == ()


def test_a_guess_fills_the_time_in_which_the_link_would_idle() -> None:
    found = predicted(RUNNING, hits=HALF, recall=0.8)
    # The second layer only. Its 16 + 20.168 + 50 us, less 10 in which nothing travels and the 7.5 that misses take:
    # 68.668 us at 8 GB/s, if the one guess is not cached.
    brought = 0.5 * 68.668 * US * 8 * GB
    used = 0.8 * brought
    assert found.guessed_bytes == round(brought)
    assert found.wasted_bytes == round(brought - used)
    assert found.missed_bytes == round(6 * MB - used)
    assert found.decode.misses == close((371.25 + 371.25 * (1 - used / (3 * MB))) * US)
    assert found.hidden == close((2 * 378.75 - 371.25 * (2 - used / (3 * MB))) * US)


def test_a_guess_that_is_surely_right_and_fits_the_window_leaves_its_share() -> None:
    fast = machine(link=Link(host_to_device=1000 * GB))  # 3 MB in 3.3 us
    found = predicted(RUNNING, fast, hits=HALF, recall=1.0)
    # 1.5 MB of the 3 that the second layer lacks on average. The first product hides a third of 8.261 and of 11.522 us.
    assert found.guessed_bytes == 1_500_000
    assert found.wasted_bytes == 0
    assert found.missed_bytes == 4_500_000
    assert found.decode.misses == close(1.5 * (0.5 * 8.261 + 0.25 * 11.522) * 2 / 3 * US)


def test_guesses_bring_no_more_than_is_needed() -> None:
    fast = machine(link=Link(host_to_device=1000 * GB))
    found = predicted(replace(RUNNING, guessed=4), fast, hits=HALF, recall=1.0)
    assert (found.guessed_bytes, found.wasted_bytes, found.missed_bytes) == (6 * MB, 3 * MB, 3 * MB)


def test_guesses_that_are_never_right_are_all_wasted() -> None:
    found = predicted(RUNNING, hits=HALF, recall=0.0)
    assert found.wasted_bytes == found.guessed_bytes > 0
    assert found.decode == predicted(PLAIN, hits=HALF).decode


def test_hits_alone_leave_the_link_idle() -> None:
    found = predicted(replace(RUNNING, slots=(4, 4)), hits=(1.0, 1.0))
    assert (found.decode.misses, found.missed_bytes, found.guessed_bytes, found.hidden) == (0, 0, 0, 0)
    assert found.tokens_per_second == close(1 / (172.336 * US))


def test_without_a_cache_all_is_missed() -> None:
    found = predicted(replace(PLAIN, strategy="no-cache"), hits=HALF)
    assert found.hit_rate == 0
    assert found.missed_bytes == 12 * MB
    assert found.decode.misses == close(2 * (5 + 750 - 10) * US)


def test_naive_streams_whole_layers_behind_computing() -> None:
    found = predicted(replace(PLAIN, strategy="naive"), hits=HALF)
    compute = 16 + 20.168 + 50  # of a layer
    assert found.missed_bytes == 24 * MB
    assert found.decode.misses == close(2 * (1200 - compute) * US)
    assert found.hidden == close(2 * compute * US)


def test_what_lies_on_the_disk_is_read_there_first() -> None:
    half = (2, 2)  # experts in RAM
    assert predicted(replace(PLAIN, ram_experts=half), hits=HALF).decode.disk == close(2 * 0.5 * 3e-3)
    naive = predicted(replace(PLAIN, strategy="naive", ram_experts=half), hits=HALF)
    assert naive.decode.disk == close(2 * 0.5 * 12e-3)
    assert naive.prefill.disk == close(12e-3)


def test_experts_of_unequal_size_count_with_their_own_bytes() -> None:
    layer = replace(SIZES.layers[0], blobs=(3 * MB, 3 * MB, MB, MB))  # 2 MB on average
    found = predicted(replace(PLAIN, ram_experts=(2, 2)), sizes=replace(SIZES, layers=(layer,) * 2), hits=HALF)
    assert found.missed_bytes == 4 * MB
    assert found.decode.disk == close(2 * 2e-3 / 4)  # 2 MB of misses a layer, of which 2 MB of 8 are on disk


def test_a_prompt() -> None:
    found = predicted(PLAIN, hits=HALF).prefill
    assert found.tokens == 512
    assert found.link == close(24 * MB / (10 * GB))
    unpacked = (24 * MB + 4 * 24 * MB) / (1000 * GB)  # 8 experts of 3 MB and of 3 million weights
    products = 2 * 512 * 2 * 2 * 3e6 / (150 * 1000 * GB)
    assert found.compute == close(unpacked + products + 8 * 46 * US)
    assert found.total == found.link


def test_a_cpu_computes_by_weights_and_cores() -> None:
    found = predicted(PLAIN, machine(gpu=None), hits=HALF)
    assert found.decode.dense == close(95 * MB / (0.95 * 20 * GB))
    assert found.decode.experts == close(2 * 6e6 / (2 * 2e8))
    assert found.decode.launches == close(2 * 2.6e-3)
    assert found.prefill.compute == close(24e6 / (2 * 2e8))
    assert found.assumed == ("computing, as measured on two cores of a server",)


def test_a_host_that_drives_a_gpu_takes_its_own_time_and_unpacks() -> None:
    found = predicted(replace(PLAIN, execution="host"), hits=HALF)
    assert found.decode.launches == close(2 * 2.0e-3)
    assert found.decode.experts == close(2 * (6 * MB + 57 * 6e6) / (1000 * GB))
    assert found.assumed == ("the host's work for a layer, as measured on an H100 and an H200",)
    assert found.low == pytest.approx(0.75 * found.tokens_per_second, rel=1e-3)
    copies = replace(RUNNING, slots=(0, 0), strategy="no-cache", execution="host")
    slow = predicted(copies, machine(link=Link(host_to_device=GB // 10)))  # 0.92 of it by a kernel
    computing = slow.decode.experts
    assert slow.decode.misses == pytest.approx(2 * (5e-6 + 6 * MB / (0.092 * GB)) - computing, rel=1e-3)


def test_latent_attention_takes_longer_as_on_the_h100() -> None:
    found = predicted(PLAIN, sizes=replace(SIZES, latent=True), hits=HALF)
    assert found.decode.launches == close(2 * (113 * 20 / 33.8 + 4 * 0.042) * US)
    assert found.assumed == ("latent attention's share of a layer, as measured on an H100",)
    assert found.prefill.compute > predicted(PLAIN, hits=HALF).prefill.compute + 2 * 5.7e-3


# -- what is not known -------------------------------------------------------------------------------------


def test_without_a_rate_that_is_needed_there_is_no_prediction() -> None:
    unknown = machine(gpu=Gpu(name="g", memory=GB, compute_capability="9.0"))
    assert predict(SIZES, unknown, RUNNING) is None
    assert predict(SIZES, machine(gpu=None, cpu=Cpu(cores=2)), RUNNING) is None
    no_disk = machine(disk=None)
    assert predict(SIZES, no_disk, replace(RUNNING, ram_experts=(4, 3))) is None
    assert predict(SIZES, no_disk, RUNNING) is not None


def test_the_range_is_wider_where_kernels_were_not_measured_and_routes_are_not_known() -> None:
    plain = Gpu(name="g", memory=80 * GB, compute_capability="9.0", memory_bandwidth=1000 * GB)
    known, assumed = predicted(RUNNING, hits=HALF), predicted(RUNNING, machine(gpu=plain), hits=HALF)
    assert known.high / known.tokens_per_second == pytest.approx(1.1, rel=2 * GIVEN)
    assert assumed.high / assumed.tokens_per_second == pytest.approx(1.25, rel=2 * GIVEN)
    assert assumed.low / assumed.tokens_per_second == pytest.approx(0.75, rel=2 * GIVEN)
    unseen = predicted(RUNNING)
    assert unseen.assumed == ("routes repeat as Mixtral's do",)
    worst = predicted(RUNNING, hits=HALF, recall=0.5)  # two of four slots, no habits, guesses as good as none
    assert unseen.low == pytest.approx(0.9 * worst.tokens_per_second, rel=2 * GIVEN)
    assert worst.tokens_per_second < unseen.tokens_per_second


# -- on any machine ----------------------------------------------------------------------------------------


def _draws(count: int) -> list[random.Random]:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return [random.Random(seed + i) for i in range(count)]


def _machine(draw: random.Random) -> HardwareProfile:
    return machine(
        gpu=Gpu(
            name="g",
            memory=80 * GB,
            compute_capability=draw.choice(["7.5", "8.6", "9.0"]),
            memory_bandwidth=int(10 ** draw.uniform(11, 12.6)),
            kernels=draw.choice([None, KERNELS]),
        ),
        cpu=Cpu(cores=draw.choice([2, 16])),
        link=Link(host_to_device=int(10 ** draw.uniform(9.3, 10.8))),
        disk=Disk(read=int(10 ** draw.uniform(8, 10))),
    )


def _sizes(draw: random.Random) -> ModelSizes:
    experts, blob = draw.choice([4, 8, 16, 64, 128]), int(2 ** draw.uniform(16, 27))
    layer = LayerSize(
        experts, blob, 1, hidden=1024, inner=blob // 1536 + 1, format=draw.choice(["2-bit", "4-bit", "nf4"])
    )
    return ModelSizes(
        layers=(layer,) * draw.choice([1, 2, 8, 32]),
        top_k=draw.randrange(1, min(8, experts // 2) + 1),
        dtype="bfloat16",
        resident_packed=draw.randrange(1 << 31),
        resident_dense=draw.randrange(1 << 30),
        kv_values_per_token=1,
        max_context=10,
    )


def _running(draw: random.Random, sizes: ModelSizes) -> Running:
    layers, experts = len(sizes.layers), sizes.layers[0].experts
    return Running(
        slots=(draw.randrange(experts),) * layers,
        ram_experts=(draw.randrange(experts),) * layers,
        strategy=draw.choice(["full", "no-prefetch", "no-cache", "naive"]),
        execution=draw.choice(["device", "host"]),
        guessed=draw.choice([0, 1, sizes.top_k]),
    )


def _more(counts: Any) -> tuple[int, ...]:
    return tuple(n + 1 for n in counts)


def test_what_is_better_is_never_slower() -> None:
    for draw in _draws(400):
        sizes, box = _sizes(draw), _machine(draw)
        running = _running(draw, sizes)
        base = predicted(running, box, sizes=sizes).tokens_per_second
        factor = draw.uniform(1, 3)
        assert box.gpu
        assert box.disk
        link = Link(host_to_device=int(factor * box.link.host_to_device))
        memory = box.gpu.model_copy(update={"memory_bandwidth": int(factor * (box.gpu.memory_bandwidth or 0))})
        better = {
            "slots": (replace(running, slots=_more(running.slots)), box),
            "experts in RAM": (replace(running, ram_experts=_more(running.ram_experts)), box),
            "link": (running, box.model_copy(update={"link": link})),
            "disk": (running, box.model_copy(update={"disk": Disk(read=int(factor * box.disk.read))})),
            "memory": (running, box.model_copy(update={"gpu": memory})),
        }
        for what, (changed, on) in better.items():
            found = predicted(changed, on, sizes=sizes)
            assert found.tokens_per_second >= base * (1 - GIVEN), (what, sizes, box, running)


def test_each_strategy_is_no_slower_than_the_next_without_its_part() -> None:
    streamed = 0
    for draw in _draws(400):
        sizes, box = _sizes(draw), _machine(draw)
        running = replace(_running(draw, sizes), guessed=sizes.top_k)
        full, plain, uncached, naive = (
            predicted(replace(running, strategy=strategy), box, sizes=sizes)
            for strategy in ("full", "no-prefetch", "no-cache", "naive")
        )
        for better, worse in ((full, plain), (plain, uncached)):
            assert better.tokens_per_second >= worse.tokens_per_second * (1 - GIVEN)
        # Whole layers hide behind computing, misses hardly: naive loses only where the link is what bounds it.
        if sizes.layers[0].experts >= 4 * sizes.top_k and naive.decode.misses > naive.hidden:
            streamed += 1
            assert uncached.tokens_per_second > naive.tokens_per_second
    assert streamed > 20


def test_the_parts_are_the_whole_and_the_range_holds_it() -> None:
    for draw in _draws(400):
        sizes, box = _sizes(draw), _machine(draw)
        recall = draw.choice([0.0, 0.5, 0.9, 1.0])
        hits = draw.choice([None, [draw.random() for _ in sizes.layers]])
        found = predicted(_running(draw, sizes), box, sizes=sizes, hits=hits, recall=recall)
        parts = found.decode
        assert min(parts.dense, parts.experts, parts.launches, parts.misses, parts.disk) >= 0
        total = parts.dense + parts.experts + parts.launches + parts.misses + parts.disk
        assert total == parts.total
        assert found.tokens_per_second * total == pytest.approx(1, rel=2 * GIVEN)
        assert found.low < found.tokens_per_second < found.high
        assert 0 <= found.wasted_bytes <= found.guessed_bytes
        assert found.missed_bytes >= 0
        assert found.hidden >= -1e-12
        assert found.prefill.total == max(found.prefill.link, found.prefill.compute, found.prefill.disk)


def test_the_copy_engine_helps_where_it_is_used_only() -> None:
    """16 cores have it, 3 do not: layers of 24 MB of misses gain, those of two small blobs do not."""
    large = replace(SIZES, layers=(replace(SIZES.layers[0], blob_nbytes=12 * MB),) * 2)
    few, many = (machine(cpu=Cpu(cores=n), link=Link(host_to_device=10 * GB)) for n in (3, 4))
    plain = replace(PLAIN, strategy="no-cache")
    gained = predicted(plain, few, sizes=large).decode.misses - predicted(plain, many, sizes=large).decode.misses
    assert gained == pytest.approx(2 * (24 * MB / (9.2 * GB) - 24 * MB / (9.77 * GB)), rel=0.01)
    assert predicted(plain, few).decode == predicted(plain, many).decode


def test_points_of_a_probe_say_how_fast_a_kernel_copies() -> None:
    points = tuple(LinkPoint(nbytes=n * MB, engine=10 * GB, kernel=rate * GB) for n, rate in ((1, 2), (64, 6)))
    found = predicted(PLAIN, machine(link=Link(host_to_device=10 * GB, by_size=points)), hits=(0.0, 0.0))
    assert found.decode.misses == close(2 * (5 + 1000 - 10) * US)  # 6 MB at the largest copies' 6 GB/s
