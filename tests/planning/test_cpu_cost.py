"""The CPU in the cost model: sums by hand on the round machine, and what must hold on any."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from machines import GB, MACHINE, MB, PLAIN, RUNNING, SIZES, machine

from moeflow.planning.cost import Running, predict
from moeflow.planning.cpu_rates import CpuRates, usual_threads
from moeflow.schema import Cpu, CpuKernels, HardwareProfile, JointRates, PlannedCpu, Prediction

US, HALF = 1e-6, (0.5, 0.5)
JOINT = JointRates(cpu=12 * GB, link=6 * GB)
KERNELS = CpuKernels(level="avx2", threads=1, products={"4-bit": 15 * GB}, joint=JOINT)
SHARED = PlannedCpu(threads=1, share=2 / 3, fixed=False, activations="fixed16")
ALONE = PlannedCpu(threads=1, share=1.0, fixed=True, activations="fixed16")


def box(kernels: CpuKernels | None = KERNELS, cores: int = 2, **more: Any) -> HardwareProfile:
    return machine(cpu=Cpu(cores=cores, memory_bandwidth=20 * GB, kernels=kernels), **more)


def predicted(running: Running, hardware: HardwareProfile, **more: Any) -> Prediction:
    found = predict(more.pop("sizes", SIZES), hardware, running, **more)
    assert found is not None
    return found


def close(value: float) -> Any:
    return pytest.approx(value, rel=1.5e-3)  # of figures rounded to four digits, and sums of them


# -- by hand -----------------------------------------------------------------------------------------------


def test_misses_take_both_rates_at_once_and_two_handshakes() -> None:
    found = predicted(replace(PLAIN, cpu=SHARED), box(), hits=HALF)
    parts = found.decode
    # A third of 6 MB a layer leaves the device's products: 8/3 MB and 4/3 MB at 500 GB/s, 2 us before each.
    assert parts.experts == close(2 * (7.3333 + 4.6667) * US)
    # One miss in half of the layers, 3 MB at 18 GB/s; two in a quarter. The first product hides 7.33 us of each.
    assert parts.misses == close(2 * (0.5 * (166.667 - 7.333) + 0.25 * (333.333 - 7.333)) * US)
    assert parts.cpu == close(2 * 2 * 40 * 0.75 * US)
    assert parts.total == close(100 * US + parts.experts + parts.launches + parts.misses + parts.cpu)
    assert found.tokens_per_second == close(1 / parts.total)
    assert (found.missed_bytes, found.computed_bytes) == (2 * MB, 4 * MB)
    assert found.read_bytes == 95 * MB + 2 * 6 * MB - 4 * MB
    assert found.assumed == ("handshakes of GPU and CPU, 40 us each",)


def test_guesses_leave_less_to_share() -> None:
    plain = predicted(replace(PLAIN, cpu=SHARED), box(), hits=HALF)
    found = predicted(replace(RUNNING, cpu=SHARED), box(), hits=HALF, recall=0.8)
    used = found.guessed_bytes - found.wasted_bytes
    assert found.missed_bytes == pytest.approx((6 * MB - used) / 3, abs=2)
    assert found.computed_bytes == pytest.approx((6 * MB - used) * 2 / 3, abs=2)
    assert found.decode.cpu == close(plain.decode.cpu * (1 - used / (3 * MB) / 2))
    assert found.decode.misses < plain.decode.misses


def test_the_cpu_alone_computes_all_experts_at_its_own_rate() -> None:
    found = predicted(replace(PLAIN, slots=(0, 0), cpu=ALONE), box())
    assert found.decode.cpu == close(2 * (6 * MB / (15 * GB) + 80 * US))
    assert (found.decode.misses, found.missed_bytes, found.hit_rate) == (0, 0, 0)
    assert found.decode.experts == close(2 * 2 * 2 * US)  # launches with nothing to read
    assert (found.computed_bytes, found.read_bytes) == (12 * MB, 95 * MB)
    assert found.low < found.tokens_per_second


def test_without_a_gpu_measured_kernels_stand_for_cores() -> None:
    cpu = PlannedCpu(threads=2, share=1.0, fixed=True, activations="fixed16")
    hardware = box(KERNELS.model_copy(update={"threads": 2, "joint": None}), gpu=None)
    found = predicted(replace(PLAIN, cpu=cpu), hardware, hits=HALF)
    before = predicted(PLAIN, hardware, hits=HALF)
    assert found.decode.experts == close(2 * 6 * MB / (15 * GB))
    assert found.assumed == ("the host's work for a layer, as measured on two cores of a server",)
    assert before.assumed == ("computing, as measured on two cores of a server",)
    assert found.computed_bytes == 0 and found.read_bytes == before.read_bytes
    assert replace(PLAIN, cpu=cpu) != PLAIN
    unmeasured = predicted(replace(PLAIN, cpu=cpu), machine(gpu=None), hits=HALF)
    assert unmeasured.decode.experts == close(2 * 6 * MB / (14 * GB))
    assert "the CPU's products with 4-bit weights, as 0.7 of host memory's rate" in unmeasured.assumed
    plain = replace(SIZES, layers=(SIZES.layers[0], replace(SIZES.layers[0], format="none")))
    some = predicted(replace(PLAIN, cpu=cpu), hardware, hits=HALF, sizes=plain)
    assert some.decode.experts == close(6 * MB / (15 * GB) + 6e6 / (2 * 2e8))
    assert some.assumed == before.assumed


def test_without_a_gpu_and_slots_experts_are_read_where_they_lie() -> None:
    cpu = PlannedCpu(threads=2, share=1.0, fixed=True, activations="fixed16")
    hardware = box(KERNELS.model_copy(update={"threads": 2, "joint": None}), gpu=None)
    running = replace(PLAIN, slots=(0, 0), cpu=cpu)
    found = predicted(running, hardware)
    assert found.decode.experts == close(2 * 6 * MB / (15 * GB))
    assert (found.decode.misses, found.missed_bytes, found.hit_rate) == (0, 0, 0)
    assert (found.computed_bytes, found.read_bytes) == (12 * MB, 107 * MB)
    assert not any("routes" in assumed for assumed in found.assumed)  # all cost the same
    half = predicted(replace(running, ram_experts=(2, 2)), hardware)
    assert half.computed_bytes == 6 * MB and half.decode.disk == close(6 * MB / GB)
    assert predicted(replace(running, strategy="no-cache"), hardware).computed_bytes == 0


# -- rates -------------------------------------------------------------------------------------------------


def rates(kernels: CpuKernels | None, threads: int, cores: int = 8) -> CpuRates:
    return CpuRates.of(box(kernels, cores), threads, 8 * GB)


def test_measured_products_go_with_threads_up_to_the_memorys_rate() -> None:
    kernels = CpuKernels(level="avx512", threads=4, products={"4-bit": 12 * GB, "nf4": 24 * GB})
    assert [rates(kernels, n).alone("4-bit") / GB for n in (1, 2, 4, 6, 8)] == [3, 6, 12, 18, 20]
    assert rates(kernels, 8).alone("nf4") == 24 * GB  # measured above what a sum of the memory reached
    assert rates(kernels, 4).alone("4-bit meta8") == 12 * GB
    assert rates(kernels, 7).alone("2-bit") == 14 * GB  # 0.7 of the memory's
    assert rates(kernels, 2).knows(["4-bit", "4-bit meta8"]) and not rates(kernels, 2).knows(["4-bit", "2-bit"])


def test_unmeasured_products_are_a_share_of_the_memorys_rate() -> None:
    assert usual_threads(box(None, 8)) == 7
    assert [rates(None, n).alone("3-bit") / GB for n in (7, 8)] == [14, 14]
    assert rates(None, 1).alone("3-bit") == pytest.approx(2 * GB)
    assert rates(None, 7).beside("3-bit") == (pytest.approx(0.83 * 14 * GB), pytest.approx(0.88 * 8 * GB))
    assert rates(KERNELS, 1).beside("4-bit") == (12 * GB, 6 * GB)
    slow = KERNELS.model_copy(update={"products": {"4-bit": 9 * GB}})  # bound by arithmetic, not by memory
    assert rates(slow, 1).beside("4-bit") == (9 * GB, 6 * GB)
    assert rates(slow, 1).share("4-bit") == pytest.approx(0.6)


def test_what_nobody_measured_is_named() -> None:
    def said(kernels: CpuKernels | None, threads: int = 1, joint: bool = True) -> list[str]:
        return list(rates(kernels, threads).assumed(["4-bit", "2-bit"], joint))

    both = KERNELS.model_copy(update={"products": {"4-bit": 15 * GB, "2-bit": 14 * GB}})
    handshakes = "handshakes of GPU and CPU, 40 us each"
    assert said(both) == [handshakes]
    assert said(both, 2)[0] == "the CPU's products by 2 threads, from those measured with 1"
    assert said(KERNELS)[0] == "the CPU's products with 2-bit weights, as 0.7 of host memory's rate"
    lonely = both.model_copy(update={"joint": None})
    assert said(lonely)[0] == "CPU and link at once, as shares of each alone on an H100's machine"
    assert said(lonely, joint=False) == [handshakes]


def test_without_any_rate_of_the_cpu_there_is_no_prediction() -> None:
    blind = machine(cpu=Cpu(cores=2))
    assert predict(SIZES, blind, replace(PLAIN, cpu=SHARED)) is None
    assert predict(SIZES, blind, PLAIN) is not None


# -- on any machine ----------------------------------------------------------------------------------------


def test_parts_sum_and_faster_rates_never_slow_a_shared_plan() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(100):
        products, link = (int(10 ** draw.uniform(9, 10.9)) for _ in range(2))
        joint = draw.choice([None, JointRates(cpu=products, link=link)])
        kernels = CpuKernels(level="portable", threads=draw.randrange(1, 9), products={"4-bit": products}, joint=joint)
        running = replace(RUNNING, slots=(draw.randrange(3),) * 2, cpu=SHARED)
        found = predicted(running, box(kernels))
        assert found.tokens_per_second == close(1 / found.decode.total)
        more = joint and joint.model_copy(update={"cpu": 2 * products})
        twice = kernels.model_copy(update={"products": {"4-bit": 2 * products}, "joint": more})
        assert predicted(running, box(twice)).tokens_per_second >= found.tokens_per_second * (1 - 1e-3), kernels
        assert found.missed_bytes + found.computed_bytes + found.guessed_bytes - found.wasted_bytes == pytest.approx(
            predicted(replace(running, cpu=None, guessed=0), MACHINE).missed_bytes, abs=3
        )
