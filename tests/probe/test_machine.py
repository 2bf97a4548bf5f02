"""The whole probe: which rates go where, when a GPU counts, and that the result names nobody."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import getpass
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_nvml import BOARDS, FakeDriver

from moeflow import __version__
from moeflow.errors import DeviceError, UsageError
from moeflow.probe import bandwidth, cuda, disk, estimate, machine
from moeflow.probe import rates as rates_module
from moeflow.probe.machine import probe
from moeflow.probe.match import find_hardware
from moeflow.probe.measurement import Measurement
from moeflow.probe.nvml import Board
from moeflow.schema import BusState, Gpu, HardwareProfile, Manifest, Pcie

BOARD = Gpu(name="NVIDIA GeForce RTX 3060", memory=12 << 30, compute_capability="8.6")


BOARD_IN_USE = Board(BOARD, Pcie(generation=4, lanes=16), free=11 << 30, driver="580.1")
LOADED = BusState(generation=4, lanes=8)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Every measurement replaced by a number of its own; what was measured, in which sizes, is in the keys."""
    measured: dict[str, list[int]] = {}

    def by_size(name: str, rate: float) -> None:
        def measure(
            sizes: list[int], _progress: object, under_load: Callable[[], None] | None = None
        ) -> list[Measurement]:
            measured[name] = list(sizes)
            if under_load:
                under_load()
            return [Measurement(rate / (len(sizes) - n), n / 100) for n in range(len(sizes))]

        monkeypatch.setattr(bandwidth, name, measure)

    def single(name: str, rate: float) -> None:
        def measure(nbytes: int, _progress: object) -> Measurement:
            measured[name] = [nbytes]
            return Measurement(rate, 0.01234)

        monkeypatch.setattr(bandwidth, name, measure)

    for name, rate in {"copy_rates": 1.004e9, "link_rates": 12.3456e9, "kernel_rates": 11e9}.items():
        by_size(name, rate)
    for name, rate in {"read_rate": 2e9, "device_rate": 360e9}.items():
        single(name, rate)
    return measured


def see(monkeypatch: pytest.MonkeyPatch, board: Board | None, known: Gpu | None) -> list[str | None]:
    """Let the driver show `board` and CUDA `known`; returns the names that the driver is asked for."""
    asked: list[str | None] = []

    def find(named: str | None = None, _known: Gpu | None = None) -> Board | None:
        asked.append(named)
        return board

    @contextlib.contextmanager
    def bus(_named: str | None) -> Iterator[Callable[[], BusState | None]]:
        yield lambda: LOADED if board else None

    monkeypatch.setattr(machine, "find_board", find)
    monkeypatch.setattr(rates_module, "read_bus", bus)
    monkeypatch.setattr(cuda, "cuda_gpu", lambda: known)
    return asked


def test_with_a_gpu_the_link_is_the_bus(monkeypatch: pytest.MonkeyPatch, rates: dict[str, list[int]]) -> None:
    asked = see(monkeypatch, BOARD_IN_USE, BOARD)
    profile = probe("desk")
    assert (profile.name, profile.device, profile.origin) == ("desk", "cuda", "measured")
    assert profile.gpu == BOARD.model_copy(update={"memory_bandwidth": 360_000_000_000})
    assert profile.link.host_to_device == 12_350_000_000
    assert profile.link.pcie == BOARD_IN_USE.pcie
    assert profile.link.under_load == LOADED
    assert profile.cpu.memory_bandwidth == 2_000_000_000
    assert profile.disk is None
    assert set(rates) == {"link_rates", "kernel_rates", "device_rate", "read_rate"}
    assert asked == [BOARD.name]  # the one that torch takes, when there are several


def test_the_link_is_measured_by_size_by_engine_and_kernel(
    monkeypatch: pytest.MonkeyPatch, rates: dict[str, list[int]]
) -> None:
    see(monkeypatch, BOARD_IN_USE, BOARD)
    profile = probe()
    points = profile.link.by_size
    assert rates["link_rates"] == rates["kernel_rates"] == [point.nbytes for point in points]
    assert [point.nbytes >> 10 for point in points] == [64, 256, 1024, 4096, 16384, 65536, 262144]
    assert (points[0].engine, points[-1].engine) == (1_760_000_000, 12_350_000_000)
    assert (points[0].kernel, points[-1].kernel) == (1_570_000_000, 11_000_000_000)
    assert (points[0].engine_spread, points[-1].kernel_spread) == (0.0, 0.06)
    assert profile.spreads == {
        "link.host_to_device": 0.06, "gpu.memory_bandwidth": 0.012, "cpu.memory_bandwidth": 0.012
    }  # fmt: skip
    assert profile.source("link.by_size").endswith("by the copy kernel from registered memory")


