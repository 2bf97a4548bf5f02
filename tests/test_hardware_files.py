"""The files of hardware/: valid, named as their machine, written back the same, and usable for planning."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeflow.errors import DocumentError
from moeflow.files import data_dir, read_document
from moeflow.probe.match import find_hardware, known_hardware, match
from moeflow.schema import HardwareProfile, Pcie

FILES = sorted(data_dir("hardware").glob("*.yaml"))
NAMES = [path.stem for path in FILES]


def test_the_paper_s_machines_those_that_people_own_and_one_without_gpu_ship() -> None:
    assert {"rtx-3060", "rtx-3080-mobile", "t4", "a100-80gb", "cpu-2-cores"} <= set(NAMES)
    assert {"rtx-3090", "rtx-4060-ti-16gb", "rtx-4070", "rtx-4090", "rtx-5090", "rtx-4060-mobile", "l4"} <= set(NAMES)
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
    assert set(profile.sources) == set(profile.values()), "a value without source"
    if profile.origin == "datasheet":
        assert not any(source.startswith("measured") for source in profile.sources.values())
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
        assert profile.link.pcie is not None
        assert profile.link.host_to_device < profile.link.pcie.peak
        assert profile.gpu.memory % (1 << 20) == 0


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_derived_rate_is_what_its_derivation_gives(path: Path) -> None:
    """Older files round 0.8 of the bus's peak to a whole GB/s."""
    link = HardwareProfile.load(path).link
    if HardwareProfile.load(path).source("link.host_to_device").startswith("derived"):
        assert link.pcie is not None
        assert link.host_to_device == pytest.approx(0.8 * link.pcie.peak, rel=0.05)


def test_the_peak_of_a_bus() -> None:
    peaks = {(3, 16): 15.75e9, (4, 8): 15.75e9, (4, 16): 31.5e9, (5, 16): 63.0e9}  # as PCI-SIG's tables round them
    for (generation, lanes), peak in peaks.items():
        assert Pcie(generation=generation, lanes=lanes).peak == pytest.approx(peak, rel=1e-3)


def test_a_source_names_its_value_and_its_kind(tmp_path: Path) -> None:
    file = tmp_path / "t4.yaml"
    text = (data_dir("hardware") / "t4.yaml").read_text()
    file.write_text(text + "  gpu.speed: datasheet, somewhere\n")
    with pytest.raises(DocumentError, match=r"sources\.gpu\.speed names no value of this profile; known: gpu\.name, "):
        HardwareProfile.load(file)
    file.write_text(text.replace("gpu.memory: datasheet", "gpu.memory: hearsay"))
    with pytest.raises(DocumentError, match=r"t4\.yaml: sources\.gpu\.memory is hearsay, NVIDIA"):
        HardwareProfile.load(file)


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_is_recognised_as_itself_only(name: str) -> None:
    profile = find_hardware(name)
    found = match(profile, known_hardware().values())
    assert (found and found.profile) == (profile if profile.gpu else None)
