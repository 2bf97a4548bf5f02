"""What is found of processor, memory and GPU, with a driver that is made up and groups in a directory."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from moeflow.errors import DeviceError
from moeflow.probe import devices
from moeflow.probe.cgroup import cpu_limit, memory_limit
from moeflow.probe.devices import find_cpu, find_gpu, find_memory

GIB = 1 << 30
BOARDS = [
    ("NVIDIA GeForce RTX 3060", 12 * GIB + 4711, (8, 6), "GPU-aaaa-1111"),
    ("Tesla T4", 15 * GIB, (7, 5), "GPU-bbbb-2222"),
    ("NVIDIA H200", 140 * GIB, (9, 0), "GPU-bbbc-3333"),
]


class FakeDriver:
    """Stands for the driver behind pynvml; counts how often it is opened and closed."""

    def __init__(self, boards: list[tuple[str, int, tuple[int, int], str]]):
        self.boards = boards
        self.opened = self.closed = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
        def init() -> None:
            self.opened += 1

        def shutdown() -> None:
            self.closed += 1

        monkeypatch.setattr(pynvml, "nvmlInit", init)
        monkeypatch.setattr(pynvml, "nvmlShutdown", shutdown)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(self.boards))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: self.boards[i])
        monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda h: h[0])
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda h: SimpleNamespace(total=h[1]))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda h: h[2])
        monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda h: h[3])
        return self


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return FakeDriver(BOARDS).install(monkeypatch)


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def init() -> None:
        raise pynvml.NVMLError(code)

    monkeypatch.setattr(pynvml, "nvmlInit", init)


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_without_a_driver_there_is_no_gpu(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    refuse(monkeypatch, code)
    assert find_gpu() is None
    assert driver.closed == 0  # what was never opened cannot be closed


@pytest.mark.usefixtures("driver")
def test_a_broken_driver_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    with pytest.raises(DeviceError, match="nvidia-smi"):
        find_gpu()


def test_the_first_gpu_is_described(driver: FakeDriver) -> None:
    gpu = find_gpu()
    assert gpu is not None
    assert (gpu.name, gpu.memory, gpu.compute_capability) == ("NVIDIA GeForce RTX 3060", 12 * GIB, "8.6")
    assert gpu.memory_bandwidth is None
    assert (driver.opened, driver.closed) == (1, 1)


def test_the_driver_is_closed_when_a_question_fails(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_handle: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lost)
    with pytest.raises(DeviceError, match="does not answer"):
        find_gpu()
    assert driver.closed == 1


def test_no_gpu_in_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    empty = FakeDriver([]).install(monkeypatch)
    assert find_gpu() is None
    assert empty.closed == 1


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("1", "Tesla T4"),
        ("2,0", "NVIDIA H200"),
        (" 1 ,2", "Tesla T4"),
        ("1gpu", "Tesla T4"),
        ("GPU-bbbc", "NVIDIA H200"),
        ("GPU-bbbb-2222,GPU-aaaa", "Tesla T4"),
        ("", None),
        ("-1", None),
        ("none", None),
        ("3", None),
        ("GPU-cccc", None),
    ],
)
@pytest.mark.usefixtures("driver")
def test_the_environment_chooses_as_for_cuda(monkeypatch: pytest.MonkeyPatch, setting: str, name: str | None) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    gpu = find_gpu()
    assert (gpu.name if gpu else None) == name


@pytest.mark.usefixtures("driver")
def test_hidden_gpus_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a broken driver does not stop who asked to go without."""
    refuse(monkeypatch, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpu() is None


@pytest.mark.usefixtures("driver")
def test_among_several_torchs_name_decides() -> None:
    gpu = find_gpu("NVIDIA H200")
    assert gpu is not None
    assert gpu.compute_capability == "9.0"
    unknown_to_driver = find_gpu("another name for it")
    assert unknown_to_driver is not None
    assert unknown_to_driver.name == "NVIDIA GeForce RTX 3060"


@pytest.mark.parametrize(("setting", "named"), [("MIG-1234", None), ("0", "NVIDIA A100-SXM4-40GB MIG 1g.5gb")])
@pytest.mark.usefixtures("driver")
def test_a_slice_is_refused(monkeypatch: pytest.MonkeyPatch, setting: str, named: str | None) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    with pytest.raises(DeviceError, match="MIG slice"):
        find_gpu(named)


def group(root: Path, path: str, **files: str) -> None:
    directory = root / path
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text + "\n")


