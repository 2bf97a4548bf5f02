"""How fast bytes move: over the link, in device memory, in host memory. The part of the probe that needs torch.

Each rate is measured by what the engine does: pinned copies by the copy engine, or on a CPU one worker's
`copy_`, and reads by all of torch's threads. Buffers are larger than caches, every buffer is written once
before (untouched pages are not memory yet), the first pass is thrown away, and the median of the rest counts,
since a busy machine has slow outliers and a rate has no fast ones. It measures bytes, not kernels.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from moeflow.errors import DeviceError
from moeflow.progress import Progress, silent

__all__ = ["BUFFER", "cuda_device_name", "no_cuda_reason", "copy_rate", "read_rate", "link_rate", "device_rate"]

BUFFER = 256 << 20
"""Bytes of one buffer."""

REPEATS = 5


def cuda_device_name() -> str | None:
    """The GPU that torch takes by default; None where torch cannot use one."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def no_cuda_reason() -> str:
    """Why `cuda_device_name` is None though the driver shows a GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} cannot start CUDA {torch.version.cuda} (driver too old?)"


def copy_rate(nbytes: int = BUFFER, progress: Progress = silent) -> float:
    """Bytes a second that one worker thread copies to a second buffer: what stands for the link on a CPU.

    Each byte counts once, as a blob's bytes do, though memory sees a read and a write. torch may split a large
    `copy_` over all cores, in the engine as here.
    """
    source, target = _host_buffer(nbytes), _host_buffer(nbytes)
    with ThreadPoolExecutor(1) as worker:
        return _rate(
            nbytes, _clocked(lambda: worker.submit(target.copy_, source).result()), "copying in host memory", progress
        )


def read_rate(nbytes: int = BUFFER, progress: Progress = silent) -> float:
    """Bytes a second that all of torch's threads read from host memory: a sum, which writes nothing.

    The buffer has twice `nbytes`; large shared caches would serve a part of a smaller one.
    """
    words = _host_buffer(2 * nbytes).view(torch.int64)  # the type whose sum costs least per byte
    return _rate(words.nbytes, _clocked(words.sum), "reading host memory", progress)


def link_rate(nbytes: int = BUFFER, progress: Progress = silent) -> float:
    """Bytes a second from page-locked host memory to the first GPU, one large copy at a time.

    Raises:
        DeviceError: CUDA refused; memory of either side may be taken.
    """
    with _cuda_memory(nbytes):
        source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).fill_(1)
        target = torch.zeros(nbytes, dtype=torch.uint8, device="cuda:0")
        return _rate(
            nbytes, _event_clocked(lambda: target.copy_(source, non_blocking=True)), "copying to the GPU", progress
        )


def device_rate(nbytes: int = BUFFER, progress: Progress = silent) -> float:
    """Bytes a second of the first GPU's memory, by a copy within it; bytes read and bytes written both count.

    Raises:
        DeviceError: CUDA refused; its memory may be taken.
    """
    with _cuda_memory(2 * nbytes):
        source = torch.ones(nbytes, dtype=torch.uint8, device="cuda:0")
        target = torch.zeros_like(source)
        return _rate(2 * nbytes, _event_clocked(lambda: target.copy_(source)), "copying in GPU memory", progress)


def _host_buffer(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8).fill_(1)


def _rate(nbytes: int, timed: Callable[[], float], description: str, progress: Progress) -> float:
    """Bytes a second of a pass that moves `nbytes` and returns its seconds."""
    timed()  # wakes clocks, fills translation caches
    seconds = []
    for done in range(1, REPEATS + 1):
        seconds.append(timed())
        progress(description, done * nbytes, REPEATS * nbytes)
    return nbytes / statistics.median(seconds)


def _clocked(action: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin

    return timed


def _event_clocked(action: Callable[[], object]) -> Callable[[], float]:
    """Timed by the GPU itself: the call returns before the copy ends, and launching takes time of its own."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed() -> float:
        stream = torch.cuda.current_stream(0)
        begin.record(stream)
        action()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return timed


@contextlib.contextmanager
def _cuda_memory(nbytes: int) -> Iterator[None]:
    """Turn CUDA's errors into one with a remedy, and leave no buffers in torch's caches for the engine to lack."""
    try:
        with torch.cuda.device(0):
            yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise DeviceError(
            f"cannot measure the GPU with {nbytes >> 20} MiB of its memory: {reason}; end other programs that use "
            "the GPU, or name a file of hardware/ instead of probing"
        ) from error
    finally:
        with contextlib.suppress(RuntimeError):  # after an error of CUDA there may be nothing left to ask
            torch.cuda.empty_cache()
            if hasattr(torch.accelerator, "empty_host_cache"):  # torch 2.11 has none; its pinned buffer is reused
                torch.accelerator.empty_host_cache()
