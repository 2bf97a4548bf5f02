"""What autotune compares, in which order, what it takes, and what it says where nothing fits."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from moeflow.artifact.architectures import architecture
from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.shapes import config_checkpoint
from moeflow.errors import CapacityError, DocumentError, UsageError
from moeflow.planning.least import MIB, least
from moeflow.planning.planner import make_plan
from moeflow.planning.search import SAME, Candidate, candidates, choose
from moeflow.probe.match import find_hardware
from moeflow.schema import Cache, Cpu, Disk, Gpu, HardwareProfile, Link, Memory, Plan, Prefetch, Profile

GIB = 1 << 30
OLMOE = config_checkpoint(architecture("olmoe-1b-7b"), "olmoe-1b-7b")
MIXTRAL = config_checkpoint(architecture("mixtral-8x7b"), "mixtral-8x7b")
PAPER = ("a100-80gb", "rtx-3080-mobile", "rtx-3060", "t4")
LABELS = ["4-bit g64", "3-bit g64", "2-bit g16 meta8", "2-bit g64"]
ATTENTION = ["unquantized", "4-bit g64"]


def _base(**settings: Any) -> Profile:
    return Profile(model="x", **settings)


def _bits(found: Sequence[Candidate]) -> list[tuple[str, str]]:
    quantizations = [c.profile.quantization for c in found]
    return [(q.experts.label, q.attention.label) for q in quantizations]


def _draws(count: int) -> list[random.Random]:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return [random.Random(seed + i) for i in range(count)]


def _random_machine(draw: random.Random) -> HardwareProfile:
    gpu = Gpu(
        name="g",
        memory=draw.randrange(2 * GIB, 26 * GIB),
        compute_capability=draw.choice(["7.0", "7.5", "8.6", "9.0"]),
        memory_bandwidth=draw.choice([None, 300_000_000_000]),
    )
    return HardwareProfile(
        name="box",
        origin="datasheet",
        gpu=draw.choice([gpu, gpu, None]),
        cpu=Cpu(cores=draw.randrange(1, 17), memory_bandwidth=40_000_000_000),
        ram=draw.randrange(3 * GIB, 40 * GIB),
        link=Link(host_to_device=draw.randrange(4, 50) * 10**9),
        disk=draw.choice([None, Disk(read=draw.randrange(1, 70) * 10**8)]),
    )


def _random_limits(draw: random.Random, machine: HardwareProfile) -> Memory:
    has = machine.gpu.memory if machine.gpu else machine.ram
    return Memory(
        vram=draw.choice(["auto", draw.randrange(has // 8, has)]),
        ram=draw.choice(["auto", draw.randrange(0, machine.ram)]),
        disk=draw.choice(["auto", 0, draw.randrange(0, 8 * GIB)]),
    )


# -- candidates --------------------------------------------------------------------------------------------


def test_candidates_go_from_the_best_quality_to_the_smallest() -> None:
    found = candidates(OLMOE, _base(), find_hardware("rtx-3060"))
    assert _bits(found) == [(experts, attention) for experts in LABELS for attention in ATTENTION]
    sizes = [c.expert_nbytes for c in found[::2]]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    for unquantized, packed in zip(found[::2], found[1::2], strict=True):
        assert unquantized.expert_nbytes == packed.expert_nbytes
        assert unquantized.plan is not None and packed.plan is not None
        assert unquantized.plan.memory.resident > packed.plan.memory.resident


def test_what_the_base_fixes_stays() -> None:
    base = _base(memory=Memory(vram=6 * GIB), cache=Cache(policy="lfu"), context_length=777, dtype="float16")
    for found in candidates(OLMOE, base, find_hardware("rtx-3060")):
        assert found.profile.model_copy(
            update={"quantization": base.quantization, "prefetch": base.prefetch}
        ) == base  # fmt: skip
        assert found.plan is not None
        assert (found.plan.policy, found.plan.context_length, found.plan.dtype) == ("lfu", 777, "float16")
        assert found.plan.memory.total <= found.plan.memory.limit == 6 * GIB


@pytest.mark.parametrize(
    ("least_bits", "labels"),
    [(2, LABELS), (3, LABELS[:2]), (4, LABELS[:1]), (5, ["8-bit g64"]), (8, ["8-bit g64"])],
)
def test_the_least_bits(least_bits: int, labels: list[str]) -> None:
    found = candidates(OLMOE, _base(), find_hardware("rtx-3060"), least_bits)
    assert _bits(found) == [(experts, attention) for experts in labels for attention in ATTENTION]


def test_more_bits_than_there_are_are_refused() -> None:
    with pytest.raises(UsageError, match="no choice has 9 bits or more; experts may have 8, 4, 3, 2"):
        candidates(OLMOE, _base(), find_hardware("rtx-3060"), 9)


def test_choices_whose_groups_do_not_fit_are_left_out() -> None:
    narrow = config_checkpoint(architecture("olmoe-1b-7b") | {"intermediate_size": 1040}, "narrow")  # 65 groups of 16
    assert _bits(candidates(narrow, _base(), find_hardware("rtx-3060"))) == [
        ("2-bit g16 meta8", attention) for attention in ATTENTION
    ]
    with pytest.raises(DocumentError, match="1040 inputs, not a multiple of 64"):
        candidates(narrow, _base(), find_hardware("rtx-3060"), 3)


# -- guesses -----------------------------------------------------------------------------------------------


def test_guesses_are_off_where_they_gain_nothing() -> None:
    for c in candidates(MIXTRAL, _base(), find_hardware("a100-80gb")):
        assert c.plan is not None and min(c.plan.cache_slots) == 8
        assert c.profile.prefetch.predictor == "none" and c.plan.prefetch.depth == 0
        assert c.other == c.tokens_per_second, "nothing travels, so guesses make no difference"


def test_the_better_of_both_stands_for_a_choice() -> None:
    hardware = find_hardware("rtx-3080-mobile")
    for c in candidates(MIXTRAL, _base(), hardware):
        quiet = c.profile.model_copy(update={"prefetch": Prefetch(predictor="none", depth=0)})
        without = make_plan(quiet, c.sizes, hardware).prediction
        asked = c.profile.model_copy(update={"prefetch": _base().prefetch})
        with_ = make_plan(asked, c.sizes, hardware).prediction
        assert without is not None and with_ is not None
        assert c.tokens_per_second == max(without.tokens_per_second, with_.tokens_per_second)
        assert c.other == min(without.tokens_per_second, with_.tokens_per_second)


def test_where_speeds_are_not_known_guesses_stay_as_asked() -> None:
    known = find_hardware("rtx-3060")
    assert known.gpu is not None
    unknown = known.model_copy(update={"gpu": known.gpu.model_copy(update={"memory_bandwidth": None})})
    found = candidates(MIXTRAL, _base(), unknown)
    assert all(c.plan and c.plan.prediction is None and c.plan.prefetch.depth == 1 for c in found)
    assert choose(found, 5.0) is found[0]


# -- the choice --------------------------------------------------------------------------------------------


def _made(template: Candidate, speed: float, on_disk: int = 0, planned: bool = True) -> Candidate:
    """A candidate of that speed."""
    plan = template.plan
    assert plan is not None and plan.prediction is not None
    prediction = plan.prediction.model_copy(update={"tokens_per_second": speed})
    changed: Plan = plan.model_copy(update={"prediction": prediction, "disk_nbytes": on_disk})
    return replace(template, plan=changed if planned else None, error=None if planned else CapacityError("too large"))


@pytest.fixture(scope="module")
def template() -> Candidate:
    return candidates(OLMOE, _base(), find_hardware("rtx-3060"))[0]


def test_the_first_that_reaches_the_speed_in_memory(template: Candidate) -> None:
    def taken(min_speed: float, *made: Candidate) -> int:
        return made.index(choose(list(made), min_speed))

    slow, fast, faster = (_made(template, speed) for speed in (2.0, 6.0, 9.0))
    assert taken(5.0, slow, fast, faster) == 1
    assert taken(0.0, slow, fast, faster) == 0
    assert taken(6.0, slow, fast, faster) == 1, "exactly reached is reached"
    assert taken(50.0, slow, faster, fast) == 1, "none reaches it: the fastest"
    disk, missing = _made(template, 99.0, on_disk=1), _made(template, 0.0, planned=False)
    assert taken(5.0, disk, missing, slow) == 2, "never one on the disk where one in memory exists"
    assert taken(5.0, missing, disk, disk) == 1


def test_quality_decides_where_speeds_are_the_same(template: Candidate) -> None:
    found = [_made(template, speed) for speed in (1.0, 3.0 * SAME + 1e-6, 2.9, 3.0)]
    assert choose(found, 5.0) is found[1]
    assert choose(found, 3.0) is found[3], "what reaches the speed is not replaced by what does not"


def test_a_choice_on_any_machine_fits_it_and_its_limits() -> None:
    chosen_, refused, on_disk = 0, 0, 0
    for draw in _draws(120):
        machine = _random_machine(draw)
        limits = _random_limits(draw, machine)
        base = _base(memory=limits, context_length=draw.randrange(1, 5000))
        found = candidates(OLMOE, base, machine, draw.choice([2, 3, 4, 8]))
        try:
            chosen = choose(found, draw.choice([0.0, 5.0, 40.0]))
        except CapacityError as error:
            assert not any(c.plan for c in found) and re.search(r"\d [GM]iB", str(error))
            refused += 1
            continue
        chosen_ += 1
        on_disk += not chosen.in_memory
        _check_fits(chosen, machine, limits)
        assert chosen.in_memory or not any(c.in_memory for c in found)
    assert chosen_ > 30 and refused > 3 and on_disk > 1


def _check_fits(chosen: Candidate, machine: HardwareProfile, limits: Memory) -> None:
    plan = chosen.plan
    assert plan is not None
    memory = plan.memory
    parts = (memory.resident, memory.kv_cache, memory.slots, memory.staging, memory.stream, memory.workspace)
    assert sum(parts) == memory.total <= memory.limit
    assert memory.total <= (machine.gpu.memory if machine.gpu else machine.ram)
    assert limits.vram == "auto" or memory.total <= limits.vram
    assert plan.ram_nbytes <= (machine.ram if limits.ram == "auto" else limits.ram)
    assert machine.gpu or memory.total + plan.ram_nbytes <= machine.ram
    assert limits.disk == "auto" or plan.disk_nbytes <= limits.disk
    assert plan.ram_nbytes + plan.disk_nbytes == chosen.sizes.expert_nbytes
    assert memory.slots == sum(
        k * y.blob_nbytes for k, y in zip(plan.cache_slots, chosen.sizes.layers, strict=True)
    )  # fmt: skip


# -- nothing fits ------------------------------------------------------------------------------------------


def _refused(checkpoint: Checkpoint, hardware: HardwareProfile, min_bits: int = 2, **settings: Any) -> str:
    with pytest.raises(CapacityError) as caught:
        choose(candidates(checkpoint, _base(**settings), hardware, min_bits), 5.0)
    return str(caught.value)


def test_too_little_device_memory_says_what_is_needed_and_what_is_there() -> None:
    message = _refused(MIXTRAL, find_hardware("rtx-3060"), memory=Memory(vram=GIB))
    assert message.startswith("no quantization makes the model fit rtx-3060; the smallest, 2-bit g64 experts with ")
    assert "takes at least 2.89 GiB of device memory with all experts on the disk" in message
    assert "resident weights" in message and "the limit is 1 GiB" in message


def test_too_little_host_memory_says_what_is_needed_and_what_is_there() -> None:
    message = _refused(MIXTRAL, find_hardware("t4"), memory=Memory(disk=0))
    assert "and 13.1 GiB of host memory for experts" in message
    assert "memory.ram leaves 9.6 GiB" in message and "memory.disk 0 B" in message and "4.92 GiB on disk" in message


def test_too_little_of_both_says_both() -> None:
    message = _refused(MIXTRAL, find_hardware("t4"), memory=Memory(vram=GIB, disk=0))
    assert "the limit is 1 GiB" in message and "memory.ram leaves 9.6 GiB" in message


def test_a_cpu_whose_one_memory_holds_each_but_not_both() -> None:
    machine = find_hardware("cpu-2-cores")
    message = _refused(MIXTRAL, machine, memory=Memory(vram=16 * GIB, ram=14 * GIB), cache=Cache(experts_per_layer=4))
    assert "memory.ram is 14 GiB beside" in message and "cpu-2-cores has 23.5 GiB for both" in message


def test_what_has_nothing_to_do_with_bits_is_said_as_it_is() -> None:
    hardware = find_hardware("t4")
    with pytest.raises(DocumentError, match=r"^cache\.experts_per_layer is 9; the model has 8 experts per layer$"):
        choose(candidates(MIXTRAL, _base(cache=Cache(experts_per_layer=9)), hardware), 5.0)
    assert _refused(MIXTRAL, hardware, memory=Memory(ram=100 * GIB)).startswith("memory.ram is 100 GiB; t4 has")


@pytest.mark.parametrize("name", [*PAPER, "cpu-2-cores"])
def test_the_least_memory_is_enough_and_less_is_not(name: str) -> None:
    machine = find_hardware(name)
    machine = machine.model_copy(
        update={"ram": 900 * GIB, "gpu": machine.gpu and machine.gpu.model_copy(update={"memory": 99 * GIB})}
    )
    draw = _draws(1)[0]
    base = _base(context_length=draw.randrange(1, 9000), memory=Memory(disk=draw.randrange(0, GIB)))
    smallest = candidates(OLMOE, base, machine)[-1]
    for which in ("vram", "ram"):
        enough = least(smallest.profile, smallest.sizes, machine, which)
        assert enough > 0
        assert make_plan(_with(smallest.profile, which, enough), smallest.sizes, machine)
        with pytest.raises(CapacityError):
            make_plan(_with(smallest.profile, which, enough - MIB), smallest.sizes, machine)


def _with(profile: Profile, which: str, limit: int) -> Profile:
    return profile.model_copy(update={"memory": profile.memory.model_copy(update={which: limit})})
