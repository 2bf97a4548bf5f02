"""The copy kernel: how it is launched, and one range copied by it, as the probe times it.

Which blobs are copied, and where to, is decided on the device in `moeflow.offload.device`; here the caller says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeflow.kernels.launcher import Launcher

__all__ = ["COPY_BLOCKS", "COPY_THREADS", "PIECE", "RangeCopy"]

PIECE = 4096  # bytes that a warp moves at once; desk.cuh's
# Four blocks of 16 warps fill PCIe 5 x16 from huge pages (50.6 GB/s of the copy engine's 51.5), eight also from small
# ones (47.4 instead of 35.2 over 12 GiB); more slow the products beside them.
COPY_BLOCKS, COPY_THREADS = 8, 512


class RangeCopy:
    """Copies of single ranges from page-locked host memory, with the engine's own grid.

    Args:
        launcher: runs the kernel.
        device: where the targets are.
    """

    def __init__(self, launcher: Launcher, device: torch.device):
        warps = COPY_BLOCKS * COPY_THREADS // 32
        self._kernel = launcher.kernel("copy.cu", "copy", {"GUESSES": 1, "WARPS": warps})
        self._job = torch.tensor([[0, 0, -1]], dtype=torch.int32, device=device)  # blob 0 to buffer 0, no guess
        self._count = torch.ones(1, dtype=torch.int32, device=device)
        self._progress = torch.zeros(1, warps, dtype=torch.int32, device=device)
        self._counters = torch.zeros(3, dtype=torch.int64, device=device)

    def __call__(self, source: int, target: Tensor) -> None:
        """Fill `target`, uint8 [n] with n a multiple of `PIECE`, in the current stream.

        `source` is an address as the device sees it, at a multiple of 16 like the target's.
        """
        self._kernel(
            COPY_BLOCKS, COPY_THREADS, source, target, target.nbytes, self._job, self._count, self._progress,
            0, target.nbytes // PIECE, self._counters, None, None, None, 0,
        )  # fmt: skip
