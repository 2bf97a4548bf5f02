"""Expert blobs off the device: in host memory as far as the plan says, the rest on disk.

For a CUDA device host memory is page-locked, so that copies run at the link's speed beside computation and kernels
can read it. It is ordinary memory that is registered with the driver once it is filled: torch's own allocator of
page-locked memory takes ten times as long a GiB and rounds each piece up to a power of two. Where the system refuses
to lock that much, the layers that it refused stay ordinary memory, and `refused` says so.

Memory that is freed while it is registered stays registered: whoever is given the same addresses next is refused. So a
finalizer holds the locked memory and unregisters it first, at `close`, when a store that nobody closed is collected, or
when the process ends, whichever comes first.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch import Tensor

from moeflow.artifact.reader import Artifact
from moeflow.errors import CapacityError
from moeflow.kernels.pages import allocate, device_address
from moeflow.kernels.pages import register as _register
from moeflow.kernels.pages import unregister as _unregister
from moeflow.progress import Progress, silent
from moeflow.schema.units import format_size

__all__ = ["HostStore"]

READERS = 4  # threads that read and digest; more did not help a single disk


class HostStore:
    """All blobs of an artifact, in their tiers."""

    def __init__(self, artifact: Artifact, ram_experts: tuple[int, ...], pin: bool, progress: Progress = silent):
        self.artifact = artifact
        self.ram_experts = ram_experts
        self.refused: str | None = None
        """What the system did not page-lock, with numbers; None if all is locked or nothing was to be."""
        self._starts = [artifact.manifest.starts(layer) for layer in range(len(ram_experts))]
        self._memory = [_allocate(starts[count]) for count, starts in zip(ram_experts, self._starts, strict=True)]
        self._locked = [False] * len(ram_experts)
        self._compared: set[tuple[int, int]] = set()  # blobs on disk that were as they should be when first read
        self._held: list[Tensor] = []  # what is registered
        self._unlock = weakref.finalize(self, _unlock, self._held)
        try:
            self._load(progress)
            if pin:
                self._lock(progress)
        except BaseException:
            self.close()
            raise

    def _lock(self, progress: Progress) -> None:
        total, done = sum(memory.nbytes for memory in self._memory), 0
        for layer, memory in enumerate(self._memory):
            progress("locking pages", done, total)
            if memory.nbytes and (error := self._try_lock(memory)):
                self.refused = (
                    f"{format_size(done)} of {format_size(total)} of experts are in page-locked memory; the system "
                    f"refused more ({error}), so the rest is copied through a small buffer, slower: raise `ulimit -l`, "
                    "the container's memory limit or WSL's `memory` setting, or lower memory.ram"
                )
                return
            self._locked[layer] = memory.nbytes > 0
            done += memory.nbytes
        progress("locking pages", total, total)

    def _try_lock(self, memory: Tensor) -> str | None:
        self._held.append(memory)  # before it is so: an interruption in between must not leave it registered
        if error := _register(memory):
            self._held.pop()
        return error

    @property
    def pinned(self) -> bool:
        """Whether all blobs in host memory are page-locked."""
        return all(lock or not m.nbytes for lock, m in zip(self._locked, self._memory, strict=True))

    def locked(self, layer: int) -> bool:
        """Whether this layer's blobs are page-locked."""
        return self._locked[layer]

    def address(self, layer: int) -> int:
        """Where the layer's first blob lies; for page-locked memory as a CUDA device sees it."""
        pointer = self._memory[layer].data_ptr()
        return device_address(pointer) if self._locked[layer] else pointer

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

    def place(self, layer: int, expert: int, count: int = 1) -> slice:
        """Where a blob, or that of `count` neighbours, lies among all of its layer: a range of bytes."""
        starts = self._starts[layer]
        return slice(starts[expert], starts[expert + count])

    def in_ram(self, layer: int, expert: int) -> bool:
        """Whether `view` serves; otherwise `read` does."""
        return expert < self.ram_experts[layer]

    def view(self, layer: int, expert: int, count: int = 1) -> Tensor:
        """A blob in host memory, or that of `count` neighbours: uint8, not copied."""
        return self._memory[layer][self.place(layer, expert, count)]

    def read(self, layer: int, expert: int, target: Tensor) -> None:
        """Copy a blob into `target`, host memory of its size; one from disk is compared with its digest once.

        Raises:
            ArtifactError: it is damaged.
        """
        if self.in_ram(layer, expert):
            target.copy_(self.view(layer, expert))
            return
        verify = (layer, expert) not in self._compared
        self.artifact.read_blob(layer, expert, target.numpy().data, verify)
        self._compared.add((layer, expert))

    def close(self) -> None:
        """Release the memory, which nothing on the device may still read; calling it again does nothing."""
        self._unlock()
        self._memory, self._locked = [], [False] * len(self._locked)


def _allocate(nbytes: int) -> Tensor:
    try:
        return allocate(nbytes)
    except OSError as error:
        raise CapacityError(
            f"host memory for experts: {format_size(nbytes)} more refused; set memory.ram lower, the rest "
            "is then read from disk"
        ) from error


def _unlock(held: list[Tensor]) -> None:
    """Unregister and forget `held`; silent, because a device that failed or is gone already has let go of it."""
    with contextlib.suppress(Exception):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a store that was dropped may have copies under way
    while held:
        with contextlib.suppress(Exception):
            _unregister(held[-1])
        held.pop()
