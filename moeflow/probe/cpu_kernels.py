"""How fast the CPU's own kernels multiply, alone and while the GPU's copy kernel reads host memory beside them.

Products go over more matrices than caches hold, one after another, by all threads together, as the engine does it; what
is in the matrices makes no difference but for numbers too small to be normal, which none of them has. A format that has
no kernel is left out. Which matrices, and whose threads, the caller says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from moeflow.errors import DeviceError
from moeflow.kernels.copy import RangeCopy
from moeflow.kernels.cpu import CpuGemv, Job
from moeflow.kernels.launcher import cuda_launcher
from moeflow.kernels.pages import allocate
from moeflow.probe.cuda import cuda_memory, event_timer, registered, wake
from moeflow.probe.measurement import Measurement, repeat
from moeflow.progress import Progress, silent
from moeflow.schema import PackedMatrix

__all__ = ["POOL", "Workers", "joint_rates", "numbers", "passes_during", "product_rates"]

POOL = 3 << 30
"""Bytes of the matrices that take turns, more than caches hold: with a last level of 300 MiB, 512 MiB were read at 1.3
times the memory's rate. A virtual machine may need a second for each GiB that was never used before."""
PAGE = 4096
TILE = 1 << 20
COPIED = 256 << 20  # bytes of one copy
COPY_SECONDS = 0.5  # that copies and products run beside each other


class Workers(Protocol):
    """Threads that do jobs together."""

    def run(self, jobs: Sequence[Job]) -> None:
        """All of them; returns when the last is done."""


class _Pass:
    """One vector times every matrix of a pool."""

    def __init__(self, matrix: PackedMatrix, workers: Workers, pool: torch.Tensor):
        self._workers = workers
        self._gemv = CpuGemv(matrix)
        each = _blob(matrix)
        self._blobs = pool[: len(pool) // each * each].view(-1, each)
        self._x = self._gemv.prepare(torch.randn(1, matrix.columns))
        self._out = torch.empty(len(self._blobs), 1, matrix.rows)
        self._jobs = [self._gemv.job(b, self._x, out) for b, out in zip(self._blobs, self._out, strict=True)]
        self.nbytes = len(self._blobs) * sum(segment.nbytes for segment in matrix.segments)

    def __call__(self) -> float:
        """Seconds that it took."""
        begin = time.perf_counter()
        self._workers.run(self._jobs)
        return time.perf_counter() - begin


def _blob(matrix: PackedMatrix) -> int:
    """Bytes from one matrix to the next."""
    return -(-max(segment.offset + segment.nbytes for segment in matrix.segments) // PAGE) * PAGE


def numbers(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes], rounded up to tiles, of bytes that are normal numbers as halves and as floats; in huge pages."""
    memory = allocate(-(-nbytes // TILE) * TILE)
    memory.view(-1, TILE).copy_(torch.randint(40, 60, (TILE,), dtype=torch.uint8))
    return memory


def product_rates(
    matrices: Mapping[str, PackedMatrix], workers: Workers, memory: torch.Tensor, progress: Progress = silent
) -> dict[str, Measurement]:
    """Packed bytes a second that `workers` multiply, by the names of `matrices`; those without a kernel are left out.

    Args:
        matrices: one of each format.
        workers: who multiplies.
        memory: from `numbers`; all formats read the same bytes.
        progress: told of each measurement.

    Raises:
        DeviceError: the library of kernels is not there.
    """
    found = {}
    for name, matrix in matrices.items():
        try:
            work = _Pass(matrix, workers, memory)
        except DeviceError as error:
            if "no CPU kernel" not in str(error):
                raise
            continue
        found[name] = repeat(work.nbytes, work, f"multiplying {name} on the CPU", progress)
    return found


def joint_rates(
    matrix: PackedMatrix, workers: Workers, memory: torch.Tensor, progress: Progress = silent
) -> tuple[float, float] | None:
    """Bytes a second of products and of copies to the first GPU, both at once; None where products outlast all copies.

    Raises:
        DeviceError: CUDA refused, the copy kernel does not run on this GPU, or the driver would not lock memory.
    """
    launcher, nbytes = cuda_launcher(torch.device("cuda:0")), min(COPIED, len(memory))
    with cuda_memory(nbytes), registered(nbytes) as address:
        kernel, target = RangeCopy(launcher, torch.device("cuda:0")), torch.zeros(nbytes, dtype=torch.uint8, device=0)

        def copy(at: slice) -> None:
            kernel(address + at.start, target[at])

        whole, work = slice(0, nbytes), _Pass(matrix, workers, memory)
        wake(copy, nbytes)
        count = max(3, round(COPY_SECONDS / event_timer()(lambda: copy(whole))))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        work()
        progress("copying beside the CPU's products", 0, 1)
        begin.record()
        for _ in range(count):
            copy(whole)
        end.record()
        passes, seconds = passes_during(work, lambda: not end.query())  # type: ignore[no-untyped-call]
        end.synchronize()
        link = count * nbytes / (begin.elapsed_time(end) / 1e3)
    return (passes * work.nbytes / seconds, link) if passes else None


def passes_during(work: Callable[[], float], busy: Callable[[], bool]) -> tuple[int, float]:
    """How many passes of `work` ended while something else was `busy`, and their seconds."""
    passes, seconds = 0, 0.0
    while True:
        took = work()
        if not busy():
            return passes, seconds
        passes, seconds = passes + 1, seconds + took
