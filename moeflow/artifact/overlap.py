"""Reading ahead and writing behind, each on a thread of its own, so that neither waits for the quantizer.

Both keep order: results come as their tasks were given, writes happen as they were asked for. What fails there is
raised here, at the place in that order. The quantizer stays in the calling thread, where Ctrl-C reaches it between two
operations. Reading, hashing and writing release the interpreter's lock. Neither knows what it reads or writes.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Task", "read_ahead", "WriteBehind"]

T = TypeVar("T")
AHEAD = 512 << 20
"""Bytes that may wait beside what is worked on: an expert of Mixtral's is 336 MiB. A larger task waits alone."""
TASKS = 8
"""And as many tasks at most: small ones are read in less time than it takes to begin another."""


@dataclass(frozen=True)
class Task(Generic[T]):
    """Something to be read."""

    nbytes: int
    """Memory that the result takes."""
    run: Callable[[], T]


@contextlib.contextmanager
def read_ahead(tasks: Iterable[Task[T]], nbytes: int = AHEAD) -> Iterator[Iterator[T]]:
    """The tasks' results in order, each begun before it is asked for; the block's end drops what was not."""
    with ThreadPoolExecutor(1, "moeflow-read") as pool:
        waiting: deque[tuple[int, Future[T]]] = deque()
        try:
            yield _results(tasks, pool, waiting, nbytes)
        finally:
            for _, future in waiting:
                future.cancel()


def _results(
    tasks: Iterable[Task[T]], pool: ThreadPoolExecutor, waiting: deque[tuple[int, Future[T]]], most: int
) -> Iterator[T]:
    queue = iter(tasks)
    following = next(queue, None)
    while waiting or following:
        while following and _fits(following, waiting, most):
            waiting.append((following.nbytes, pool.submit(following.run)))
            following = next(queue, None)
        yield waiting.popleft()[1].result()  # and keeps no reference to it


def _fits(task: Task[T], waiting: deque[tuple[int, Future[T]]], most: int) -> bool:
    """Whether one more may be begun; the first does not count, since its result is about to be handed over."""
    if len(waiting) < 2:
        return True
    return len(waiting) <= TASKS and sum(size for size, _ in waiting) - waiting[0][0] + task.nbytes <= most


class WriteBehind:
    """Runs one write at a time; the caller may prepare the next meanwhile, and no more than that."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "moeflow-write")
        self._last: Future[Any] | None = None

    def submit(self, write: Callable[[], object]) -> None:
        """Begin `write` when the one before has ended, which is waited for; raises what that one raised."""
        self.drain()
        self._last = self._pool.submit(write)

    def drain(self) -> None:
        """Wait until all is written; raises what the last write raised."""
        last, self._last = self._last, None
        if last:
            last.result()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            self._pool.shutdown()
