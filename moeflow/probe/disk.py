"""How fast the disk under a directory is read in sequence, past the page cache.

What the page cache holds would come at the speed of memory, so the file is made durable and the kernel asked
to drop its pages before they are read. A file system that lives in memory keeps them and shows its own speed,
which is then the right one. The file has no name, so that it is gone however this ends.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from moeflow.files import storage_errors
from moeflow.progress import Progress, silent

__all__ = ["disk_rate"]

LARGEST = 256 << 20
CHUNK = 8 << 20
SECONDS = 2.0  # for writing and for reading each; a slow disk is measured on less


def disk_rate(directory: Path, progress: Progress = silent, nbytes: int = LARGEST) -> float:
    """Bytes a second read from the disk that holds `directory`.

    Args:
        directory: where the temporary file is made; it must exist.
        progress: told as the file is read.
        nbytes: of the file, at least one chunk of 8 MiB is used.

    Raises:
        StorageError: the directory cannot be written, or its disk is full.
    """
    with (
        storage_errors(directory, "measure the disk"),
        tempfile.TemporaryFile(dir=directory, prefix="moeflow-", buffering=0) as stream,
    ):
        written = _write(stream.fileno(), nbytes)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return _read(stream.fileno(), written, progress)


def _write(file: int, nbytes: int) -> int:
    """Write until `nbytes` or the time is used up, durably: pages that are not on the disk cannot be dropped."""
    block = os.urandom(CHUNK)  # a compressing file system must not make it smaller
    begin = time.perf_counter()
    written = 0
    while written == 0 or (written < nbytes and time.perf_counter() - begin < SECONDS):
        written += os.pwrite(file, block, written)
        os.fdatasync(file)
    return written


def _read(file: int, nbytes: int, progress: Progress) -> float:
    buffer = bytearray(CHUNK)
    begin = time.perf_counter()
    done = 0
    seconds = 0.0
    while done < nbytes and seconds < SECONDS:
        done += os.preadv(file, [buffer], done)
        seconds = time.perf_counter() - begin
        progress("reading the disk", done, nbytes)
    return done / seconds
