"""The thread that feeds the copy engine what the device asks for: the link's last tenth.

A kernel that reads host memory gets 0.92 of what the copy engine moves (50.2 of 54.7 GB/s on an H100), but the engine
takes its addresses from the host. So the device decides (`kernels/source/hand_over.cu`), writes what it wants into
page-locked memory and goes on copying by itself; this thread passes the request on, 7 microseconds after it was made,
and the engine announces its bytes on the device. No pass waits for Python: where this thread does not answer in time,
the kernels take the copy back, and all that follow.

It knows nothing of experts' ids or caches: addresses and pieces only. It waits on a core of its own during a pass, and
sleeps between passes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moeflow.errors import DeviceError
from moeflow.kernels.copy import PIECE
from moeflow.offload.spin_lock import SpinLock

__all__ = ["Blobs", "Copier", "Mover", "pays"]

# desk.cuh's, as all below
ALONE, ARRIVED, DESK = 2, 4, 8
LOCK, POST_TURN, POST_LAYER, POST_COUNT, POST_ENDED, TAKEN_BACK, POST_JOBS = 0, 16, 17, 18, 19, 32, 48

HEAD = 3 << 20  # bytes that a kernel brings while the engine gets going: 2 to 6 MiB did as well
LEAST_BLOB = 4 << 20  # of gate and up: copies of 4 MiB, one behind another, went at 52.5 GB/s, of 1 MiB at 47.6
LEAST = 12 << 20  # with 10 MiB the engine was no faster than a kernel, with 28 by 6%
PATIENCE = 50_000_000  # nanoseconds until the kernels take a copy back
# Seconds until a thread that computes in Python lets this one through: by default 5 ms, in which 250 MB could travel.
SWITCH_INTERVAL = 2e-4
FORGIVEN = 16  # copies taken back until nothing is handed over any more


class Copier(Protocol):
    """What copies to the device in order: `CopyEngine`, or a test's."""

    def enter(self) -> None:
        """Make the calling thread one that may copy."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Start a copy behind those started before."""

    def announce(self, target: int, value: int) -> None:
        """Write four bytes once what was started before is there for every kernel to see."""

    def wait(self) -> None:
        """Until all is there that was started."""


@dataclass(frozen=True)
class Blobs:
    """Where the blobs of a layer lie."""

    source: int
    """Address of expert 0's in page-locked memory."""
    pool: int
    """Address of buffer 0 on the device."""
    nbytes: int
    """Of a blob."""
    split: int
    """Pieces that hold gate and up."""


def pays(layers: Sequence[Blobs]) -> bool:
    """Whether blobs are large enough for the copy engine to be faster than kernels."""
    return max(blobs.split for blobs in layers) * PIECE >= LEAST_BLOB


