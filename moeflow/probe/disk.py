"""How fast the disk under a directory is read, in sequence and at random, past the page cache.

What the page cache holds would come at the speed of memory. So the file is made durable and read directly, into memory
that begins at a page; where the file system refuses that, the kernel is asked to drop the file's pages before they are
read. A file system that lives in memory keeps them and shows its own speed, which is then the right one. The file has
no name, so that it is gone however this ends.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moeflow.files import storage_errors
from moeflow.probe.measurement import SECONDS, Measurement, spread_of
from moeflow.progress import Progress, silent

__all__ = ["BLOB", "DiskRates", "disk_rates"]

LARGEST = 256 << 20
CHUNK = 8 << 20
BLOB = 4 << 20
"""Bytes of a random read where no artifact says how large its experts are: between Qwen3's and Mixtral's."""

DIRECT = "direct reads"
DROPPED = "reads after the page cache was dropped, since the file system refuses direct ones"


@dataclass(frozen=True)
class DiskRates:
    """What was measured, and how."""

    sequential: Measurement
    random: Measurement
    blob: int
    """Bytes of one random read."""
    how: str
    """For people."""


def disk_rates(directory: Path, progress: Progress = silent, nbytes: int = LARGEST, blob: int = BLOB) -> DiskRates:
    """Read a temporary file on the disk that holds `directory`, one read at a time.

    Args:
        directory: where the file is made; it must exist.
        progress: told as the file is read.
        nbytes: of the file; at least one chunk of 8 MiB is used, and less if the disk is slow.
        blob: bytes of one random read, rounded up to whole pages, and not more than the file has.

    Raises:
        StorageError: the directory cannot be written, or its disk is full.
    """
    with (
        storage_errors(directory, "measure the disk"),
        tempfile.TemporaryFile(dir=directory, prefix="moeflow-", buffering=0) as stream,
    ):
        file = stream.fileno()
        written = _write(file, nbytes)
        _drop(file)
        direct = _open_direct(file)
        sequential = _read(file, range(0, written, CHUNK), CHUNK, "reading the disk", progress)
        blob = min(-(-blob // mmap.PAGESIZE) * mmap.PAGESIZE, written)
        places = list(range(0, written - blob + 1, blob))
        random.shuffle(places)
        if not direct:
            _drop(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # nothing ahead of what is asked for
        scattered = _read(file, places, blob, "reading the disk at random", progress)
        return DiskRates(sequential, scattered, blob, DIRECT if direct else DROPPED)


def _write(file: int, nbytes: int) -> int:
    """Write until `nbytes` or the time is used up, durably: pages that are not on the disk cannot be dropped."""
    block = os.urandom(CHUNK)  # a compressing file system must not make it smaller
    begin = time.perf_counter()
    written = 0
    while written == 0 or (written < nbytes and time.perf_counter() - begin < SECONDS):
        written += os.pwrite(file, block, written)
        os.fdatasync(file)
    return written


def _drop(file: int) -> None:
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _open_direct(file: int) -> bool:
    """Have `file` read past the page cache, if its file system can; some take the flag and refuse the reads."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(file, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
    except OSError:
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
        return False
    return True


def _read(file: int, places: Iterable[int], nbytes: int, description: str, progress: Progress) -> Measurement:
    """Read `nbytes` at each of `places`, until the time is used up; the rate is that of all of them together."""
    places = list(places)
    buffer = mmap.mmap(-1, nbytes)  # begins at a page, as direct reads must
    rates: list[float] = []
    done, begin = 0, time.perf_counter()
    seconds = 0.0
    for place in places:
        got = os.preadv(file, [buffer], place)
        passed = time.perf_counter() - begin
        rates.append(got / (passed - seconds))
        done, seconds = done + got, passed
        progress(description, done, len(places) * nbytes)
        if seconds >= SECONDS:
            break
    return Measurement(done / seconds, spread_of(rates))