@pytest.mark.usefixtures("rates")
def test_a_kernel_that_cannot_run_is_left_out_and_said_without_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, BOARD_IN_USE, BOARD)

    def broken(*_arguments: object) -> None:
        raise DeviceError("copy.cu does not compile: /some/where/include is not there")

    monkeypatch.setattr(bandwidth, "kernel_rates", broken)
    profile = probe()
    assert {point.kernel for point in profile.link.by_size} == {None}
    assert profile.description.endswith("; the copy kernel is not measured: copy.cu does not compile")
    assert "/some/where" not in profile.to_yaml()


@pytest.mark.usefixtures("rates")
def test_a_bus_that_copies_outrun_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a virtual machine's, or one beside NVLink: the schema would refuse the file."""
    see(monkeypatch, dataclasses.replace(BOARD_IN_USE, pcie=Pcie(generation=3, lanes=8)), BOARD)
    profile = probe()
    assert profile.link.pcie is None
    assert profile.description.endswith("the bus is left out: copies are faster than PCIe 3.0 x8")


@pytest.mark.usefixtures("rates")
def test_a_gpu_that_the_driver_s_library_does_not_list_is_described_by_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, None, BOARD)
    profile = probe()
    assert profile.gpu is not None
    assert profile.gpu.name == BOARD.name
    assert (profile.link.pcie, profile.link.under_load) == (None, None)
    assert profile.source("gpu.memory") == "measured, as CUDA reports it"
    assert "(NVML) does not list this GPU" in profile.description


@pytest.mark.usefixtures("rates")
def test_what_the_driver_said_of_the_choice_is_in_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, dataclasses.replace(BOARD_IN_USE, remarks=("one of 3 GPUs",)), BOARD)
    assert "; one of 3 GPUs" in probe().description


@pytest.mark.usefixtures("rates")
def test_the_driver_s_lock_shows_what_may_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, BOARD_IN_USE, BOARD)
    monkeypatch.setattr(machine, "find_memory", lambda: 64 << 30)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        machine, "find_lockable", lambda *sizes: asked.append(sizes) or (sizes[0] // 2, "derived, by a test")
    )
    profile = probe()
    assert asked == [(64 << 30, 256 << 20)]
    assert (profile.ram_lockable, profile.source("ram_lockable")) == (32 << 30, "derived, by a test")


def test_versions_and_day_are_there(monkeypatch: pytest.MonkeyPatch, rates: dict[str, list[int]]) -> None:
    see(monkeypatch, BOARD_IN_USE, BOARD)
    before = datetime.date.today()
    probed = probe().probed
    assert probed is not None
    assert before <= probed.date <= datetime.date.today()
    assert (probed.moeflow, probed.driver) == (__version__, "580.1")
    assert (probed.torch, probed.cuda) == (torch.__version__, torch.version.cuda)
    assert rates


def test_without_a_gpu_the_link_is_a_copy(monkeypatch: pytest.MonkeyPatch, rates: dict[str, list[int]]) -> None:
    see(monkeypatch, None, None)
    profile = probe()
    assert (profile.name, profile.device, profile.gpu) == ("this-machine", "cpu", None)
    assert profile.link.host_to_device == 1_000_000_000
    assert {point.kernel for point in profile.link.by_size} == {None}
    assert set(rates) == {"copy_rates", "read_rate"}
    assert "not used" not in profile.description


def test_a_gpu_that_torch_cannot_use_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, rates: dict[str, list[int]]
) -> None:
    see(monkeypatch, BOARD_IN_USE, None)
    monkeypatch.setattr(torch.version, "cuda", None)
    profile = probe()
    assert profile.gpu is None
    assert "RTX 3060 is not used: torch" in profile.description
    assert "built without CUDA" in profile.description
    assert "\n" not in profile.description
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "cannot start CUDA 13.0" in probe().description
    assert "link_rates" not in rates


