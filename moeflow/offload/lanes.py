"""Streams of a device-driven step: computation, copies beside it, and guesses that nobody waits for.

In a CUDA graph they become branches. Without CUDA everything runs in the order in which it is asked for, which is one
of the orders that the streams allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Lanes", "Mark"]


class Mark:
    """A point in a stream."""

    def __init__(self, event: torch.cuda.Event | None):
        self._event = event

    def wait(self) -> None:
        """Order what is issued to the current stream from now on behind the point."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class Lanes:
    """The copy stream and the side stream of a device."""

    def __init__(self, device: torch.device):
        cuda = device.type == "cuda"
        # Both are short beside products that fill the device, and would wait behind their thousands of blocks.
        self._copies = torch.cuda.Stream(device, priority=-1) if cuda else None  # type: ignore[no-untyped-call]
        self._side = torch.cuda.Stream(device, priority=-1) if cuda else None  # type: ignore[no-untyped-call]

    def mark(self) -> Mark:
        """The end of what the current stream was given so far."""
        if self._copies is None:
            return Mark(None)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Mark(event)

    @contextmanager
    def copies(self, after: Mark | None = None) -> Iterator[None]:
        """Issue to the copy stream, behind `after` or all that the current stream was given."""
        with self._on(self._copies, after):
            yield

    @contextmanager
    def side(self) -> Iterator[None]:
        """Issue to the side stream, behind all that the current stream was given."""
        with self._on(self._side, None):
            yield

    @contextmanager
    def _on(self, stream: torch.cuda.Stream | None, after: Mark | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        after = after or self.mark()
        with torch.cuda.stream(stream):
            after.wait()
            yield

    def wait(self) -> None:
        """Let the host wait for what the current stream was given."""
        if self._copies is not None:
            torch.cuda.current_stream().synchronize()

    def synchronize(self) -> None:
        """Wait for both streams."""
        for stream in (self._copies, self._side):
            if stream is not None:
                stream.synchronize()
