"""How near the CPU's kernels come to the memory's rate, beside torch's own int4 product, in one run.

`python tools/cpu_speed.py [--levels] [--formats "hqq 4 64" ...]`: one vector times matrices (14336, 4096), one after
another, more of them than caches hold, with one thread up to all; each thread has its share of the rows. Milliseconds,
rate, share of the memory's rate and ratio to torch are medians of several rounds, in which both take turns. `--levels`
runs every level of instructions that the machine has, not the best alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from moeflow.artifact.layout import packed_matrix
from moeflow.kernels import cpu
from moeflow.probe.bandwidth import read_rate
from moeflow.schema import BitsAndBytesScheme, DenseScheme, HqqScheme, PackedMatrix, Scheme

ROWS, COLUMNS = 14336, 4096
TOGETHER = 400 << 20  # bytes of all matrices of a format
ROUNDS = 7
FORMATS: dict[str, Scheme] = {
    "hqq 4 64": HqqScheme(bits=4),
    "hqq 2 64": HqqScheme(bits=2),
    "hqq 2 16 8": HqqScheme(bits=2, group_size=16, metadata_bits=8),
    "hqq 2 16": HqqScheme(bits=2, group_size=16),
    "hqq 3 64": HqqScheme(bits=3),
    "hqq 8 64": HqqScheme(bits=8),
    "int8": BitsAndBytesScheme(format="int8"),
    "nf4": BitsAndBytesScheme(format="nf4"),
    "bfloat16": DenseScheme(),
}


def rounds(*actions: Callable[[], object]) -> list[tuple[float, float]]:
    """Median and least seconds of each; they take turns, so that a busy machine is as busy for all."""
    times: list[list[float]] = [[] for _ in actions]
    for turn in range(ROUNDS + 1):
        for action, mine in zip(actions, times, strict=True):
            begin = time.perf_counter()
            action()
            if turn:
                mine.append(time.perf_counter() - begin)
    return [(statistics.median(mine), min(mine)) for mine in times]


def say(name: str, threads: int, nbytes: int, times: tuple[float, float], rate: float, ratio: str = "") -> None:
    """A line; times are those of `nbytes`."""
    median, best = times
    gigabytes = f"{nbytes / median / 1e9:>8.1f}{nbytes / best / 1e9:>8.1f}"
    print(f"{name:<34}{threads:>3}{median * 1e3:>9.2f}{gigabytes}{nbytes / median / rate:>8.2f}{ratio:>16}")


class TorchInt4:
    """torch's int4 product with groups of 64 and bfloat16 activations: what it does to all of its matrices."""

    def __init__(self) -> None:
        codes = torch.randint(0, 16, (ROWS, COLUMNS), dtype=torch.int32)
        first = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        self.count = -(-TOGETHER // first.nbytes)
        self._weights = [first.clone() for _ in range(self.count)]
        self._pairs = [torch.rand(COLUMNS // 64, ROWS, 2).bfloat16() for _ in range(self.count)]
        self._x = torch.randn(1, COLUMNS).bfloat16()
        self.nbytes = first.nbytes + self._pairs[0].nbytes

    def __call__(self) -> None:
        for weight, pairs in zip(self._weights, self._pairs, strict=True):
            torch.ops.aten._weight_int4pack_mm_for_cpu(self._x, weight, 64, pairs)


def blobs(matrix: PackedMatrix) -> list[Tensor]:
    """Small numbers everywhere: halves and floats of them are finite, and no kernel asks what a code is."""
    end = max(s.offset + s.nbytes for s in matrix.segments)
    return list(torch.randint(0, 60, (-(-TOGETHER // end), -(-end // 4096) * 4096), dtype=torch.uint8))


def kernels(name: str, rate: float, most: int, level: int, planes: int, other: TorchInt4) -> None:
    matrix = packed_matrix("m", ROWS, COLUMNS, FORMATS[name], "bfloat16")
    gemv = cpu.CpuGemv(matrix, planes, level)
    pool, x, out = blobs(matrix), gemv.prepare(torch.randn(1, COLUMNS)), torch.empty(1, ROWS)
    nbytes = sum(s.nbytes for s in matrix.segments)
    for threads in range(1, most + 1):
        torch.set_num_threads(threads)
        cuts = [ROWS * i // threads for i in range(threads + 1)]
        jobs = [[gemv.job(b, x, out, *cuts[i : i + 2]) for b in pool] for i in range(threads)]
        with ThreadPoolExecutor(threads) as workers:
            ours = partial(_all_jobs, workers, gemv, jobs)
            mine, theirs = rounds(ours, other)
        each = mine[0] / len(pool), mine[1] / len(pool)
        those = theirs[0] / other.count, theirs[1] / other.count
        label = f"{name}, {cpu.LEVELS[level]}" + (", int8 x" if planes == 1 else "")
        ratio = f"{those[0] / each[0]:.2f}, best {those[1] / each[1]:.2f}"
        say(label, threads, nbytes, each, rate, ratio)
        say("  torch int4 beside it", threads, other.nbytes, those, rate)


def _all_jobs(workers: ThreadPoolExecutor, gemv: cpu.CpuGemv, jobs: list[list[cpu.Job]]) -> None:
    list(workers.map(lambda mine: [gemv.run(job) for job in mine], jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", action="store_true")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--planes", type=int, nargs="*", default=[2], choices=[1, 2])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rate = read_rate().rate
    print(f"host memory reads {rate / 1e9:.1f} GB/s with {options.threads} threads; ({ROWS}, {COLUMNS}), one vector")
    print(f"{'':<30}threads{'ms':>9}{'GB/s':>8}{'best':>8}{'share':>8}{'x torch':>16}")
    other, best = TorchInt4(), cpu.best_level()
    for name in options.formats:
        for level in range(best, -1 if options.levels else best - 1, -1):
            for planes in options.planes:
                kernels(name, rate, options.threads, level, planes, other)


if __name__ == "__main__":
    main()
