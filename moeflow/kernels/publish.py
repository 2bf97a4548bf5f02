"""Reading a few numbers back while the link is busy: `tolist` and `item` without the copy engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeflow.kernels.launcher import Launcher

__all__ = ["Publisher"]

THREADS = 256
UNREAD = 4  # values that may be on their way at once


class Publisher:
    """Reads int64 values from a device."""

    def __init__(self, launcher: Launcher, device: torch.device):
        self._kernel = launcher.kernel("publish.cu", "publish")
        self._cuda = device.type == "cuda"
        self._host = torch.empty(0, dtype=torch.int64)
        self._single = torch.empty(UNREAD, dtype=torch.int64, pin_memory=self._cuda)
        self._sent = 0

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

    def send(self, value: Tensor) -> Callable[[], int]:
        """Start reading `value` [1], behind what the current stream was given; to be called before three more are sent.

        Waiting for it holds nothing that other threads need, as a copy to ordinary memory does.
        """
        place = self._single[self._sent % UNREAD :][:1]
        self._sent += 1
        self._kernel(1, 1, value, 1, place)
        if not self._cuda:
            return lambda: int(place)
        event = torch.cuda.Event()
        event.record()

        def read() -> int:
            event.synchronize()
            return int(place)

        return read
