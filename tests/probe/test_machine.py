"""The whole probe: which rates go where, when a GPU counts, and that the result names nobody."""

from __future__ import annotations

import getpass
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moeflow.errors import UsageError
from moeflow.probe import bandwidth, machine
from moeflow.probe.machine import probe
from moeflow.schema import Gpu, HardwareProfile

BOARD = Gpu(name="NVIDIA GeForce RTX 3060", memory=12 << 30, compute_capability="8.6")


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Every measurement replaced by a number of its own; what was measured is in the keys."""
    measured: dict[str, int] = {}
    numbers = {"copy_rate": 1.004e9, "read_rate": 2e9, "link_rate": 12.3456e9, "device_rate": 360e9}

    def stand_in(name: str, rate: float) -> None:
        def measure(nbytes: int, _progress: object) -> float:
            measured[name] = nbytes
            return rate

        monkeypatch.setattr(bandwidth, name, measure)

    for name, rate in numbers.items():
        stand_in(name, rate)
    return measured


def see(monkeypatch: pytest.MonkeyPatch, driver: Gpu | None, torch_name: str | None) -> list[str | None]:
    asked: list[str | None] = []

    def find(named: str | None = None) -> Gpu | None:
        asked.append(named)
        return driver

    monkeypatch.setattr(machine, "find_gpu", find)
    monkeypatch.setattr(bandwidth, "cuda_device_name", lambda: torch_name)
    return asked


def test_with_a_gpu_the_link_is_the_bus(monkeypatch: pytest.MonkeyPatch, rates: dict[str, int]) -> None:
    asked = see(monkeypatch, BOARD, BOARD.name)
    profile = probe("desk")
    assert (profile.name, profile.device, profile.origin) == ("desk", "cuda", "measured")
    assert profile.gpu == BOARD.model_copy(update={"memory_bandwidth": 360_000_000_000})
    assert profile.link.host_to_device == 12_350_000_000
    assert profile.cpu.memory_bandwidth == 2_000_000_000
    assert profile.disk is None
    assert set(rates) == {"link_rate", "device_rate", "read_rate"}
    assert asked == [None, BOARD.name]  # the one that torch takes, when there are several


def test_without_a_gpu_the_link_is_a_copy(monkeypatch: pytest.MonkeyPatch, rates: dict[str, int]) -> None:
    see(monkeypatch, None, None)
    profile = probe()
    assert (profile.name, profile.device, profile.gpu) == ("this-machine", "cpu", None)
    assert profile.link.host_to_device == 1_000_000_000
    assert set(rates) == {"copy_rate", "read_rate"}
    assert "not used" not in profile.description


def test_a_gpu_that_torch_cannot_use_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, rates: dict[str, int]
) -> None:
    see(monkeypatch, BOARD, None)
    monkeypatch.setattr(bandwidth.torch.version, "cuda", None)
    profile = probe()
    assert profile.gpu is None
    assert "RTX 3060 is not used: torch" in profile.description
    assert "built without CUDA" in profile.description
    assert "\n" not in profile.description
    monkeypatch.setattr(bandwidth.torch.version, "cuda", "13.0")
    assert "cannot start CUDA 13.0" in probe().description
    assert "link_rate" not in rates


@pytest.mark.parametrize("name", ["My Laptop", "Upper", "-x", "", "a/b", "x\n"])
def test_a_name_that_the_schema_refuses_stops_before_measuring(rates: dict[str, int], name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a hardware profile: use lower-case"):
        probe(name)
    assert rates == {}


def test_small_machines_are_measured_with_small_buffers(monkeypatch: pytest.MonkeyPatch, rates: dict[str, int]) -> None:
    see(monkeypatch, None, None)
    monkeypatch.setattr(machine, "find_memory", lambda: 1 << 30)
    probe()
    assert rates == {"copy_rate": 32 << 20, "read_rate": 32 << 20}
    monkeypatch.setattr(machine, "find_memory", lambda: 1 << 40)
    probe()
    assert rates == {"copy_rate": 256 << 20, "read_rate": 256 << 20}


def test_the_profile_is_shareable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real probe with little memory: valid, written and read the same, and naming no host, user or place."""
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setattr(getpass, "getuser", lambda: "secret-user")
    monkeypatch.setattr(bandwidth, "BUFFER", 4 << 20)
    profile = probe(directory=tmp_path)
    assert profile.disk is not None
    assert profile.disk.read > 0
    assert set(profile.sources) == set(profile.values())
    assert profile.source("disk.read") == "measured, moeflow probe"
    profile.save(tmp_path / "hardware.yaml")
    assert HardwareProfile.load(tmp_path / "hardware.yaml") == profile
    text = profile.to_yaml()
    for secret in ("secret", os.uname().nodename, str(tmp_path), str(Path.home())):
        assert secret not in text


@pytest.mark.usefixtures("rates")
def test_no_serial_number_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's own UUID stays with the driver even when the environment chooses by it."""
    from test_devices import BOARDS, FakeDriver

    FakeDriver(BOARDS).install(monkeypatch)
    monkeypatch.setattr(bandwidth, "cuda_device_name", lambda: "Tesla T4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbbb-2222")
    profile = probe()
    assert profile.gpu is not None
    assert profile.gpu.name == "Tesla T4"
    assert "2222" not in profile.to_yaml()


def test_importing_the_probe_imports_no_torch() -> None:
    check = "import sys, moeflow.probe.machine, moeflow.probe.match; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
