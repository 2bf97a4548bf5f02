"""What a hardware profile refuses: numbers that no machine has, each in one line with its place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from moeflow.errors import DocumentError
from moeflow.files import data_dir, read_document
from moeflow.schema import HardwareProfile

POINTS = [
    {"nbytes": "64KiB", "engine": "3GB/s", "engine_spread": 0.2, "kernel": "4GB/s", "kernel_spread": 0},
    {"nbytes": "1MiB", "engine": "11.5GB/s"},
]


def document() -> dict[str, Any]:
    """A whole, valid profile with everything that may be in it."""
    found = read_document(data_dir("hardware") / "rtx-3060.yaml")
    found["link"] |= {"under_load": {"generation": 3, "lanes": 16}, "by_size": copy.deepcopy(POINTS)}
    found["disk"] |= {"random_read": "2GB/s", "blob": "4MiB"}
    found["cpu"]["instruction_sets"] = ["avx2"]
    joint = {"cpu": "28GB/s", "link": "20GB/s"}
    found["cpu"]["kernels"] = {"level": "avx2", "threads": 7, "products": {"4-bit": "35GB/s"}, "joint": joint}
    return found | {
        "ram_lockable": "16GiB",
        "spreads": {"link.host_to_device": 0.01, "disk.random_read": 1.5},
        "probed": {"date": "2026-11-25", "moeflow": "0.1.0", "torch": "2.13.0", "cuda": None, "driver": "580.1"},
    }


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_everything_measured_comes_back(tmp_path: Path, ending: str) -> None:
    profile = HardwareProfile.parse(document(), "here")
    named = {"link.by_size", "link.under_load", "disk.blob", "ram_lockable", "cpu.instruction_sets", "cpu.kernels"}
    assert named <= set(profile.values())
    profile.save(tmp_path / f"x.{ending}")
    assert HardwareProfile.load(tmp_path / f"x.{ending}") == profile


def test_a_date_without_quotes_is_one(tmp_path: Path) -> None:
    """As people write it; YAML's reader makes a date of it before the schema sees it."""
    file = tmp_path / "x.yaml"
    HardwareProfile.parse(document(), "here").save(file)
    file.write_text(file.read_text().replace("'2026-11-25'", "2026-11-25"))
    assert HardwareProfile.load(file) == HardwareProfile.parse(document(), "here")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("gpu.memory", 0, "gpu.memory is 0; input should be greater than 0"),
        ("gpu.memory", -5, "gpu.memory is -5; expected a size such as"),
        ("ram", "0GiB", "ram is 0; input should be greater than 0"),
        ("gpu.memory_bandwidth", "0GB/s", "gpu.memory_bandwidth is 0GB/s; expected a rate such as 12.5GB/s"),
        ("gpu.memory_bandwidth", "-1GB/s", "gpu.memory_bandwidth is -1GB/s; expected a rate"),
        ("gpu.memory_bandwidth", "360000GB/s", "gpu.memory_bandwidth is 360000GB/s; no memory is faster than"),
        ("link.host_to_device", "16GB/s", "host_to_device is 16 GB/s, more than PCIe 3.0 x16 can carry, 15.8 GB/s"),
        ("link.pcie.lanes", 3, "link.pcie.lanes is 3; it supports 1, 2, 4, 8, 16"),
        ("link.under_load.lanes", 0, "link.under_load.lanes is 0; input should be greater than or equal to 1"),
        ("link.under_load.generation", 9, "link.under_load.generation is 9; input should be less than or equal to 7"),
        ("link.by_size.0.nbytes", 0, "link.by_size.0.nbytes is 0; input should be greater than 0"),
        ("link.by_size.0.nbytes", "1MiB", "by_size has 1048576 bytes behind 1048576; give each size once, rising"),
        ("link.by_size.1.kernel", "0GB/s", "link.by_size.1.kernel is 0GB/s; expected a rate"),
        ("link.by_size.0.engine_spread", -0.1, "link.by_size.0.engine_spread is -0.1; input should be greater than"),
        ("spreads.link.host_to_device", -1, "input should be greater than or equal to 0"),
        ("spreads.link.host_to_device", float("inf"), "input should be a finite number"),
        ("spreads.gpu.speed", 0.1, "spreads.gpu.speed names no value of this profile; known: gpu.name, "),
        ("sources.gpu.speed", "measured", "sources.gpu.speed names no value of this profile; known: gpu.name, "),
        ("ram_lockable", "64GiB", "ram_lockable is 68719476736 bytes; ram has 34359738368"),
        ("disk.blob", None, "random_read is a rate at one size: give both random_read and blob, or neither"),
        ("disk.blob", 0, "random_read is a rate at one size"),
        ("probed.date", "yesterday", "probed.date is yesterday; "),
        ("probed.host", "mine", "probed.host: unknown key; known: date, moeflow, torch, cuda, driver"),
        ("cpu.cores", 0, "cpu.cores is 0; "),
        ("cpu.kernels.threads", 0, "cpu.kernels.threads is 0; "),
        ("cpu.kernels.level", "sse", "cpu.kernels.level is sse; it supports portable, avx2, avx512, vnni"),
        ("cpu.kernels.products", {}, "cpu.kernels.products"),
        ("cpu.kernels.joint.link", "0GB/s", "cpu.kernels.joint.link is 0GB/s; expected a rate"),
        ("format_version", 2, "format_version is 2; this moeflow reads hardware profile version 1: upgrade moeflow"),
    ],
)
def test_impossible_numbers_are_refused_in_one_line(place: str, value: Any, said: str) -> None:
    found = document()
    keys: list[str] = place.split(".", 1) if place.startswith(("spreads.", "sources.")) else place.split(".")
    inner: Any = found
    for key in keys[:-1]:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[keys[-1]] = value
    with pytest.raises(DocumentError) as caught:
        HardwareProfile.parse(found, "mine.yaml")
    assert str(caught.value).count("\n") == 0
    assert str(caught.value).startswith("mine.yaml: ")
    assert said in str(caught.value)
