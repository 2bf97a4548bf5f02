"""Reading a few numbers back while the link is busy: `tolist` without the copy engine."""

from __future__ import annotations

import torch
from torch import Tensor

from moeflow.kernels.launcher import Launcher

__all__ = ["Publisher"]

THREADS = 256


class Publisher:
    """Reads int64 values from a device; one reading at a time."""

    def __init__(self, launcher: Launcher, device: torch.device):
        self._kernel = launcher.kernel("publish.cu", "publish")
        self._cuda = device.type == "cuda"
        self._host = torch.empty(0, dtype=torch.int64)

    def __call__(self, values: Tensor) -> list[int]:
        """The elements of `values`, flat, once the current stream has computed them."""
        flat = values.reshape(-1).to(torch.int64)
        if flat.numel() > self._host.numel():
            self._host = torch.empty(flat.numel(), dtype=torch.int64, pin_memory=self._cuda)
        self._kernel(1, THREADS, flat, flat.numel(), self._host)
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        numbers: list[int] = self._host[: flat.numel()].tolist()
        return numbers