@pytest.mark.usefixtures("rates")
def test_random_reads_have_the_size_of_the_artifact_s_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_artifact: Path
) -> None:
    see(monkeypatch, None, None)
    monkeypatch.setattr(disk, "LARGEST", 8 << 20)
    none = probe(directory=tmp_path).disk
    assert none is not None
    assert none.blob == disk.BLOB
    largest = max(layout.nbytes for layout in Manifest.load(tiny_artifact / "manifest.json").layouts)
    own = probe(directory=tiny_artifact).disk
    assert own is not None
    assert own.blob == -(-largest // 4096) * 4096


@pytest.mark.parametrize("name", ["My Laptop", "Upper", "-x", "", "a/b", "x\n"])
def test_a_name_that_the_schema_refuses_stops_before_measuring(rates: dict[str, list[int]], name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a hardware profile: use lower-case"):
        probe(name)
    assert rates == {}


def test_small_machines_are_measured_with_small_buffers(
    monkeypatch: pytest.MonkeyPatch, rates: dict[str, list[int]]
) -> None:
    see(monkeypatch, None, None)
    monkeypatch.setattr(machine, "find_memory", lambda: 1 << 30)
    probe()
    assert rates["read_rate"] == [32 << 20]
    assert rates["copy_rates"][-2:] == [16 << 20, 32 << 20]
    monkeypatch.setattr(machine, "find_memory", lambda: 1 << 40)
    probe()
    assert rates["read_rate"] == [256 << 20]


def test_the_profile_is_shareable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real probe with little memory: valid, written and read the same, and naming no host, user or place."""
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setattr(getpass, "getuser", lambda: "secret-user")
    monkeypatch.setattr(bandwidth, "BUFFER", 4 << 20)
    monkeypatch.setattr(disk, "LARGEST", 8 << 20)
    profile = probe(directory=tmp_path)
    assert profile.disk is not None
    assert profile.disk.read > 0
    assert set(profile.sources) == set(profile.values())
    assert profile.source("disk.read").startswith("measured, moeflow probe, ")
    assert set(profile.spreads) == {
        "link.host_to_device", "cpu.memory_bandwidth", "disk.read", "disk.random_read"
    } | ({"gpu.memory_bandwidth"} if profile.gpu else set())  # fmt: skip
    profile.save(tmp_path / "hardware.yaml")
    assert HardwareProfile.load(tmp_path / "hardware.yaml") == profile
    text = profile.to_yaml()
    assert re.search(r"GPU-[0-9a-f]{8}", text) is None
    for secret in ("secret", os.uname().nodename, str(tmp_path), str(Path.home()), str(Path.cwd())):
        assert secret not in text


@pytest.mark.usefixtures("rates")
def test_no_serial_number_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's own UUID stays with the driver even when the environment chooses by it."""
    FakeDriver(BOARDS).install(monkeypatch)
    monkeypatch.setattr(cuda, "cuda_gpu", lambda: BOARD.model_copy(update={"name": "Tesla T4"}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbbb-2222")
    profile = probe()
    assert profile.gpu is not None
    assert profile.gpu.name == "Tesla T4"
    assert profile.link.under_load == BusState(generation=1, lanes=8)
    assert "2222" not in profile.to_yaml()


def no_rate(*_arguments: object) -> None:
    raise AssertionError("measured")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("copy_rates", "link_rates", "kernel_rates", "read_rate", "device_rate"):
        monkeypatch.setattr(bandwidth, name, no_rate)
    monkeypatch.setattr(disk, "disk_rates", no_rate)


@pytest.mark.usefixtures("unmeasured")
def test_quick_takes_a_share_of_the_bus_s_peak_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, BOARD_IN_USE, BOARD)
    profile = probe(directory=tmp_path, quick=True)
    assert profile.origin == "derived"
    assert profile.gpu == BOARD
    assert (profile.cpu.memory_bandwidth, profile.disk, profile.link.by_size) == (None, None, ())
    assert profile.link.host_to_device == 25_200_000_000
    assert profile.source("link.host_to_device") == (
        "derived, 0.8 of the peak of PCIe 4.0 x16, 31.5 GB/s; not measured"
    )
    assert profile.description.endswith("nothing was measured")
    assert set(profile.sources) == set(profile.values())
    assert not profile.spreads


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("gpu", "nearest"), [(None, "cpu-2-cores"), (BOARD, "rtx-3060")])
def test_quick_without_a_bus_takes_the_nearest_machine_and_names_it(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, nearest: str
) -> None:
    see(monkeypatch, None, gpu)
    profile = probe(quick=True)
    assert profile.link.host_to_device == find_hardware(nearest).link.host_to_device
    source = f"assumed, as of {nearest} in hardware/, the nearest machine there; not measured"
    assert profile.source("link.host_to_device") == source


@pytest.mark.usefixtures("unmeasured")
def test_quick_without_anything_to_go_by_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, None, None)
    monkeypatch.setattr(estimate, "known_hardware", dict)
    with pytest.raises(DeviceError, match="probe without --quick"):
        probe(quick=True)


@pytest.mark.gpu
def test_a_whole_probe_of_a_real_gpu(tmp_path: Path) -> None:
    """Under half a minute, the bus awake, and every rate within what the bus can do."""
    begin = time.monotonic()
    profile = probe(directory=tmp_path)
    assert time.monotonic() - begin < 30
    link = profile.link
    assert profile.gpu is not None
    assert profile.gpu.memory_bandwidth is not None
    assert link.host_to_device < profile.gpu.memory_bandwidth
    assert link.by_size[0].engine < link.by_size[-1].engine
    assert all(point.kernel is not None for point in link.by_size), profile.description
    if link.pcie and link.under_load:
        assert link.under_load.generation == link.pcie.generation
        assert link.under_load.lanes <= link.pcie.lanes
    profile.save(tmp_path / "gpu.yaml")
    assert HardwareProfile.load(tmp_path / "gpu.yaml") == profile


def test_importing_the_probe_imports_no_torch() -> None:
    modules = "moeflow.probe.machine, moeflow.probe.match, moeflow.probe.estimate"
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
