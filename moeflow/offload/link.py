"""The way from host to device: copies that run beside computation.

Copies are carried out in the order in which they are asked for. On CUDA they run on their own stream; without
a GPU a worker thread copies from host memory to the slots that stand for the device's. Blobs on disk are read
by a worker in both cases, and so are those that the system would not page-lock: into a small page-locked buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

import torch
from torch import Tensor

from moeflow.offload.store import HostStore

__all__ = ["Ticket", "Link", "CpuLink", "CudaLink", "make_link"]

RUN = 32 << 20  # bytes that neighbouring blobs are copied in at once; a copy of its own costs microseconds each


class Ticket(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Make all computation that is issued after this call see the copied bytes."""

    def settle(self) -> None:
        """Return once the target may be given to another copy."""


class Link(Protocol):
    """Brings blobs to the device."""

    def fetch(self, layer: int, expert: int, target: Tensor) -> Ticket:
        """Start copying a blob to `target`, device memory of its size, after all computation issued so far."""

    def fetch_many(self, layer: int, experts: Sequence[int], buffer: Tensor) -> dict[int, Ticket]:
        """As `fetch`, for ascending ids; `buffer` has the place of every expert of the layer, blob after blob."""

    def drain(self) -> None:
        """Wait for all that is under way, whether it fails or not."""

    def close(self) -> None:
        """Wait for what is under way and release threads."""


class _ThreadTicket:
    def __init__(self, future: Future[None]):
        self._future = future

    def wait(self) -> None:
        self._future.result()

    def settle(self) -> None:
        """Nothing to do: the one worker keeps the order of copies."""


class CpuLink:
    """Memory to memory by one worker thread."""

    def __init__(self, store: HostStore):
        self._store = store
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="moeflow-link")

    def fetch(self, layer: int, expert: int, target: Tensor) -> Ticket:
        """Start copying a blob."""
        return _ThreadTicket(self._worker.submit(self._copy, layer, expert, target))

    def fetch_many(self, layer: int, experts: Sequence[int], buffer: Tensor) -> dict[int, Ticket]:
        """Start copying blobs, one after another."""
        return {e: self.fetch(layer, e, buffer[self._store.place(layer, e)]) for e in experts}

    def _copy(self, layer: int, expert: int, target: Tensor) -> None:
        if self._store.in_ram(layer, expert):
            target.copy_(self._store.view(layer, expert))
        else:
            self._store.read(layer, expert, target)

    def drain(self) -> None:
        """Wait for all that is under way, whether it fails or not."""
        self._worker.submit(lambda: None).result()

    def close(self) -> None:
        """Drop what has not begun and wait for the rest."""
        self._worker.shutdown(cancel_futures=True)


class _CudaTicket:
    def __init__(self, event: torch.cuda.Event):
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def settle(self) -> None:
        """Nothing to do: the copy stream keeps the order of copies."""


class _DiskTicket:
    def __init__(self, future: Future[torch.cuda.Event]):
        self._future = future

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._future.result())

    def settle(self) -> None:
        wait([self._future])  # until then the copy is not in the stream's order; whether it failed is nobody's business


class CudaLink:
    """Copies by the GPU's copy engine, on a stream of their own."""

    def __init__(self, store: HostStore, device: torch.device):
        self._store = store
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="moeflow-disk")
        self._bounce: list[tuple[Tensor, torch.cuda.Event]] = []

    def fetch(self, layer: int, expert: int, target: Tensor) -> Ticket:
        """Start copying a blob."""
        return self._start(layer, expert, 1, target, self._computed())

    def fetch_many(self, layer: int, experts: Sequence[int], buffer: Tensor) -> dict[int, Ticket]:
        """Start copying blobs, several neighbours at once."""
        computed = self._computed()
        tickets: dict[int, Ticket] = {}
        for first, count in self._runs(layer, experts):
            target = buffer[self._store.place(layer, first, count)]
            ticket = self._start(layer, first, count, target, computed)
            tickets.update(dict.fromkeys(range(first, first + count), ticket))
        return tickets

    def _runs(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """First expert and count of neighbours that one copy may take."""
        start = 0
        for end in range(1, len(experts) + 1):
            following = end < len(experts) and experts[end] == experts[end - 1] + 1
            if not (following and self._direct(layer, experts[end]) and self._fit(layer, experts[start], experts[end])):
                yield experts[start], end - start
                start = end

    def _fit(self, layer: int, first: int, last: int) -> bool:
        """Whether neighbours are no more than is copied at once."""
        place = self._store.place(layer, first, last - first + 1)
        return place.stop - place.start <= RUN

    def _computed(self) -> torch.cuda.Event:
        """The end of the computation issued so far."""
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self._device))
        return computed

    def _direct(self, layer: int, expert: int) -> bool:
        """Whether the copy engine reads the blob where it lies."""
        return self._store.in_ram(layer, expert) and self._store.locked(layer)

    def _start(self, layer: int, expert: int, count: int, target: Tensor, computed: torch.cuda.Event) -> Ticket:
        if self._direct(layer, expert):
            self._stream.wait_event(computed)
            return _CudaTicket(self._copy(self._store.view(layer, expert, count), target))
        assert count == 1, "blobs that are not locked go one by one"
        return _DiskTicket(self._worker.submit(self._read_and_copy, layer, expert, target, computed))

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return copied

    def _read_and_copy(self, layer: int, expert: int, target: Tensor, computed: torch.cuda.Event) -> torch.cuda.Event:
        buffer = self._free_bounce(target.nbytes)
        self._store.read(layer, expert, buffer)
        self._stream.wait_event(computed)
        copied = self._copy(buffer, target)
        self._bounce.append((buffer, copied))
        return copied

    def _free_bounce(self, nbytes: int) -> Tensor:
        """A page-locked buffer whose last copy is over; two are enough to read while the other is copied."""
        fitting = [pair for pair in self._bounce if pair[0].nbytes == nbytes]
        if len(fitting) < 2:
            return _bounce(nbytes)
        self._bounce.remove(fitting[0])
        fitting[0][1].synchronize()
        return fitting[0][0]

    def drain(self) -> None:
        """Wait for all that is under way, whether it fails or not."""
        self._worker.submit(lambda: None).result()
        self._stream.synchronize()

    def close(self) -> None:
        """Drop what has not begun and wait for the rest."""
        self._worker.shutdown(cancel_futures=True)
        self._stream.synchronize()


def _bounce(nbytes: int) -> Tensor:
    """Page-locked memory, or ordinary memory where the system refuses even that."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # CUDA's own error types vary between versions
        return torch.empty(nbytes, dtype=torch.uint8)


def make_link(store: HostStore, device: torch.device) -> Link:
    """The link to `device`."""
    makers: dict[str, Callable[[], Link]] = {"cpu": lambda: CpuLink(store), "cuda": lambda: CudaLink(store, device)}
    return makers[device.type]()
