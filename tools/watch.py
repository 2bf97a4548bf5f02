"""What a run costs while it runs: seconds by function, and the process's memory."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAMPLE = 0.5  # seconds


class Phases:
    """Seconds spent in functions, by phase, over all threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._restore: list[Callable[[], None]] = []

    def measure(self, owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - begin

        setattr(owner, name, timed)
        self._restore.append(lambda: setattr(owner, name, function))

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *_: object) -> None:
        for restore in self._restore:
            restore()


class Memory:
    """Resident memory of this process over time, and its peak; both in bytes."""

    def __init__(self) -> None:
        self.curve: list[tuple[float, int]] = []
        self._begin = time.perf_counter()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    @staticmethod
    def field(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) << 10

    def _sample(self) -> None:
        while not self._end.wait(SAMPLE if self.curve else 0):
            self.curve.append((round(time.perf_counter() - self._begin, 2), self.field("VmRSS:")))

    def __enter__(self) -> Memory:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            self.reset = True
        except OSError:
            self.reset = False
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.peak = self.field("VmHWM:")