def member(root: Path, text: str) -> Path:
    path = root / "membership"
    path.write_text(text)
    return path


def test_no_group_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path, tmp_path / "missing") is None
    assert cpu_limit(tmp_path, tmp_path / "missing") is None
    membership = member(tmp_path, "0::/a\n")
    group(tmp_path, "a", memory__max="max", cpu__max="max 100000")
    assert memory_limit(tmp_path, membership) is None
    assert cpu_limit(tmp_path, membership) is None


def test_version_2_takes_the_lowest_from_own_group_to_root(tmp_path: Path) -> None:
    membership = member(tmp_path, "0::/job/step\n")
    group(tmp_path, "job/step", memory__max="9000", cpu__max="max 100000")
    group(tmp_path, "job", memory__max="5000", cpu__max="150000 100000")
    group(tmp_path, "other", memory__max="1", cpu__max="1 100000")
    assert memory_limit(tmp_path, membership) == 5000
    assert cpu_limit(tmp_path, membership) == 1.5
    group(tmp_path, "", memory__max="4000", cpu__max="100000 200000")
    assert memory_limit(tmp_path, membership) == 4000
    assert cpu_limit(tmp_path, membership) == 0.5


def test_version_1_and_a_path_from_outside_the_container(tmp_path: Path) -> None:
    membership = member(tmp_path, "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    group(tmp_path, "memory", memory__limit_in_bytes="7000")
    group(tmp_path, "cpu", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert memory_limit(tmp_path, membership) == 7000
    assert cpu_limit(tmp_path, membership) == 3.0
    group(tmp_path, "cpu", cpu__cfs_quota_us="-1")
    assert cpu_limit(tmp_path, membership) is None


def test_memory_is_the_lower_of_machine_and_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GIB + 12345))
    monkeypatch.setattr(devices, "memory_limit", lambda: None)
    assert find_memory() == 16 * GIB
    monkeypatch.setattr(devices, "memory_limit", lambda: 2**63 - 4096)
    assert find_memory() == 16 * GIB
    monkeypatch.setattr(devices, "memory_limit", lambda: 3 * GIB + 5)
    assert find_memory() == 3 * GIB


def topology(root: Path, siblings: dict[int, str]) -> Path:
    for number, text in siblings.items():
        directory = root / f"cpu{number}/topology"
        directory.mkdir(parents=True)
        (directory / "thread_siblings_list").write_text(text)
    return root


def test_cores_are_physical_and_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}
    monkeypatch.setattr(devices, "TOPOLOGY", topology(tmp_path, pairs))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 4, 5})
    quota: list[float | None] = [None]
    monkeypatch.setattr(devices, "cpu_limit", lambda: quota[0])
    assert find_cpu().cores == 3  # 0 with 4, 1 with 5, and 2
    quota[0] = 2.5
    assert find_cpu().cores == 2
    quota[0] = 0.5
    assert find_cpu().cores == 1
    quota[0] = 64.0
    assert find_cpu().cores == 3


def test_without_a_topology_every_cpu_is_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 9})
    monkeypatch.setattr(devices, "cpu_limit", lambda: None)
    assert find_cpu().cores == 3


def test_the_name_of_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "CPUINFO", cpuinfo)
    assert find_cpu().name == ""
    cpuinfo.write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: Some   CPU @ 2.0GHz\n\nmodel name\t: Second\n")
    assert find_cpu().name == "Some CPU @ 2.0GHz"
    cpuinfo.write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    assert find_cpu().name == ""
