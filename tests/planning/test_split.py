"""The split between link and CPU, taken apart: bytes and rates of each, and what another split would bring."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from machines import GB, MB, SIZES, machine

from moeflow.planning.cost import predict
from moeflow.planning.explanation import Explanation, explain, running_of
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.schema import Cpu, CpuKernels, HardwareProfile, JointRates, Plan, Profile

WIDE = replace(SIZES, layers=(replace(SIZES.layers[0], experts=16),) * 2)
KERNELS = CpuKernels(level="vnni", threads=7, products={"4-bit": 14 * GB}, joint=JointRates(cpu=12 * GB, link=6 * GB))


def box(**more: Any) -> HardwareProfile:
    return machine(cpu=Cpu(cores=8, memory_bandwidth=20 * GB, kernels=KERNELS), **more)


def planned(hardware: HardwareProfile, use: dict[str, Any] | None = None, sizes: ModelSizes = WIDE) -> Plan:
    whole = {"model": "x", "cache": {"experts_per_layer": 4}, "cpu": use or {}}
    return make_plan(Profile.parse(whole, "test"), sizes, hardware)


def gains(found: Explanation) -> dict[str, float]:
    return {change.what: change.gain for change in found.changes}


def test_bytes_and_rates_of_both_are_told() -> None:
    plan = planned(box())
    found = explain(plan, WIDE, box())
    assert plan.prediction and found.split
    assert (found.split.link_nbytes, found.split.cpu_nbytes) == (
        plan.prediction.missed_bytes, plan.prediction.computed_bytes,
    )  # fmt: skip
    assert found.split.link_rate == pytest.approx(6 * GB) and found.split.cpu_rate == pytest.approx(12 * GB)
    assert found.split.cpu_nbytes == pytest.approx(2 * found.split.link_nbytes, rel=1e-6)
    assert sum(part.value for part in found.token) == pytest.approx(plan.prediction.decode.total)
    assert {part.name for part in found.token} > {"cpu"}
    bare = explain(plan)
    assert bare.split and (bare.split.link_rate, bare.split.cpu_rate) == (None, None)
    assert found.to_dict()["split"]["cpu_nbytes"] == plan.prediction.computed_bytes


def test_rates_of_layers_that_differ_are_of_all_bytes() -> None:
    """A plan of two formats: 12 and 6 GB/s beside a layer that the CPU computes at 3."""
    two = replace(WIDE, layers=(WIDE.layers[0], replace(WIDE.layers[0], format="nf4")))
    slow = KERNELS.model_copy(update={"products": {"4-bit": 14 * GB, "nf4": 3 * GB}})
    hardware = machine(cpu=Cpu(cores=8, memory_bandwidth=20 * GB, kernels=slow))
    plan = make_plan(Profile.parse({"model": "x", "cpu": {"experts": "on"}}, "test"), two, hardware)
    found = explain(plan, two, hardware)
    assert found.split and found.split.link_rate == pytest.approx(6 * GB)
    # 3 MB a layer: a sixth of a millisecond at 18 GB/s, a third at 9.
    assert found.split.cpu_rate == pytest.approx((12 * GB * 1 + 3 * GB * 2) / 3)


def test_without_a_part_of_the_cpu_there_is_no_split() -> None:
    assert explain(planned(box(), {"experts": "off"}), WIDE, box()).split is None
    assert explain(planned(box(gpu=None)), WIDE, box(gpu=None)).split is None


def test_on_and_off_and_more_threads_are_offered_where_they_help() -> None:
    off = explain(planned(box(), {"experts": "off"}), WIDE, box())
    on = planned(box())
    shared = predict(WIDE, box(), running_of(on))
    assert shared
    offered = {c.what: c.tokens_per_second for c in off.changes}
    assert offered["misses shared with the CPU (cpu.experts: on)"] == shared.tokens_per_second
    few = explain(planned(box(), {"experts": "on", "threads": 3}), WIDE, box())
    assert gains(few)["7 threads on the CPU (cpu.threads)"] > 0.1
    assert not {what for what in gains(few) if "off" in what}, "the CPU helps even so"
    found = gains(explain(on, WIDE, box()))
    assert found["twice the host memory's rate"] > 0.1 and found["twice the link's rate"] > 0.1
    assert not any("threads" in what or "cpu." in what for what in found)


def test_off_is_offered_where_sharing_does_not_pay() -> None:
    """Misses so small that handshakes take longer than they do."""
    small = replace(WIDE, layers=(replace(WIDE.layers[0], blob_nbytes=MB // 100),) * 2)
    plan = planned(box(), {"experts": "on"}, small)
    assert gains(explain(plan, small, box()))["misses by the link alone (cpu.experts: off)"] > 0
    assert planned(box(), {"experts": "auto"}, small).cpu is None


def test_all_by_the_cpu_may_be_shared_instead() -> None:
    plan = planned(box(), {"experts": "only"})
    found = explain(plan, WIDE, box())
    assert found.split and found.split.link_nbytes == 0 and found.split.cpu_rate == pytest.approx(14 * GB)
    assert found.split.link_rate is None and found.bound == "cpu"
    assert gains(found)["misses shared with the CPU (cpu.experts: on)"] > 0


def test_without_a_gpu_the_kernels_are_offered_where_they_were_measured() -> None:
    cpu = box(gpu=None)
    off = explain(planned(cpu, {"experts": "off"}), WIDE, cpu)
    assert gains(off)["the CPU's own kernels (cpu.experts: on)"] > 0
    few = explain(planned(cpu, {"threads": 1}), WIDE, cpu)
    assert gains(few)["8 threads on the CPU (cpu.threads)"] > 0
    assert gains(explain(planned(cpu), WIDE, cpu))["twice the device memory's rate"] > 0.1
    bare = machine(gpu=None)
    assert not any("kernels" in what for what in gains(explain(planned(bare, {"experts": "off"}), WIDE, bare)))
