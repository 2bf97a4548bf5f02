"""Expert blobs off the device: in host memory as far as the plan says, the rest on disk.

For a CUDA device host memory is page-locked, so that copies run at the link's speed beside computation; where
the system refuses that much, ordinary memory serves, and `pinned` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch import Tensor

from moeflow.artifact.reader import Artifact
from moeflow.errors import CapacityError
from moeflow.progress import Progress, silent
from moeflow.schema.units import format_size

__all__ = ["HostStore"]

READERS = 4  # threads that read and digest; more did not help a single disk


class HostStore:
    """All blobs of an artifact, in their tiers."""

    def __init__(self, artifact: Artifact, ram_experts: tuple[int, ...], pin: bool, progress: Progress = silent):
        self.artifact = artifact
        self.ram_experts = ram_experts
        self.pinned = pin
        sizes = [(count, artifact.manifest.layout_of(layer).nbytes) for layer, count in enumerate(ram_experts)]
        self._memory = [self._allocate(count * nbytes) for count, nbytes in sizes]
        self._load(progress)

    def _allocate(self, nbytes: int) -> Tensor:
        if self.pinned:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # CUDA's own error types vary between versions
                self.pinned = False
        try:
            return torch.empty(nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise CapacityError(
                f"host memory for experts: {format_size(nbytes)} more refused; set memory.ram lower, the rest "
                "is then read from disk"
            ) from error

    def _load(self, progress: Progress) -> None:
        places = list(self._places())
        total = sum(blob.nbytes for _, _, blob in places)
        done = 0
        progress("loading experts", done, total)
        with ThreadPoolExecutor(READERS) as pool:
            futures = {pool.submit(self._read, layer, e, blob): blob.nbytes for layer, e, blob in places}
            try:
                for future in as_completed(futures):
                    future.result()
                    done += futures[future]
                    progress("loading experts", done, total)
            except BaseException:  # Ctrl-C or a damaged blob must not wait for gigabytes more
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _places(self) -> Iterator[tuple[int, int, Tensor]]:
        for layer, count in enumerate(self.ram_experts):
            for expert in range(count):
                yield layer, expert, self.view(layer, expert)

    def _read(self, layer: int, expert: int, target: Tensor) -> None:
        self.artifact.read_blob(layer, expert, target.numpy().data)

    def nbytes(self, layer: int) -> int:
        """Size of a blob of this layer."""
        return self.artifact.manifest.layout_of(layer).nbytes

    def in_ram(self, layer: int, expert: int) -> bool:
        """Whether `view` serves; otherwise `read` does."""
        return expert < self.ram_experts[layer]

    def view(self, layer: int, expert: int) -> Tensor:
        """A blob in host memory: uint8, not copied."""
        nbytes = self.nbytes(layer)
        return self._memory[layer][expert * nbytes : (expert + 1) * nbytes]

    def read(self, layer: int, expert: int, target: Tensor) -> None:
        """Read a blob from disk into `target`, host memory of its size; its digest is not compared again."""
        self.artifact.read_blob(layer, expert, target.numpy().data, verify=False)

    def close(self) -> None:
        """Release the memory."""
        self._memory = []
