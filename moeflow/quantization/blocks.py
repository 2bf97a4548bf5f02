"""Cuts a matrix into blocks of rows, and works on them: in as many threads as torch uses on the CPU, in turn on CUDA.

Quantization passes over its numbers some fifteen times in each of its iterations. On the CPU a block stays in a core's
cache between passes, and is so small that torch gives an operation one thread: blocks are divided among threads, not
operations. torch's own threads would meet after each operation, and where another process wants a core each meeting
waits for it: a Mixtral matrix took 3.5 s when the machine was idle and up to 99 s when it was not. On CUDA a launch
costs more than a block gains, and blocks only bound memory. How blocks are cut decides nothing about results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["row_slices", "each"]

ON_CPU = (1 << 15) - 1  # numbers; from 2^15 on torch divides an operation among threads
ON_CUDA = 1 << 26


def row_slices(matrix: Tensor) -> Iterator[slice]:
    """Rows of `matrix` [N, K] that are worked on at once."""
    rows, columns = matrix.shape
    step = max(1, (ON_CPU if matrix.device.type == "cpu" else ON_CUDA) // columns)
    for begin in range(0, rows, step):
        yield slice(begin, min(rows, begin + step))


def each(matrix: Tensor, work: Callable[[list[slice]], None]) -> None:
    """Call `work` with some of the blocks of `matrix`, in several threads where that helps, until all are done."""
    blocks = list(row_slices(matrix))
    threads = torch.get_num_threads() if matrix.device.type == "cpu" else 1
    if threads == 1 or len(blocks) == 1:
        work(blocks)
        return
    share = -(-len(blocks) // (4 * threads))  # a thread that is held up leaves its share to others
    with ThreadPoolExecutor(threads, "moeflow-quantize") as pool:
        for _ in pool.map(work, (blocks[i : i + share] for i in range(0, len(blocks), share))):
            pass
