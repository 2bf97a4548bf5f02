"""Experts that are missing, computed in part where they lie: the CPU's crew as a second link.

The device decides in each layer of a decoding step which rows of the missing experts come over the link and which the
CPU computes (`offload.splits`), hands these over through page-locked memory (`kernels/source/sharing.cu`), and moves
the split from step to step so that both finish together. This is the host's side: the memory that both read, the crew
that answers, and what happens when it does not. No pass waits for Python, and none for a crew that was stopped: the
device computes what is overdue from host memory by itself.

One token only; passes of more take all that is missing over the link.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moeflow.kernels.crew import Answers, Crew, Desk, Half
from moeflow.kernels.gemv import Format, Jobs, Prepared, Rows
from moeflow.kernels.launcher import Kernel, Launcher
from moeflow.offload.splits import ALONE, TAKEN, Split, Splits
from moeflow.schema import Manifest, PackedMatrix, PlannedCpu

__all__ = ["Sharing"]

LETTER_TAKEN, LETTER_JOBS, LETTER_JOB = 24, 32, 4  # sharing.cuh's

PATIENCE = 100_000_000  # nanoseconds until the device computes by itself what the crew was to
SETTLED = 1_000_000_000  # nanoseconds that a late crew is given to finish
FORGIVEN = 16  # requests taken back until nothing is shared any more
POST_THREADS, COLLECT_THREADS = 512, 256


class Sharing(Splits):
    """Starts its crew; `close` ends it.

    Args:
        manifest: the packed model.
        planned: threads and the split to begin with.
        launcher: runs the kernels.
        blobs: each layer's first in host memory, uint8; the others follow.
        sources: the same memory's addresses, as the device sees them.
        device: where the kernels run.
        patience: nanoseconds until the device takes a request back; None: `PATIENCE`.
        make_crew: starts those who answer.

    Raises:
        DeviceError: there are no kernels for this CPU, or for these weights.
    """

    def __init__(
        self, manifest: Manifest, planned: PlannedCpu, launcher: Launcher, blobs: Sequence[Tensor],
        sources: Sequence[int], device: torch.device, patience: int | None = None,
        make_crew: Callable[[int, Desk], Crew] = Crew,
    ):  # fmt: skip
        super().__init__(manifest, launcher, sources, device, planned.share, planned.fixed)
        self._patience = PATIENCE if patience is None else patience
        most, pinned = self.choices, device.type == "cuda"
        self._letter = torch.zeros(LETTER_JOBS + LETTER_JOB * most, dtype=torch.int32, pin_memory=pinned)
        self._arrived = torch.zeros(2, 16, dtype=torch.int32, pin_memory=pinned)
        self._answers = [Answers.room([y.matrices[half] for y in self.layouts], most, pinned) for half in (0, 1)]
        halves = [
            Half(layout.matrices[half], blob.data_ptr(), layout.nbytes)
            for layout, blob in zip(self.layouts, blobs, strict=True)
            for half in (0, 1)
        ]
        self.crew = make_crew(planned.threads, Desk(self._letter, self._arrived, halves, self._answers, most))
        self.problem: str | None = None
        """Why the CPU computes nothing any more."""
        self._taken_back = self._last_taken = 0
        self._blobs = blobs  # the crew reads them
        weakref.finalize(self, self.crew.close)

    # -- the host's side -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """A pass begins; called before its kernels are launched."""
        taken = int(self._letter[LETTER_TAKEN])
        if taken != self._last_taken:
            self._last_taken = taken
            self._forgive()
        self.crew.wake()

    def _forgive(self) -> None:
        """Share again after the device took a request back, unless that was once too often or the crew is gone."""
        self._taken_back += 1
        if self.problem is None and not self.crew.settle(SETTLED):
            self.problem = "the link brings all that is missing: the CPU's threads do not answer any more"
        if self.problem is None and self._taken_back > FORGIVEN:
            self.problem = f"the link brings all that is missing: the CPU was too slow {self._taken_back} times"
        if self.problem is None:
            self.desk[ALONE : TAKEN + 1] = 0

    def reset(self) -> None:
        """Start anew after a pass that was abandoned; no kernel may be under way."""
        if self.desk.is_cuda:
            torch.cuda.synchronize(self.desk.device)
        settled = self.crew.settle(SETTLED)
        super().reset()
        self.desk[ALONE] = int(not settled or self.problem is not None)

    def close(self) -> None:
        """End the crew; nothing may be under way."""
        self.crew.close()

    # -- the device's side ---------------------------------------------------------------------------------

    def post(self, layer: int, half: int, split: Split, x: Prepared) -> None:
        """Give the crew its rows, and the activations: one vector for all choices, or one for each."""
        matrix, answers = self.layouts[layer].matrices[half], self._answers[half]
        self._kernel("post", matrix)(
            x.rows, POST_THREADS, half, layer, len(split.experts), int(half == 1), split.experts, split.begins(half),
            matrix.rows, _row_bytes(matrix), x.pieces, x.scales, x.sums, self.desk, self._letter, answers.numbers,
            answers.numbers.stride(0), answers.scales, answers.scales.stride(0), answers.sums, answers.sums.stride(0),
            self.computed[layer : layer + 1],
        )  # fmt: skip

    def collect(self, layer: int, half: int, split: Split, out: Tensor) -> None:
        """Wait for the crew, and put its rows into `out` [n, N]."""
        answers, rows = self._answers[half], out.shape[1]
        self._kernel("collect", self.layouts[layer].matrices[half])(
            (-(-rows // (4 * COLLECT_THREADS)), len(out), 1), COLLECT_THREADS, half, split.begins(half), rows,
            self._arrived[half], answers.results, answers.results.stride(0), out, self.desk, self._letter,
            self._patience,
        )  # fmt: skip

    def taken(self, half: int, split: Split) -> Rows:
        """Rows that the crew was to compute, if it did not."""
        return split.others(half, self.desk[TAKEN : TAKEN + 1])

    def overdue(self, layer: int, jobs: Jobs, split: Split) -> Jobs:
        """`jobs` with matrices where they lie in host memory."""
        return Jobs(jobs.pool, split.experts, jobs.choices, jobs.share, source=self.sources[layer])

    def _kernel(self, name: str, matrix: PackedMatrix) -> Kernel:
        return self.launcher.kernel("sharing.cu", name, {**Format.of(matrix).defines, "COLUMNS": matrix.columns})


def _row_bytes(matrix: PackedMatrix) -> int:
    return sum(segment.nbytes for segment in matrix.segments) // matrix.rows
