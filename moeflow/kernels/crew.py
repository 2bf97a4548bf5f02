"""The crew of CPU threads: products shared out among cores, for the host or for a device that asks for them.

The threads are the library's own (`cpp/crew.cpp`): Python only starts them, and no pass waits for its lock. A crew for
the host wakes at each `run`; one for a device waits awake while passes go on, and sleeps between them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moeflow.errors import DeviceError
from moeflow.kernels.cpu import CpuGemv, Job, Matrix, best_level
from moeflow.kernels.library import library
from moeflow.schema import PackedMatrix

__all__ = ["Answers", "Crew", "Desk", "Half", "processors"]

TOPOLOGY = Path("/sys/devices/system/cpu")
LINGER = 200_000_000  # nanoseconds awake after a pass began or something was asked for; passes follow one another
PATIENCE = 2_000_000_000  # nanoseconds that the last products may take when a crew ends


@dataclass(frozen=True)
class Half:
    """One matrix of all experts of a layer."""

    matrix: PackedMatrix
    blobs: int
    """Address of expert 0's blob."""
    nbytes: int
    """From one expert's blob to the next."""


@dataclass(frozen=True)
class Answers:
    """Memory of one exchange: activations of up to M choices in, products out."""

    numbers: Tensor
    """uint8 [M, bytes]: in the crew's order."""
    scales: Tensor
    """float32 [M, lanes]."""
    sums: Tensor
    """float32 [M, lanes * units]."""
    results: Tensor
    """float32 [M, rows], rows filled up to a multiple of four."""

    @classmethod
    def room(cls, matrices: Sequence[PackedMatrix], most: int, pinned: bool) -> Answers:
        """For the largest of `matrices`.

        Raises:
            DeviceError: a device lays out activations for quantized weights only.
        """
        gemvs = [CpuGemv(matrix) for matrix in matrices]
        if plain := [gemv.matrix.name for gemv in gemvs if gemv.plain]:
            raise DeviceError(f"{plain[0]} is not quantized")
        sizes = [gemv.sizes for gemv in gemvs]

        def memory(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(most, -(-columns // 64) * 64, dtype=dtype, pin_memory=pinned)

        return cls(
            memory(max(size.numbers for size in sizes), torch.uint8),
            memory(max(size.scales for size in sizes), torch.float32),
            memory(max(size.sums for size in sizes), torch.float32),
            memory(max(matrix.rows for matrix in matrices), torch.float32),
        )


@dataclass(frozen=True)
class Desk:
    """Where a device and a crew meet."""

    letter: Tensor
    """int32: crew.hpp's."""
    arrived: Tensor
    """int32 [2, 16]."""
    halves: Sequence[Half]
    """Two of each layer."""
    answers: Sequence[Answers]
    """Of both halves."""
    most: int
    """Jobs of a request."""


class _Half(ctypes.Structure):
    _fields_ = [("matrix", Matrix), ("blobs", ctypes.c_void_p), ("nbytes", ctypes.c_int64)]


class _Service(ctypes.Structure):
    _fields_ = [
        ("letter", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("halves", ctypes.POINTER(_Half)),
        ("layers", ctypes.c_int32),
        ("most", ctypes.c_int32),
        ("numbers", ctypes.c_void_p * 2),
        ("scales", ctypes.c_void_p * 2),
        ("sums", ctypes.c_void_p * 2),
        ("strides", ctypes.c_int64 * 2),
        ("scale_strides", ctypes.c_int64 * 2),
        ("sum_strides", ctypes.c_int64 * 2),
        ("results", ctypes.c_void_p * 2),
        ("result_strides", ctypes.c_int64 * 2),
        ("linger", ctypes.c_int64),
    ]


def _service(desk: Desk) -> tuple[_Service, object]:
    """The library's structure, and what must live as long."""
    halves = (_Half * len(desk.halves))(*(_Half(CpuGemv(h.matrix).struct, h.blobs, h.nbytes) for h in desk.halves))

    def both(name: str) -> tuple[int, int]:
        first, second = (getattr(answers, name).data_ptr() for answers in desk.answers)
        return first, second

    def strides(name: str) -> tuple[int, int]:
        first, second = (getattr(answers, name).stride(0) for answers in desk.answers)
        return first, second

    service = _Service(
        letter=desk.letter.data_ptr(), arrived=desk.arrived.data_ptr(), halves=halves, layers=len(halves) // 2,
        most=desk.most, numbers=both("numbers"), scales=both("scales"), sums=both("sums"), strides=strides("numbers"),
        scale_strides=strides("scales"), sum_strides=strides("sums"), results=both("results"),
        result_strides=strides("results"), linger=LINGER,
    )  # fmt: skip
    return service, (halves, desk)


def processors(threads: int, spare: int = 0) -> list[int] | None:
    """A logical CPU for each of so many threads, or None where there are fewer: cores first, then their other threads.

    Args:
        threads: how many.
        spare: CPUs that are left to others first.
    """
    allowed = sorted(os.sched_getaffinity(0))
    siblings: dict[str, int] = {}
    order = []
    for cpu in allowed:
        try:
            core = (TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            core = str(cpu)
        order.append((siblings.get(core, 0), cpu))  # the first thread of every core comes before any second one
        siblings[core] = siblings.get(core, 0) + 1
    chosen = [cpu for _, cpu in sorted(order)][spare : spare + threads]
    return chosen if len(chosen) == threads else None


class Crew:
    """Threads, until `close`.

    Args:
        threads: that compute; one for the host is its caller.
        desk: of the device that they serve; None: they are the host's.
        level: of instructions; None: the best of this CPU.

    Raises:
        DeviceError: the library is not there, has no kernel for the desk's weights, or the system gives no threads.
    """

    def __init__(self, threads: int, desk: Desk | None = None, level: int | None = None):
        self._library = library()
        new = self._library.moeflow_crew_new
        new.restype = ctypes.c_void_p
        started = threads if desk is not None else threads - 1
        # One core is left to whoever drives the device. Where a host's threads run is left to the system.
        cpus = processors(started, spare=1) if desk is not None else None
        self._kept: object = None
        service = None
        if desk is not None:
            service, self._kept = _service(desk)
        self._crew = ctypes.c_void_p(
            new(
                started,
                (ctypes.c_int32 * started)(*cpus) if cpus else None,
                best_level() if level is None else level,
                ctypes.byref(service) if service is not None else None,
            )
        )
        if not self._crew:
            raise DeviceError(f"there is no crew of {threads} threads: they are more than 1024, or memory is out")
        self.threads = int(self._library.moeflow_crew_threads(self._crew)) + (desk is None)
        if self.threads < threads:
            self.close()
            raise DeviceError(f"the system gave {self.threads} of {threads} threads; ask for fewer with cpu.threads")

    def run(self, jobs: Sequence[Job]) -> None:
        """Compute all jobs; returns when their results are there."""
        array = (Job * len(jobs))(*jobs)
        if self._library.moeflow_crew_run(self._crew, array, len(jobs)):
            raise DeviceError("the CPU has no kernel for these weights")

    def wake(self) -> None:
        """A pass begins in which the device may ask for something."""
        if self._crew:
            self._library.moeflow_crew_wake(self._crew)

    def pause(self, paused: bool) -> None:
        """Leave requests unanswered, or answer them again."""
        if self._crew:
            self._library.moeflow_crew_pause(self._crew, int(paused))

    def settle(self, nanoseconds: int) -> bool:
        """Wait until nothing is under way, at most so long; whether it is so."""
        return not self._crew or bool(self._library.moeflow_crew_settle(self._crew, ctypes.c_int64(nanoseconds)))

    def close(self) -> None:
        """End the threads; calling it again does nothing."""
        crew, self._crew = self._crew, ctypes.c_void_p()
        if crew and self._library.moeflow_crew_free(crew, ctypes.c_int64(PATIENCE)):
            _stuck.append(self._kept)  # its threads still read this


_stuck: list[object] = []