class Mover:
    """Starts its thread; `close` ends it.

    Args:
        copier: moves bytes.
        layers: where each layer's blobs lie.
        jobs: so many copies a layer at most.
        device: where the kernels run.
        patience: nanoseconds until they take a copy back.
        head: bytes that a kernel brings first.
        least: bytes of a layer that are worth handing over.

    Raises:
        DeviceError: this system has nothing to wait for the device with.
    """

    def __init__(
        self, copier: Copier, layers: Sequence[Blobs], jobs: int, device: torch.device,
        patience: int = PATIENCE, head: int = HEAD, least: int = LEAST,
    ):  # fmt: skip
        pinned = device.type == "cuda"
        self.desk = torch.zeros(DESK, dtype=torch.int32, device=device)
        self.shares = torch.zeros(jobs, dtype=torch.int32, device=device)
        self.post = torch.zeros(POST_JOBS + 3 * jobs, dtype=torch.int32, pin_memory=pinned)
        self.head, self.least = head // PIECE, -(-least // PIECE)
        self.patience = patience
        self.problem: str | None = None
        """Why the kernels copy all by themselves from now on."""
        self.moved_bytes = 0
        """Handed to the copier since the start."""
        self._read = self.post.numpy()
        self._lock = SpinLock(self.post.data_ptr() + 4 * LOCK)
        self.opened = self._lock.opened
        self._copier, self._layers = copier, layers
        self._turn = self._started = self._ended = 0  # passes begun, and those whose last request was carried out
        self._taken_back = 0
        self._alone = self._late = self._closing = False
        self._moving = threading.Lock()
        self._wake = threading.Event()
        self._wake.set()
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(min(self._interval, SWITCH_INTERVAL))
        self._thread = threading.Thread(target=self._serve, name="moeflow-mover", daemon=True)
        self._thread.start()

    # -- the engine's thread ------------------------------------------------------------------------------

    def begin(self, hand_over: bool) -> None:
        """A pass begins, of whose copies some may be handed over; called before its kernels are launched.

        Not in a pass that Python issues kernel by kernel: compiling one may keep Python's lock for seconds, and loading
        one the driver's, while a kernel waits for this thread, which needs both.

        Raises:
            DeviceError: this thread slept in the middle of a copy that the kernels then took back, and went on while
                another pass was under way: what lies in the buffers is not sure, and `reset` is due.
        """
        if self._read[TAKEN_BACK]:
            self._forgive()
        alone = not hand_over or self.problem is not None
        if alone != self._alone:
            self._alone = alone
            self.desk[ALONE : ALONE + 1].fill_(alone)
        if not alone:
            self._started += 1
            self._wake.set()

    def _forgive(self) -> None:
        """Start anew after kernels took a copy back, once this thread, if it began the copy all the same, is through.

        Until the layer's next turn the buffers hold the experts that they were to hold, and bytes that arrive late are
        the bytes that are there: `hand_over` hands nothing else over. So all is well unless that turn may have come.
        """
        with self._moving:
            self._copier.wait()
            others = self._started - int(self._read[POST_ENDED]) > 1
            late, self._late = self._late, False
            self._taken_back += 1
            if self._taken_back > FORGIVEN and self.problem is None:
                self.problem = f"kernels copy all: the copy engine's thread was too slow {self._taken_back} times"
            self._start_anew()
        if late and others:
            raise DeviceError("the process was stopped within a copy, so the text may be wrong from here on; ask again")

    def reset(self) -> None:
        """Start anew after a pass that was abandoned; no kernel may be under way."""
        with self._moving:  # what it was about to copy, it has started
            self._copier.wait()
            if self.desk.is_cuda:
                torch.cuda.synchronize(self.desk.device)
            self._start_anew()
            self._late = False

    def _start_anew(self) -> None:
        """As if no pass had begun; until one does, kernels copy alone."""
        self.desk.zero_()
        self.desk[ALONE : ALONE + 1].fill_(1)
        self._alone = True
        self._read[POST_TURN:] = 0
        self._turn = self._started = self._ended = 0
        self._lock.open()  # a thread that waits for a pass to end sees that there is none

    def close(self) -> None:
        """End the thread; nothing may be under way. Calling it again does nothing."""
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        self._lock.open()
        self._thread.join(timeout=10)
        sys.setswitchinterval(self._interval)

    # -- the mover's thread -------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._copier.enter()
            while not self._closing:
                if self._idle():
                    self._wake.clear()
                    if self._idle() and not self._closing:  # a pass may have begun in between
                        self._wake.wait()
                    continue
                self._lock.wait()
                with self._moving:
                    self._move()
        except Exception as error:
            self.problem = f"the thread that feeds the copy engine ended: {error}"

    def _idle(self) -> bool:
        """Whether nothing can come before the next `begin`: all passes are over, or go on without this thread."""
        return self._ended == self._started or bool(self._read[TAKEN_BACK])

    def _move(self) -> None:
        """Pass on what was asked for, unless it is an old request or was taken back."""
        turn = int(self._read[POST_TURN])
        if turn == self._turn or int(self._read[TAKEN_BACK]) == turn:
            return
        self._turn, self._ended = turn, int(self._read[POST_ENDED])
        blobs, count = self._layers[int(self._read[POST_LAYER])], int(self._read[POST_COUNT])
        jobs = self._read[POST_JOBS : POST_JOBS + 3 * count].reshape(count, 3).tolist()
        for half in (0, 1):
            first, last = ((0, blobs.split), (blobs.split, blobs.nbytes // PIECE))[half]
            for expert, buffer, share in jobs:
                begin = max(first, share) * PIECE
                if begin < last * PIECE:
                    source, target = blobs.source + expert * blobs.nbytes, blobs.pool + buffer * blobs.nbytes
                    self._copier.copy(target + begin, source + begin, last * PIECE - begin)
                    self.moved_bytes += last * PIECE - begin
            self._copier.announce(self.desk.data_ptr() + 4 * (ARRIVED + half), turn)
        if int(self._read[TAKEN_BACK]) == turn:
            self._late = True
