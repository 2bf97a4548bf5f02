"""How long work reports itself: a callable that takes a description, the bytes done and the bytes in all.

The library never prints. The command line passes a progress bar, tests pass a list, everyone else passes
nothing.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Called as work goes on; `done` and `total` are bytes."""

    def __call__(self, description: str, done: int, total: int) -> None:
        """Report that `done` of `total` bytes of the work called `description` are finished."""


def silent(description: str, done: int, total: int) -> None:
    """Report nothing."""
