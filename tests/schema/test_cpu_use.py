"""What documents say of the CPU beside the GPU: nothing where nobody asked, so that older ones keep their digests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeflow.errors import DocumentError
from moeflow.planning.overrides import override
from moeflow.schema import Cpu, CpuKernels, CpuUse, DecodeTime, JointRates, Plan, PlannedCpu, Profile

GB = 10**9


def test_a_profile_that_says_nothing_of_the_cpu_writes_nothing() -> None:
    profile = Profile(model="demo")
    assert profile.cpu == CpuUse(experts="auto", threads="auto", activations="fixed16")
    assert "cpu" not in profile.to_dict()
    spelled = Profile.parse({"model": "demo", "cpu": {"experts": "auto", "threads": "auto"}}, "here")
    assert spelled.digest() == profile.digest()
    assert Profile.parse({"model": "demo", "cpu": {"experts": "on"}}, "here").digest() != profile.digest()


@pytest.mark.parametrize("experts", ["on", "off", "only", "auto"])
def test_on_and_off_need_no_quotes(tmp_path: Path, experts: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(f"model: demo\ncpu: {{experts: {experts}, threads: 2}}\n")
    profile = Profile.load(file)
    assert profile.cpu == CpuUse(experts=experts, threads=2)
    profile.save(file)
    assert Profile.load(file) == profile


@pytest.mark.parametrize("threads", [0, -1, True, "all", 1.5])
def test_threads_are_a_count_or_auto(threads: Any) -> None:
    with pytest.raises(DocumentError, match=r"here: cpu\.threads is .*whole number"):
        Profile.parse({"model": "demo", "cpu": {"threads": threads}}, "here")


def test_the_section_may_be_changed_by_flat_names() -> None:
    changed = override(Profile(model="demo"), {"cpu_experts": "on", "cpu_threads": 3, "cpu_activations": None})
    assert changed.cpu == CpuUse(experts="on", threads=3)
    again = override(changed, {"cpu_activations": "int8"})
    assert again.cpu == CpuUse(experts="on", threads=3, activations="int8")
    with pytest.raises(DocumentError, match=r"cpu\.experts is some; it supports auto, off, on, only"):
        override(changed, {"cpu_experts": "some"})


def test_plans_and_machines_without_it_write_nothing() -> None:
    assert Plan.model_fields["cpu"].exclude_if is not None
    assert "kernels" not in Cpu(cores=2).model_dump(mode="json")
    kernels = CpuKernels(level="vnni", threads=15, products={"2-bit": 80 * GB})
    assert "joint" not in kernels.model_dump(mode="json")
    joint = kernels.model_copy(update={"joint": JointRates(cpu=69 * GB, link=43 * GB)})
    assert joint.model_dump(mode="json")["joint"] == {"cpu": "69GB/s", "link": "43GB/s"}


@pytest.mark.parametrize("fault", [{"threads": 0}, {"share": 1.01}, {"share": -0.1}, {"activations": "float32"}])
def test_a_planned_part_is_possible(fault: dict[str, Any]) -> None:
    part = {"threads": 4, "share": 0.5, "fixed": False, "activations": "fixed16"}
    PlannedCpu.model_validate(part)
    with pytest.raises(ValueError, match=next(iter(fault))):
        PlannedCpu.model_validate({**part, **fault})


def test_a_token_s_parts_sum_with_the_cpu_s() -> None:
    parts = {"dense": 1.0, "experts": 2.0, "launches": 3.0, "misses": 4.0, "disk": 5.0}
    assert DecodeTime(**parts).total == 15 and "cpu" not in DecodeTime(**parts).model_dump()
    assert DecodeTime(**parts, cpu=6.0).total == 21 and DecodeTime(**parts, cpu=6.0).model_dump()["cpu"] == 6.0
