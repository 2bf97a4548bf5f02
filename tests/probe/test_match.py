"""Which known machine a probed one is, and how hardware is found by name or path."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeflow.errors import DocumentError, StorageError
from moeflow.probe import match as match_module
from moeflow.probe.match import find_hardware, known_hardware, match
from moeflow.schema import Cpu, Gpu, HardwareProfile, Link

GIB = 1 << 30


def machine(name: str, gpu: str | None = None, memory: float = 12.0) -> HardwareProfile:
    board = Gpu(name=gpu, memory=int(memory * GIB), compute_capability="8.6") if gpu else None
    return HardwareProfile(
        name=name, origin="datasheet", gpu=board, cpu=Cpu(cores=4), ram=16 * GIB, link=Link(host_to_device=10**10)
    )


KNOWN = [
    machine("none"),
    machine("rtx-3060", "NVIDIA GeForce RTX 3060", 12),
    machine("rtx-3080-mobile", "NVIDIA GeForce RTX 3080 Laptop GPU", 16),
    machine("t4", "Tesla T4", 15),
    machine("a100-80gb", "NVIDIA A100-SXM4-80GB", 80),
]


@pytest.mark.parametrize(
    ("gpu", "memory", "found"),
    [
        ("NVIDIA GeForce RTX 3060", 12, "rtx-3060"),
        ("GeForce RTX 3060", 11.8, "rtx-3060"),
        ("nvidia geforce rtx 3060", 12, "rtx-3060"),
        ("NVIDIA GeForce RTX 3060 12GB", 12, "rtx-3060"),
        ("NVIDIA GeForce RTX 3060 Ti", 12, None),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 12, None),
        ("NVIDIA GeForce RTX 3061", 12, None),
        ("NVIDIA GeForce RTX 3060", 8, None),
        ("NVIDIA GeForce RTX 3060", 10.9, "rtx-3060"),
        ("NVIDIA GeForce RTX 3060", 10.7, None),
        ("NVIDIA GeForce RTX 3060", 13.1, "rtx-3060"),
        ("NVIDIA GeForce RTX 3060", 13.3, None),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 16, "rtx-3080-mobile"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 8, None),
        ("NVIDIA GeForce RTX 3080", 16, None),
        ("NVIDIA T4", 14.75, "t4"),
        ("Tesla T4", 16, "t4"),
        ("NVIDIA T400", 15, None),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 40, None),
        ("NVIDIA A100 80GB PCIe", 80, None),
        ("NVIDIA A100-PCIE-80GB", 80, None),
    ],
)
def test_the_same_gpu_and_near_misses(gpu: str, memory: float, found: str | None) -> None:
    best = match(machine("probed", gpu, memory), KNOWN)
    assert (best.profile.name if best and best.kind == "same" else None) == found


def test_another_memory_is_a_variant_and_said() -> None:
    best = match(machine("probed", "NVIDIA GeForce RTX 3060", 8), KNOWN)
    assert best is not None
    assert (best.profile.name, best.kind) == ("rtx-3060", "variant")
    assert best.differs == ("memory is 8 GiB, in the file 12 GiB",)


def test_without_a_gpu_nothing_matches() -> None:
    assert match(machine("probed"), KNOWN) is None


def test_nothing_is_known() -> None:
    assert match(machine("probed", "Tesla T4", 15), []) is None


def test_the_nearest_memory_wins() -> None:
    pair = [machine("small", "NVIDIA X", 10.0), machine("large", "NVIDIA X", 11.0)]
    for probed, name in ((10.4, "small"), (10.6, "large")):
        for known in (pair, pair[::-1]):
            found = match(machine("probed", "NVIDIA X", probed), known)
            assert found is not None
            assert found.profile.name == name


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that stands for hardware/, with two machines."""
    directory = tmp_path / "hardware"
    for profile in (KNOWN[1], KNOWN[3]):
        profile.save(directory / f"{profile.name}.yaml")
    (directory / "README.md").write_text("not hardware")
    monkeypatch.setattr(match_module, "data_dir", lambda name: tmp_path / name)
    return directory


@pytest.mark.usefixtures("shipped")
def test_what_ships_is_listed_by_name() -> None:
    assert known_hardware() == {"rtx-3060": KNOWN[1], "t4": KNOWN[3]}


def test_a_name_is_found_though_another_file_is_broken(shipped: Path) -> None:
    (shipped / "broken.yaml").write_text("name: broken\n")
    assert find_hardware("t4") == KNOWN[3]
    with pytest.raises(DocumentError, match=r"broken\.yaml"):
        known_hardware()


@pytest.mark.usefixtures("shipped")
def test_a_path_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KNOWN[4].save(tmp_path / "mine.yaml")
    assert find_hardware(str(tmp_path / "mine.yaml")) == KNOWN[4]
    monkeypatch.chdir(tmp_path)
    assert find_hardware("mine.yaml") == KNOWN[4]
    with pytest.raises(StorageError, match=r"absent\.yaml: cannot read: no such file"):
        find_hardware("absent.yaml")


@pytest.mark.usefixtures("shipped")
def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DocumentError, match=r"unknown hardware 'rtx-3070'; known: rtx-3060, t4; or give the path"):
        find_hardware("rtx-3070")
