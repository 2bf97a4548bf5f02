"""Reads a stretch of a file into a CUDA device's memory, through page-locked pieces and a stream of its own.

Copying from a mapped file instead waits for the disk inside the driver, and the thread that quantizes waits with it,
whatever the stream (docs/log.md). Here several threads read pieces, since one does not keep a disk busy, and each
piece is copied while the next are read. Knows nothing of tensors.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from moeflow.errors import CheckpointError

__all__ = ["read_to_device", "read_piece"]

PIECE = 16 << 20
READERS = 4


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all reads: what an allocator frees for one stream, it does not give to another."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def read_to_device(file: Path, offset: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Bytes `offset` to `offset + nbytes` of `file` as uint8 [nbytes] on `device`; they are there when this returns.

    Raises:
        CheckpointError: the file ends before.
        OSError: it cannot be read.
    """
    stream, user = _stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target.record_stream(user)  # freed, it is given to the next read only when what was computed with it is done

    def bring(begin: int) -> None:
        piece = torch.empty(min(PIECE, nbytes - begin), dtype=torch.uint8, pin_memory=True)
        read_piece(file, descriptor, offset + begin, piece.numpy().data)
        with torch.cuda.stream(stream):
            target[begin : begin + len(piece)].copy_(piece, non_blocking=True)  # torch keeps the piece until then

    descriptor = os.open(file, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(READERS, "moeflow-piece") as pool:
            for _ in pool.map(bring, range(0, nbytes, PIECE)):
                pass
    finally:
        os.close(descriptor)
    stream.synchronize()
    return target


def read_piece(file: Path, descriptor: int, offset: int, into: memoryview) -> None:
    """Fill `into` from `offset` of the open `file`.

    Raises:
        CheckpointError: the file ends before; it was whole when its header was read.
    """
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{file}: ends at byte {offset + done}, {len(into) - done} bytes early; fetch this file again"
            )
        done += count
