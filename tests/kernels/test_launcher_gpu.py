"""The launcher on a real device: the same checks as the emulator's, streams, graphs and errors."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from emulator.checks import CHECKS

from moeflow.errors import DeviceError
from moeflow.kernels.launcher import CudaLauncher, cuda_launcher

pytestmark = pytest.mark.gpu

EMULATOR = Path(__file__).parent.parent / "emulator"


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def launcher(device: torch.device) -> CudaLauncher:
    return CudaLauncher(device, EMULATOR)


@pytest.mark.parametrize("name", CHECKS)
def test_arithmetic_and_collectives(name: str, launcher: CudaLauncher, device: torch.device) -> None:
    CHECKS[name](launcher, device)


def test_launches_go_to_the_current_stream_and_into_graphs(launcher: CudaLauncher, device: torch.device) -> None:
    kernel = launcher.kernel("meeting.cu", "sum")
    x, out = torch.ones(512, device=device), torch.zeros(2, device=device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        kernel(2, 256, x, out, 512)
    stream.synchronize()
    assert out.tolist() == [256, 256]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
        kernel(2, 256, x, out, 512)
    for turn in range(1, 4):
        graph.replay()
        assert out.tolist() == [256 * (1 + turn)] * 2


def test_a_thread_of_its_own_may_launch(launcher: CudaLauncher, device: torch.device) -> None:
    kernel = launcher.kernel("meeting.cu", "sum")
    x, out = torch.ones(256, device=device), torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    thread = threading.Thread(target=kernel, args=(1, 256, x, out, 256))
    thread.start()
    thread.join()
    torch.cuda.synchronize(device)
    assert out.item() == 256


def test_what_the_driver_refuses_is_an_error_that_names_the_kernel(launcher: CudaLauncher) -> None:
    with pytest.raises(DeviceError, match=r"votes of meeting\.cu.*block 4096: CUDA_ERROR_INVALID_VALUE"):
        launcher.kernel("meeting.cu", "votes")(1, 4096, None, None)
    with pytest.raises(DeviceError, match="CUDA_ERROR_NOT_FOUND"):
        launcher.kernel("meeting.cu", "nothing")


def test_the_cache_serves_a_second_launcher(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x, out = torch.ones(256, device=device), torch.zeros(1, device=device)
    for damaged in (False, True, False):
        for file in tmp_path.rglob("*.cubin") if damaged else ():
            file.write_bytes(file.read_bytes()[:1000])
        out.zero_()
        CudaLauncher(device, EMULATOR).kernel("meeting.cu", "sum")(1, 256, x, out, 256)
        assert out.item() == 256
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
    assert cuda_launcher(device).arch == CudaLauncher(device).arch
