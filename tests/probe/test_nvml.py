"""What is found of the GPU, with a driver that is made up and may refuse any single question."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pynvml
import pytest

from moeflow.errors import DeviceError
from moeflow.probe.nvml import find_board, find_gpu, read_bus
from moeflow.schema import BusState, Gpu, Pcie

GIB = 1 << 30
BOARDS = [
    ("NVIDIA GeForce RTX 3060", 12 * GIB + 4711, (8, 6), "GPU-aaaa-1111"),
    ("Tesla T4", 15 * GIB, (7, 5), "GPU-bbbb-2222"),
    ("NVIDIA H200", 140 * GIB, (9, 0), "GPU-bbbc-3333"),
]


class FakeDriver:
    """Stands for the driver behind pynvml; counts how often it is opened and closed."""

    bus: ClassVar[dict[str, int]] = {
        "MaxPcieLinkGeneration": 4, "MaxPcieLinkWidth": 16, "CurrPcieLinkGeneration": 1, "CurrPcieLinkWidth": 8,
    }  # fmt: skip

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
        monkeypatch.setattr(pynvml, "nvmlDeviceGetIndex", lambda h: self.boards.index(h))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda h: h[0])
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda h: SimpleNamespace(total=h[1], free=h[1] // 2))
        monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.1")
        for name, value in self.bus.items():
            monkeypatch.setattr(pynvml, f"nvmlDeviceGet{name}", lambda _, value=value: value)
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


def deny(monkeypatch: pytest.MonkeyPatch, question: str, code: int = pynvml.NVML_ERROR_NOT_SUPPORTED) -> None:
    """Let the driver refuse one question and answer all others."""

    def refused(*_arguments: object) -> None:
        raise pynvml.NVMLError(code)

    monkeypatch.setattr(pynvml, question, refused)


@pytest.mark.usefixtures("driver")
def test_a_board_has_bus_free_memory_and_version_and_says_which_of_several_it_is() -> None:
    board = find_board()
    assert board is not None
    assert board.pcie == Pcie(generation=4, lanes=16)
    assert board.free == (12 * GIB + 4711) // 2
    assert board.driver == "580.1"
    assert board.remarks == ("GPU 0 of 3, counted from 0: CUDA_VISIBLE_DEVICES chooses another",)


def test_among_equal_gpus_the_number_decides(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bus that is read must be the one that copies run over."""
    driver.boards = [(*BOARDS[0][:3], f"GPU-{n}") for n in range(3)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    board = find_board(BOARDS[0][0])
    assert board is not None
    assert board.remarks[0].startswith("GPU 2 of 3, ")


def test_a_single_gpu_needs_no_remark(driver: FakeDriver) -> None:
    driver.boards = BOARDS[:1]
    board = find_board()
    assert board is not None
    assert board.remarks == ()


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND]
)
@pytest.mark.parametrize(
    ("question", "lost", "said"),
    [
        ("nvmlDeviceGetMaxPcieLinkGeneration", "pcie", "PCIe generation"),
        ("nvmlDeviceGetMaxPcieLinkWidth", "pcie", "PCIe lanes"),
        ("nvmlSystemGetDriverVersion", "driver", "driver version"),
    ],
)
def test_what_the_driver_may_not_tell_is_left_out_and_said(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, question: str, lost: str, said: str, code: int
) -> None:
    driver.boards = BOARDS[:1]
    deny(monkeypatch, question, code)
    board = find_board()
    assert board is not None
    assert [key for key in ("pcie", "driver", "free") if getattr(board, key) is None] == [lost]
    assert len(board.remarks) == 1
    assert board.remarks[0].startswith(f"the driver does not tell the {said} (")
    assert driver.closed == 1


@pytest.mark.parametrize("question", ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCudaComputeCapability"])
def test_what_is_needed_comes_from_cuda_or_the_error_says_what_is_missing(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    driver.boards = BOARDS[:1]
    deny(monkeypatch, question)
    known = Gpu(name=BOARDS[0][0], memory=11 * GIB, compute_capability="12.1")
    board = find_board(known.name, known)
    assert board is not None
    told = {"nvmlDeviceGetMemoryInfo": (11 * GIB, "8.6"), "nvmlDeviceGetCudaComputeCapability": (12 * GIB, "12.1")}
    assert (board.gpu.memory, board.gpu.compute_capability) == told[question]
    assert len(board.remarks) == 1
    with pytest.raises(DeviceError, match=r"does not tell all of the GPU .*describe it in a YAML file"):
        find_gpu()


@pytest.mark.parametrize(("generation", "lanes"), [(6, 16), (4, 0), (2, 16)])
def test_a_bus_that_profiles_do_not_know_is_left_out_and_said(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, generation: int, lanes: int
) -> None:
    driver.boards = BOARDS[:1]
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMaxPcieLinkGeneration", lambda _: generation)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMaxPcieLinkWidth", lambda _: lanes)
    board = find_board()
    assert board is not None
    assert board.pcie is None
    assert board.remarks == (f"the bus is left out: the driver calls it PCIe {generation}.0 x{lanes}",)


def test_the_bus_is_read_when_asked_and_the_driver_closed_behind(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with read_bus() as now:
        assert now() == BusState(generation=1, lanes=8)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrPcieLinkGeneration", lambda _: 4)
        assert now() == BusState(generation=4, lanes=8)
        assert driver.closed == 0
        deny(monkeypatch, "nvmlDeviceGetCurrPcieLinkWidth", pynvml.NVML_ERROR_NO_PERMISSION)
        assert now() is None
    assert (driver.opened, driver.closed) == (1, 1)


@pytest.mark.usefixtures("driver")
def test_without_a_driver_nothing_is_known_of_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    with read_bus() as now:
        assert now() is None
