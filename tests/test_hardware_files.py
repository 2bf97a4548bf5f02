"""The files of hardware/: valid, named as their machine, written back the same, and usable for planning."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeflow.files import data_dir, read_document
from moeflow.probe.match import find_hardware, known_hardware, match
from moeflow.schema import HardwareProfile

FILES = sorted(data_dir("hardware").glob("*.yaml"))
NAMES = [path.stem for path in FILES]


def test_the_paper_s_machines_and_one_without_gpu_ship() -> None:
    assert {"rtx-3060", "rtx-3080-mobile", "t4", "a100-80gb", "cpu-2-cores"} <= set(NAMES)
    assert sorted(known_hardware()) == NAMES


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_is_valid_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    profile = HardwareProfile.load(path)
    assert read_document(path)["format_version"] == 1  # written out, so that later versions know it
    assert profile.name == path.stem
    profile.save(tmp_path / "again.yaml")
    assert HardwareProfile.load(tmp_path / "again.yaml") == profile


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_says_where_its_numbers_come_from(path: Path) -> None:
    profile = HardwareProfile.load(path)
    assert profile.description
    assert "\n" not in profile.description
    if profile.origin == "datasheet":
        assert "none measured by this project" in " ".join(path.read_text().replace("#", " ").split())


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_rates_are_in_an_order_that_physics_allows(path: Path) -> None:
    """A slipped unit or digit would break it: caches pay because device memory is faster than the link."""
    profile = HardwareProfile.load(path)
    memory = profile.gpu.memory_bandwidth if profile.gpu else profile.cpu.memory_bandwidth
    assert memory is not None
    assert 1e9 <= profile.link.host_to_device < memory < 1e13
    assert profile.disk is None or profile.disk.read < profile.link.host_to_device
    if profile.gpu:
        assert profile.link.host_to_device < 31.5e9  # PCIe 4.0 x16, the fastest bus among these
        assert profile.gpu.memory % (1 << 20) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_is_recognised_as_itself_only(name: str) -> None:
    profile = find_hardware(name)
    assert match(profile, known_hardware().values()) == (profile if profile.gpu else None)
