"""Plans: memory is filled and never exceeded, what does not fit is refused with what would."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.packer import Packer
from moeflow.errors import CapacityError, DocumentError
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import LayerSize, ModelSizes
from moeflow.schema import (
    BitsAndBytesScheme,
    Cache,
    Cpu,
    CpuUse,
    DenseScheme,
    Disk,
    Gpu,
    HardwareProfile,
    HqqScheme,
    Link,
    Memory,
    Plan,
    Prefetch,
    Profile,
    Quantization,
)

MIB, GIB = 1 << 20, 1 << 30

# Mixtral 8x7B at 2 bits with groups of 16, attention at 4.
MIXTRAL = ModelSizes(
    layers=(LayerSize(8, 84 * MIB, 2 * 14336 * 4096),) * 32,
    top_k=2,
    dtype="bfloat16",
    resident_packed=700 * MIB,
    resident_dense=510 * MIB,
    kv_values_per_token=2 * 32 * 8 * 128,
    max_context=32768,
)


def _machine(vram: int | None = 12 * GIB, ram: int = 64 * GIB, capability: str = "8.6") -> HardwareProfile:
    return HardwareProfile(
        name="box",
        origin="datasheet",
        gpu=Gpu(name="g", memory=vram, compute_capability=capability, memory_bandwidth=360_000_000_000)
        if vram
        else None,
        cpu=Cpu(cores=8, memory_bandwidth=40_000_000_000),
        ram=ram,
        link=Link(host_to_device=12_000_000_000),
        disk=Disk(read=3_000_000_000),
    )


def _profile(**settings: Any) -> Profile:
    return Profile(model="x", **settings)


def _check_sums(plan: Plan, sizes: ModelSizes) -> None:
    memory = plan.memory
    parts = (memory.resident, memory.kv_cache, memory.slots, memory.staging, memory.stream, memory.workspace)
    assert min(parts) >= 0
    assert sum(parts) == memory.total <= memory.limit
    layers = list(zip(sizes.layers, plan.cache_slots, plan.ram_experts, strict=True))
    assert all(0 <= k <= y.experts and 0 <= r <= y.experts for y, k, r in layers)
    assert memory.slots == sum(k * y.blob_nbytes for y, k, _ in layers)
    assert plan.ram_nbytes == sum(r * y.blob_nbytes for y, _, r in layers)
    assert plan.ram_nbytes + plan.disk_nbytes == sizes.expert_nbytes


def _random_sizes(draw: random.Random) -> ModelSizes:
    experts = draw.randrange(2, 65)
    blob, largest = 4096 * draw.randrange(1, 20_000), draw.randrange(1, 1 << 26)
    return ModelSizes(
        layers=(LayerSize(experts, blob, largest),) * draw.randrange(1, 49),
        top_k=draw.randrange(1, min(9, experts + 1)),
        dtype=draw.choice(["float32", "bfloat16", "float16"]),
        resident_packed=draw.randrange(1 << 31),
        resident_dense=draw.randrange(1 << 31),
        kv_values_per_token=draw.randrange(1 << 18),
        max_context=draw.choice([2048, 32768, 1 << 20]),
    )


def _draws(count: int) -> list[random.Random]:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return [random.Random(seed + i) for i in range(count)]


# -- filling memory ----------------------------------------------------------------------------------------


def test_auto_fills_device_memory_and_never_exceeds_it() -> None:
    planned = 0
    for draw in _draws(1500):
        sizes = _random_sizes(draw)
        machine = _machine(vram=draw.randrange(2 * GIB, 80 * GIB), ram=draw.randrange(4 * GIB, 256 * GIB))
        vram = draw.choice(["auto", draw.randrange(GIB, machine.gpu.memory) if machine.gpu else 0])
        try:
            plan = make_plan(_profile(memory=Memory(vram=vram), context_length=draw.randrange(1, 9000)), sizes, machine)
        except CapacityError:
            continue
        planned += 1
        _check_sums(plan, sizes)
        assert plan.memory.limit <= (machine.gpu.memory if machine.gpu and vram == "auto" else vram)
        assert max(plan.cache_slots) - min(plan.cache_slots) <= 1
        one_more = sizes.layers[0].blob_nbytes
        assert min(plan.cache_slots) == sizes.layers[0].experts or plan.memory.total + one_more > plan.memory.limit
    assert planned > 300


def test_auto_on_a_cpu_stays_within_its_memory() -> None:
    planned = 0
    for draw in _draws(800):
        sizes = _random_sizes(draw)
        machine = _machine(vram=None, ram=draw.randrange(4 * GIB, 256 * GIB))
        try:
            plan = make_plan(_profile(), sizes, machine)
        except CapacityError:
            continue
        planned += 1
        _check_sums(plan, sizes)
        assert plan.memory.total + plan.ram_nbytes <= machine.ram
        assert plan.device == "cpu"
    assert planned > 100


def test_a_refusal_names_the_slots_that_fit_and_these_do_plan() -> None:
    refused = 0
    for draw in _draws(1500):
        sizes = _random_sizes(draw)
        machine = _machine(vram=draw.randrange(2 * GIB, 60 * GIB), ram=256 * GIB)
        asked = draw.randrange(1, sizes.layers[0].experts + 1)
        try:
            make_plan(_profile(cache=Cache(experts_per_layer=asked)), sizes, machine)
        except CapacityError as error:
            told = re.search(r": (\d+) would fit$", str(error))
            if not told:
                assert "before the first cached expert" in str(error)
                with pytest.raises(CapacityError, match="before the first cached expert"):
                    make_plan(_profile(cache=Cache(experts_per_layer=0)), sizes, machine)
                continue
            refused += 1
            fitting = int(told[1])
            assert fitting < asked
            assert f"cache.experts_per_layer is {asked}; " in str(error)
            plan = make_plan(_profile(cache=Cache(experts_per_layer=fitting)), sizes, machine)
            assert set(plan.cache_slots) == {fitting}
            with pytest.raises(CapacityError):
                make_plan(_profile(cache=Cache(experts_per_layer=fitting + 1)), sizes, machine)
    assert refused > 30


def test_whatever_auto_chooses_may_be_asked_for() -> None:
    for draw in _draws(300):
        sizes = _random_sizes(draw)
        machine = _machine(vram=draw.randrange(2 * GIB, 60 * GIB), ram=256 * GIB)
        try:
            plan = make_plan(_profile(), sizes, machine)
        except CapacityError:
            continue
        if len(set(plan.cache_slots)) == 1:
            again = make_plan(_profile(cache=Cache(experts_per_layer=plan.cache_slots[0])), sizes, machine)
            assert again == plan


def test_the_papers_case_fits_a_12_gb_card() -> None:
    plan = make_plan(_profile(), MIXTRAL, _machine())
    assert set(plan.cache_slots) == {2, 3}
    assert plan.stream_layers == 2
    assert plan.ram_experts == (8,) * 32
    assert plan.disk_nbytes == 0
    assert plan.memory.limit == 11 * GIB
    assert plan.prediction is not None


def test_a_large_card_caches_every_expert() -> None:
    plan = make_plan(_profile(), MIXTRAL, _machine(vram=80 * GIB))
    assert set(plan.cache_slots) == {8}
    assert plan.prediction is not None
    assert plan.prediction.hit_rate == 1


def test_layers_of_different_sizes_share_one_k_that_fits() -> None:
    sizes = ModelSizes(
        (LayerSize(8, 100 * MIB, 1), LayerSize(4, 300 * MIB, 1)), 2, "bfloat16", 0, 0, 1024, 4096
    )  # fmt: skip
    plan = make_plan(_profile(memory=Memory(vram=4 * GIB)), sizes, _machine())
    _check_sums(plan, sizes)
    assert plan.memory.staging == plan.staging_slots * 400 * MIB


def test_buffers_for_prefill_never_take_the_room_of_the_cache() -> None:
    plan = make_plan(_profile(memory=Memory(vram=3 * GIB), context_length=512), MIXTRAL, _machine())
    assert plan.stream_layers == 0
    assert plan.memory.stream == 0
    assert make_plan(_profile(memory=Memory(vram=8 * GIB)), MIXTRAL, _machine()).stream_layers == 2


# -- refusals ----------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_at_all_says_what_takes_the_room() -> None:
    with pytest.raises(CapacityError) as caught:
        make_plan(_profile(memory=Memory(vram=GIB)), MIXTRAL, _machine())
    message = str(caught.value)
    for part in ("of resident weights", "of KV cache", "of buffers", "of workspace", "the limit is 1 GiB"):
        assert part in message
    assert message.endswith("lower context_length or the bits of quantization.attention")


@pytest.mark.parametrize(
    ("memory", "gpu", "message"),
    [
        (
            {"vram": 13 * GIB},
            True,
            "memory.vram is 13 GiB; box has 12 GiB of device memory: lower it or set it to auto",
        ),
        ({"vram": 65 * GIB}, False, "memory.vram is 65 GiB; box has 64 GiB of memory: lower it or set it to auto"),
        ({"ram": 65 * GIB}, True, "memory.ram is 65 GiB; box has 64 GiB: lower it or set it to auto"),
    ],
)
def test_more_than_the_machine_has_is_refused(memory: dict[str, int], gpu: bool, message: str) -> None:
    with pytest.raises(CapacityError) as caught:
        make_plan(_profile(memory=Memory.model_validate(memory)), MIXTRAL, _machine(vram=12 * GIB if gpu else None))
    assert str(caught.value) == message


def test_all_of_the_machine_is_not_more_than_it_has() -> None:
    memory = Memory(vram=12 * GIB, ram=64 * GIB)
    assert make_plan(_profile(memory=memory), MIXTRAL, _machine()).memory.limit == 12 * GIB


def test_on_a_cpu_both_kinds_of_memory_are_one() -> None:
    memory = Memory(vram=30 * GIB, ram=30 * GIB)
    machine = _machine(vram=None, ram=40 * GIB)
    with pytest.raises(CapacityError, match=r"memory\.ram"):
        make_plan(_profile(memory=memory, cache=Cache(experts_per_layer=8)), MIXTRAL, machine)


def test_without_a_gpu_experts_that_fit_are_not_copied() -> None:
    """Nor are they where the profile is about copies, or weights are not packed, or some lie on the disk."""
    big, small = _machine(vram=None, ram=64 * GIB), _machine(vram=None, ram=24 * GIB)
    plan = make_plan(_profile(), MIXTRAL, big)
    assert plan.cpu and set(plan.cache_slots) == {0} and set(plan.ram_experts) == {8} and not plan.disk_nbytes
    assert (plan.prefetch.depth, plan.stream_layers, plan.memory.slots) == (0, 0, 0)
    assert plan.prediction and plan.prediction.missed_bytes == 0 < plan.prediction.computed_bytes
    assert make_plan(_profile(cache=Cache(experts_per_layer=0)), MIXTRAL, big) == plan
    for copying in (
        _profile(cache=Cache(experts_per_layer=2)),
        _profile(prefetch=Prefetch(depth=1)),
        _profile(cpu=CpuUse(experts="off")),
    ):
        found = make_plan(copying, MIXTRAL, big)
        assert min(found.cache_slots) > 0 and found.prefetch.depth == 1 and found.stream_layers == 2
    assert min(make_plan(_profile(strategy="no-prefetch"), MIXTRAL, big).cache_slots) > 0
    away = make_plan(_profile(), MIXTRAL, small)
    assert away.disk_nbytes > 0 and away.prefetch.depth == 1


def test_more_slots_than_experts_are_refused() -> None:
    with pytest.raises(DocumentError, match=r"^cache\.experts_per_layer is 9; the model has 8 experts per layer$"):
        make_plan(_profile(cache=Cache(experts_per_layer=9)), MIXTRAL, _machine(vram=80 * GIB))


def test_more_guesses_than_experts_are_refused() -> None:
    with pytest.raises(DocumentError, match=r"^prefetch\.experts is 9; the model has 8 experts per layer$"):
        make_plan(_profile(prefetch=Prefetch(experts=9)), MIXTRAL, _machine())


# -- choices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "slots", "depth", "predictor", "stream"),
    [
        ("full", {2, 3}, 1, "next-gate", 2),
        ("no-prefetch", {2, 3}, 0, "none", 2),
        ("no-cache", {0}, 0, "none", 2),
        ("naive", {0}, 0, "none", 2),
    ],
)
def test_each_strategy_leaves_out_its_parts(
    strategy: str, slots: set[int], depth: int, predictor: str, stream: int
) -> None:
    plan = make_plan(_profile(strategy=strategy), MIXTRAL, _machine())
    assert plan.strategy == strategy
    assert set(plan.cache_slots) == slots
    assert (plan.prefetch.depth, plan.prefetch.predictor) == (depth, predictor)
    assert plan.stream_layers == stream
    _check_sums(plan, MIXTRAL)


def test_naive_needs_its_layer_buffers_or_is_refused() -> None:
    memory = Memory(vram=3 * GIB)
    with pytest.raises(CapacityError, match="of buffers"):
        make_plan(_profile(strategy="naive", memory=memory, context_length=512), MIXTRAL, _machine())


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [("7.5", "float16"), ("6.1", "float16"), ("8.0", "bfloat16"), ("8.9", "bfloat16"), ("9.0", "bfloat16"),
     ("10.0", "bfloat16"), ("12.1", "bfloat16"), (None, "float32")],
)  # fmt: skip
def test_the_dtype_is_what_the_device_computes_in(capability: str | None, dtype: str) -> None:
    machine = _machine(capability=capability) if capability else _machine(vram=None)
    assert make_plan(_profile(), MIXTRAL, machine).dtype == dtype


def test_a_dtype_that_is_asked_for_is_taken() -> None:
    assert make_plan(_profile(dtype="float16"), MIXTRAL, _machine()).dtype == "float16"


def test_a_wider_dtype_takes_more_memory() -> None:
    narrow, wide = (
        make_plan(_profile(dtype=dtype), MIXTRAL, _machine(vram=80 * GIB)).memory for dtype in ("float16", "float32")
    )
    assert wide.kv_cache == 2 * narrow.kv_cache == 2 * 4096 * MIXTRAL.kv_values_per_token * 2
    assert wide.resident - narrow.resident == MIXTRAL.resident_dense
    assert narrow.resident == MIXTRAL.resident_packed + MIXTRAL.resident_dense


@pytest.mark.parametrize(("asked", "planned"), [(100, 100), (32768, 32768), (40000, 32768)])
def test_the_context_is_no_longer_than_the_model_was_made_for(asked: int, planned: int) -> None:
    plan = make_plan(_profile(context_length=asked), MIXTRAL, _machine(vram=80 * GIB))
    assert plan.context_length == planned
    assert plan.memory.kv_cache == planned * MIXTRAL.kv_values_per_token * 2


def test_a_prefetch_that_is_asked_for_is_taken_and_gets_its_buffers() -> None:
    plain = make_plan(_profile(), MIXTRAL, _machine(vram=80 * GIB))
    plan = make_plan(_profile(prefetch=Prefetch(depth=2, experts=3)), MIXTRAL, _machine(vram=80 * GIB))
    assert (plain.prefetch.depth, plain.prefetch.experts) == (1, 2)
    assert (plan.prefetch.depth, plan.prefetch.experts) == (2, 3)
    assert plain.staging_slots >= 2 + 2
    assert plan.staging_slots >= 2 + 2 * 3
    assert plan.memory.staging == plan.staging_slots * 84 * MIB


def test_memory_that_no_whole_k_fills_is_slots_of_some_layers_spread_over_the_depth() -> None:
    per_k, before = 32 * 84 * MIB, 0
    for eighth in range(9):
        memory = Memory(vram=9 * GIB + eighth * per_k // 8)
        plan = make_plan(_profile(memory=memory), MIXTRAL, _machine(vram=80 * GIB))
        plain = make_plan(_profile(memory=memory, execution="host"), MIXTRAL, _machine(vram=80 * GIB))
        assert (plan.execution, plain.staging_slots) == ("device", 4)
        assert sum(plan.cache_slots) >= sum(plain.cache_slots)  # the host-driven path takes more workspace
        _check_sums(plan, MIXTRAL)
        assert plan.memory.limit - plan.memory.total < 84 * MIB
        assert sum(plan.cache_slots) > before
        before = sum(plan.cache_slots)
        halves = sum(plan.cache_slots[:16]), sum(plan.cache_slots[16:])
        assert abs(halves[0] - halves[1]) <= 1


def test_buffers_land_the_experts_of_several_tokens_where_they_are_cheap_or_nothing_else_wants_the_memory() -> None:
    """Enough for all experts of a layer, or of eight tokens, and the guesses."""
    many = replace(MIXTRAL, layers=(LayerSize(128, 3 * MIB, 2 * 768 * 2048),) * 48, top_k=8)
    for vram, all_cached in ((12 * GIB, False), (80 * GIB, True)):
        plan = make_plan(_profile(), many, _machine(vram=vram))
        assert plan.staging_slots == 8 * 8 + 8
        assert (min(plan.cache_slots) == 128) == all_cached
    assert make_plan(_profile(), MIXTRAL, _machine()).staging_slots == 4
    assert make_plan(_profile(), MIXTRAL, _machine(vram=80 * GIB)).staging_slots == 8 + 2


def test_no_predictor_is_no_prefetch() -> None:
    plan = make_plan(_profile(prefetch=Prefetch(predictor="none", depth=3)), MIXTRAL, _machine())
    assert (plan.prefetch.depth, plan.prefetch.experts) == (0, 0)


def test_the_policy_that_is_asked_for_is_taken() -> None:
    assert make_plan(_profile(cache=Cache(policy="lfu")), MIXTRAL, _machine()).policy == "lfu"


# -- tiers -------------------------------------------------------------------------------------------------


def test_experts_that_do_not_fit_memory_are_on_disk() -> None:
    plan = make_plan(_profile(memory=Memory(ram=10 * GIB)), MIXTRAL, _machine())
    _check_sums(plan, MIXTRAL)
    assert set(plan.ram_experts) == {3}  # 10 of 21 GiB
    assert plan.ram_nbytes <= 10 * GIB
    assert plan.prediction is not None
    assert plan.prediction.decode.disk > 0


def test_memory_for_experts_is_filled_and_never_exceeded() -> None:
    for draw in _draws(500):
        sizes = _random_sizes(draw)
        budget = draw.randrange(sizes.expert_nbytes + 1)
        machine = _machine(vram=80 * GIB, ram=max(GIB, 2 * sizes.expert_nbytes))
        try:
            plan = make_plan(_profile(memory=Memory(ram=budget)), sizes, machine)
        except CapacityError:
            continue
        assert plan.ram_nbytes <= budget
        one_more = sum(layer.blob_nbytes for layer in sizes.layers)
        assert plan.disk_nbytes == 0 or plan.ram_nbytes + one_more > budget


def test_auto_leaves_memory_for_the_system() -> None:
    plan = make_plan(_profile(), MIXTRAL, _machine(ram=16 * GIB))
    assert 0 < plan.ram_nbytes <= 14 * GIB
    assert plan.disk_nbytes > 0
    assert make_plan(_profile(), MIXTRAL, _machine(ram=GIB)).ram_nbytes == 0


@pytest.mark.parametrize("disk", [0, 5 * GIB])
def test_a_disk_that_is_too_small_or_forbidden_is_refused_with_the_numbers(disk: int) -> None:
    with pytest.raises(CapacityError) as caught:
        make_plan(_profile(memory=Memory(ram=10 * GIB, disk=disk)), MIXTRAL, _machine())
    message = str(caught.value)
    assert message.startswith("the experts take 21 GiB; memory.ram leaves 10 GiB for them and memory.disk ")
    assert message.endswith("13.1 GiB on disk would be needed")
    assert make_plan(_profile(memory=Memory(ram=10 * GIB, disk=14 * GIB)), MIXTRAL, _machine())


def test_a_disk_that_is_not_needed_may_be_forbidden() -> None:
    assert make_plan(_profile(memory=Memory(disk=0)), MIXTRAL, _machine()).disk_nbytes == 0


def test_a_plan_is_the_same_again_and_survives_its_file(tmp_path: Path) -> None:
    plan = make_plan(_profile(), MIXTRAL, _machine())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan == make_plan(_profile(), MIXTRAL, _machine())


# -- sizes -------------------------------------------------------------------------------------------------

QUANTIZATIONS = [
    Quantization(experts=HqqScheme(bits=2, group_size=16), attention=HqqScheme(bits=3, group_size=32)),
    Quantization(experts=HqqScheme(bits=3), attention=DenseScheme()),
    Quantization(experts=DenseScheme(), attention=HqqScheme(bits=8)),
    Quantization(
        experts=HqqScheme(bits=2, group_size=16, metadata_bits=8), attention=BitsAndBytesScheme(format="int8")
    ),
    Quantization(experts=BitsAndBytesScheme(format="nf4"), attention=HqqScheme(bits=3, metadata_bits=8)),
]


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda q: f"{q.experts.label}, {q.attention.label}")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_sizes_before_packing_are_those_after(
    checkpoint_factory: Callable[..., Path], tmp_path: Path, family: str, quantization: Quantization
) -> None:
    checkpoint = Checkpoint.open(checkpoint_factory(family, experts=3))
    manifest = Packer(checkpoint, "x", quantization, tmp_path).run()
    assert ModelSizes.of_checkpoint(checkpoint, quantization) == ModelSizes.of_manifest(manifest)


def test_a_group_size_that_does_not_fit_is_refused_before_packing(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    for quantization in (
        Quantization(experts=HqqScheme(group_size=128)),
        Quantization(attention=HqqScheme(group_size=128)),
    ):
        with pytest.raises(DocumentError, match="group_size 64, 32, 16 would fit"):
            ModelSizes.of_checkpoint(checkpoint, quantization)
