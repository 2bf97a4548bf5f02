"""Who computes what misses: as the profile says, or where it was measured to pay; else it is refused in words."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from machines import GB, MB, SIZES, machine

from moeflow.errors import CapacityError, DocumentError
from moeflow.planning.planner import make_plan
from moeflow.planning.sizes import ModelSizes
from moeflow.schema import Cpu, CpuKernels, HardwareProfile, JointRates, Memory, Plan, Profile

WIDE = replace(SIZES, layers=(replace(SIZES.layers[0], experts=16),) * 2)


def cpu(cores: int = 8, joint: JointRates | None = None, **products: int) -> Cpu:
    """With products of 4 bits at 16 GB/s by 7 threads, where the link has 10 and copies by kernel 8."""
    found = {name.replace("_", "-"): rate * GB for name, rate in (products or {"four": 16}).items()}
    found = {name.replace("four", "4-bit"): rate for name, rate in found.items()}
    kernels = CpuKernels(level="avx2", threads=cores - 1, products=found, joint=joint)
    return Cpu(cores=cores, memory_bandwidth=20 * GB, kernels=kernels)


MEASURED = machine(cpu=cpu())
BARE = machine(cpu=Cpu(cores=8, memory_bandwidth=20 * GB))
BLIND = machine(cpu=Cpu(cores=8))


def planned(
    hardware: HardwareProfile, use: dict[str, Any] | None = None, sizes: ModelSizes = WIDE, k: Any = 4, **more: Any
) -> Plan:
    whole = {"model": "x", "cache": {"experts_per_layer": k}, "cpu": use or {}, **more}
    return make_plan(Profile.parse(whole, "test"), sizes, hardware)


def test_auto_shares_where_kernels_were_measured_and_it_pays() -> None:
    plan = planned(MEASURED)
    assert plan.execution == "device" and plan.cache_slots == (4, 4) and plan.prefetch.depth == 1
    assert plan.cpu is not None
    # 0.83 of 16 GB/s beside 0.88 of 8: 13.28 and 7.04.
    assert plan.cpu.model_dump() == {"threads": 7, "share": 0.654, "fixed": False, "activations": "fixed16"}
    alone = planned(MEASURED, {"experts": "off"})
    assert alone.cpu is None and plan.prediction and alone.prediction
    assert plan.prediction.tokens_per_second > 1.05 * alone.prediction.tokens_per_second


def test_measured_rates_at_once_set_the_share() -> None:
    plan = planned(machine(cpu=cpu(joint=JointRates(cpu=12 * GB, link=6 * GB))))
    assert plan.cpu and plan.cpu.share == 0.667


@pytest.mark.parametrize(
    ("hardware", "k"),
    [
        (BARE, 4),
        (machine(cpu=cpu(nf4=16)), 4),  # of another format
        (MEASURED, 16),  # nothing misses
        (machine(cpu=Cpu(cores=8, kernels=CpuKernels(level="portable", threads=7, products={"4-bit": GB // 10}))), 4),
    ],
    ids=["not measured", "another format measured", "all cached", "slow"],
)
def test_auto_leaves_the_cpu_out_where_it_is_not_known_to_pay(hardware: HardwareProfile, k: int) -> None:
    plan = planned(hardware, k=k)
    assert plan.execution == "device"
    assert plan.cpu is None
    assert plan == planned(hardware, {"experts": "off"}, k=k)


@pytest.mark.parametrize(("hardware", "share"), [(BARE, 0.623), (BLIND, 0.5)])
def test_on_shares_without_measurements_and_says_so(hardware: HardwareProfile, share: float) -> None:
    plan = planned(hardware, {"experts": "on"})
    assert plan.cpu and plan.cpu.share == share  # 0.83 of 14 GB/s beside 7.04; with nothing known, half
    if plan.prediction:
        assert "the CPU's products with 4-bit weights, as 0.7 of host memory's rate" in plan.prediction.assumed
    else:
        assert hardware is BLIND


def test_only_leaves_no_slots_and_no_guesses() -> None:
    plan = planned(MEASURED, {"experts": "only"})
    assert plan.cpu and (plan.cpu.share, plan.cpu.fixed) == (1.0, True)
    assert plan.cache_slots == (0, 0) and plan.memory.slots == 0 and plan.prefetch.depth == 0
    assert plan.execution == "device" and plan.prediction and plan.prediction.missed_bytes == 0
    assert planned(MEASURED, {"experts": "only"}, k="auto") == plan


@pytest.mark.parametrize("use", ["on", "only"])
def test_beside_a_gpu_the_device_must_drive(use: str) -> None:
    for more in ({"execution": "host"}, {"strategy": "naive"}, {"memory": Memory(ram=48 * MB).model_dump()}):
        with pytest.raises(DocumentError, match=f"cpu.experts is {use}; beside a GPU that needs the device to drive"):
            planned(MEASURED, {"experts": use}, **more)
        assert planned(MEASURED, **more).cpu is None


def test_formats_that_the_kernels_lack_are_named() -> None:
    plain = replace(WIDE, layers=(WIDE.layers[0], replace(WIDE.layers[0], format="none")))
    mixed = replace(WIDE, layers=(replace(WIDE.layers[0], blobs=(3 * MB,) * 15 + (2 * MB,)), WIDE.layers[0]))
    for sizes, said in (
        (plain, "MoE layer 1 has experts of format none"),
        (mixed, "MoE layer 0 has experts of several"),
    ):
        assert planned(MEASURED, sizes=sizes).cpu is None
        with pytest.raises(DocumentError, match=re.escape(said)):
            planned(MEASURED, {"experts": "on"}, sizes=sizes)


# -- threads and activations -------------------------------------------------------------------------------


def test_threads_leave_the_host_a_core_beside_a_gpu() -> None:
    for hardware, use, threads in (
        (MEASURED, {"experts": "on"}, 7),
        (MEASURED, {"experts": "on", "threads": 8}, 8),
        (machine(cpu=cpu(), gpu=None), {}, 8),
        (machine(cpu=Cpu(cores=1, memory_bandwidth=20 * GB)), {"experts": "on"}, 1),
    ):
        plan = planned(hardware, use)
        assert plan.cpu and plan.cpu.threads == threads


@pytest.mark.parametrize("use", ["auto", "on", "only"])
@pytest.mark.parametrize("hardware", [MEASURED, machine(cpu=cpu(), gpu=None)], ids=["GPU", "CPU"])
def test_fewer_cores_than_threads_asked(use: str, hardware: HardwareProfile) -> None:
    said = r"cpu\.threads is 9; round has 8 cores for this process: lower it or set it to auto"
    with pytest.raises(CapacityError, match=said):
        planned(hardware, {"experts": use, "threads": 9})
    assert planned(hardware, {"experts": "off", "threads": 9}).cpu is None


def test_int8_is_for_machines_without_a_gpu() -> None:
    plan = planned(machine(gpu=None), {"activations": "int8"})
    assert plan.cpu and plan.cpu.activations == "int8"
    with pytest.raises(DocumentError, match=r"cpu\.activations is int8; beside a GPU"):
        planned(MEASURED, {"activations": "int8"})


# -- without a GPU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["auto", "on", "only"])
def test_without_a_gpu_the_cpu_computes_all_experts(use: str) -> None:
    box = machine(gpu=None)
    plan = planned(box, {"experts": use})
    assert plan.cpu and plan.cpu.model_dump() == {
        "threads": 2, "share": 1.0, "fixed": True, "activations": "fixed16",
    }  # fmt: skip
    torch = planned(box, {"experts": "off"})
    assert torch.cpu is None
    changed = {"cpu": None, "prediction": torch.prediction}
    assert plan.model_copy(update=changed) == torch
    assert plan.cache_slots == (4, 4)


def test_without_a_gpu_layers_that_the_kernels_lack_stay_with_torch() -> None:
    box, layer = machine(gpu=None), WIDE.layers[0]
    some = replace(WIDE, layers=(layer, replace(layer, format="none")))
    assert planned(box, sizes=some).cpu is not None
    assert planned(box, sizes=replace(WIDE, layers=(replace(layer, format="none"),) * 2)).cpu is None
    with pytest.raises(DocumentError, match="MoE layer 1 has experts of format none"):
        planned(box, {"experts": "on"}, sizes=some)


def test_a_device_driven_plan_without_gpu_shares_only_if_it_is_asked_to() -> None:
    """Such plans run in tests: kernels on an emulator."""
    box = machine(gpu=None, cpu=cpu())
    assert planned(box, execution="device").cpu is None
    shared = planned(box, {"experts": "on"}, execution="device")
    assert shared.cpu and not shared.cpu.fixed and 0 < shared.cpu.share < 1
    alone = planned(box, {"experts": "only"}, execution="device")
    assert alone.cpu and alone.cpu.fixed and alone.cache_slots == (0, 0)
