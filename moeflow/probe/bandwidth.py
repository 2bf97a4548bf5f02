"""How fast bytes move: over the link, in device memory, in host memory. The part of the probe that needs torch.

Each rate is measured by what the engine does: page-locked copies by the copy engine and by the copy kernel, or on a CPU
one worker's `copy_`, and reads by all of torch's threads. Buffers are larger than caches, every buffer is written once
before (untouched pages are not memory yet), and copies that are smaller than the buffer walk through it. It measures
bytes, not the kernels that compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from moeflow.kernels.copy import RangeCopy
from moeflow.kernels.launcher import cuda_launcher
from moeflow.probe.cuda import cuda_memory, event_timer, registered, wake
from moeflow.probe.measurement import REPEATS, Measurement, repeat
from moeflow.progress import Progress, silent

__all__ = [
    "BUFFER",
    "copy_rate",
    "copy_rates",
    "device_rate",
    "kernel_rates",
    "link_rate",
    "link_rates",
    "read_rate",
]

BUFFER = 256 << 20
"""Bytes of one buffer."""

MIB = 1 << 20
LOAD_SECONDS = 0.3  # of copies under way while the bus is looked at


def copy_rate(nbytes: int = BUFFER, progress: Progress = silent) -> Measurement:
    """`copy_rates` of one size."""
    return copy_rates([nbytes], progress)[0]


def copy_rates(sizes: Sequence[int], progress: Progress = silent) -> list[Measurement]:
    """Copies that one worker thread makes to a second buffer, by size: what stands for the link on a CPU.

    Each byte counts once, as a blob's bytes do, though memory sees a read and a write. torch may split a large
    `copy_` over all cores, in the engine as here.
    """
    source, target = _host_buffer(max(sizes)), _host_buffer(max(sizes))
    with ThreadPoolExecutor(1) as worker:

        def timed(copy: Callable[[], object]) -> float:
            return worker.submit(_clocked(copy)).result()

        return _by_size(sizes, lambda at: target[at].copy_(source[at]), timed, "copying in host memory", progress)


def read_rate(nbytes: int = BUFFER, progress: Progress = silent) -> Measurement:
    """What all of torch's threads read from host memory: a sum, which writes nothing.

    The buffer has twice `nbytes`; large shared caches would serve a part of a smaller one.
    """
    words = _host_buffer(2 * nbytes).view(torch.int64)  # the type whose sum costs least per byte
    return repeat(words.nbytes, _clocked(words.sum), "reading host memory", progress)


def link_rate(nbytes: int = BUFFER, progress: Progress = silent) -> Measurement:
    """`link_rates` of one size.

    Raises:
        DeviceError: as for it.
    """
    return link_rates([nbytes], progress)[0]


def link_rates(
    sizes: Sequence[int], progress: Progress = silent, under_load: Callable[[], None] | None = None
) -> list[Measurement]:
    """Copies from page-locked host memory to the first GPU by the copy engine, by size, one at a time.

    Args:
        sizes: bytes of a copy.
        progress: told of each pass.
        under_load: called once afterwards, while copies are under way.

    Raises:
        DeviceError: CUDA refused; memory of either side may be taken.
    """
    largest = max(sizes)
    with cuda_memory(largest):
        source = torch.empty(largest, dtype=torch.uint8, pin_memory=True).fill_(1)
        target = torch.zeros(largest, dtype=torch.uint8, device="cuda:0")

        def copy(at: slice) -> None:
            target[at].copy_(source[at], non_blocking=True)

        wake(copy, largest)
        found = _by_size(sizes, copy, event_timer(), "copying to the GPU", progress)
        if under_load:
            for _ in range(max(2, int(LOAD_SECONDS * found[-1].rate / sizes[-1]))):
                copy(slice(0, sizes[-1]))
            under_load()
            torch.cuda.synchronize()
        return found


def kernel_rates(sizes: Sequence[int], progress: Progress = silent) -> list[Measurement]:
    """The same copies by the copy kernel, from memory registered as the engine does it.

    Raises:
        DeviceError: CUDA refused, the kernels do not run on this GPU, or the driver would not lock the memory.
    """
    largest = max(sizes)
    launcher = cuda_launcher(torch.device("cuda:0"))
    with cuda_memory(largest), registered(largest) as address:
        kernel = RangeCopy(launcher, torch.device("cuda:0"))
        target = torch.zeros(largest, dtype=torch.uint8, device="cuda:0")

        def copy(at: slice) -> None:
            kernel(address + at.start, target[at])

        wake(copy, largest)
        return _by_size(sizes, copy, event_timer(), "copying by kernel", progress)


def device_rate(nbytes: int = BUFFER, progress: Progress = silent) -> Measurement:
    """The first GPU's memory, by a copy within it; bytes read and bytes written both count.

    Raises:
        DeviceError: CUDA refused; its memory may be taken.
    """
    with cuda_memory(2 * nbytes):
        source = torch.ones(nbytes, dtype=torch.uint8, device="cuda:0")
        target = torch.zeros_like(source)
        timer = event_timer()
        return repeat(2 * nbytes, lambda: timer(lambda: target.copy_(source)), "copying in GPU memory", progress)


def _host_buffer(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8).fill_(1)


def _by_size(
    sizes: Sequence[int],
    copy: Callable[[slice], object],
    timed: Callable[[Callable[[], object]], float],
    description: str,
    progress: Progress,
) -> list[Measurement]:
    """Measure `copy` of the bytes at a slice, by size. Each takes the next range, so that no cache serves it."""
    largest, found = max(sizes), []
    for nbytes in sizes:
        places = _places(nbytes, largest)
        passes = max(REPEATS, min(100, 16 * MIB // nbytes))  # a clock's ticks show in small copies
        one_pass = partial(lambda places: timed(partial(copy, next(places))), places)
        found.append(repeat(nbytes, one_pass, description, progress, passes))
    return found


def _places(nbytes: int, whole: int) -> Iterator[slice]:
    """Ranges of `nbytes`, one behind another and from the start again."""
    while True:
        for begin in range(0, whole - nbytes + 1, nbytes):
            yield slice(begin, begin + nbytes)


def _clocked(action: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin

    return timed
