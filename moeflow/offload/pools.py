"""Buffers on the device, all of one blob size, and the ring of those that are free.

A ring is taken at its head and given back at its tail by `kernels/source/cache.cu`; nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["Pool", "Residents"]


class Residents(Mapping[int, Tensor]):
    """Experts and their blobs. A view is made when it is asked for: a layer may have hundreds."""

    def __init__(self, memory: Tensor, places: dict[int, int]):
        self._memory, self._places = memory, places

    def __getitem__(self, expert: int) -> Tensor:
        return self._memory[self._places[expert]]

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Pool:
    """The buffers of one blob size, and the ring of those that are free."""

    def __init__(self, count: int, nbytes: int, device: torch.device):
        self.memory = torch.empty(count, nbytes, dtype=torch.uint8, device=device)  # [B, blob bytes]
        self.ring = torch.empty(count, dtype=torch.int32, device=device)
        self.state = torch.empty(2, dtype=torch.int32, device=device)
        self.reset()

    def reset(self) -> None:
        """All are free."""
        self.ring.copy_(torch.arange(len(self.ring), dtype=torch.int32))
        self.state.copy_(torch.tensor([0, len(self.ring)], dtype=torch.int32))
