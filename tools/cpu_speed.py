"""How near the CPU's kernels come to the memory's rate, beside torch's own int4 product, in one run.

`python tools/cpu_speed.py [--levels] [--formats "hqq 4 64" ...]`: one vector times matrices (14336, 4096), one after
another, more of them than caches hold, with one thread up to all; each thread has its share of the rows. Milliseconds,
rate, share of the memory's rate and ratio to torch are medians of several rounds. `--levels` runs every level of
instructions that the machine has, not the best alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from moeflow.artifact.layout import packed_matrix
from moeflow.kernels import cpu
from moeflow.probe.bandwidth import read_rate
from moeflow.schema import BitsAndBytesScheme, HqqScheme, PackedMatrix, Scheme

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
}


def rounds(action: Callable[[], object]) -> tuple[float, float]:
    """Median and least seconds."""
    action()
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), min(times)


def say(
    name: str, threads: int, nbytes: int, times: tuple[float, float], rate: float, torch_times: list[float]
) -> None:
    """A line; times are those of `nbytes`, others the medians of torch's int4 by threads."""
    median, best = times
    share = nbytes / median / rate
    ratio = f"{others[threads - 1] / median:>8.2f}" if others else " " * 8
    gigabytes = nbytes / median / 1e9, nbytes / best / 1e9
    print(f"{name:<34}{threads:>3}{median * 1e3:>9.2f}{gigabytes[0]:>8.1f}{gigabytes[1]:>8.1f}{share:>8.2f}{ratio}")


def torch_int4(rate: float, most: int) -> list[float]:
    """Median seconds of torch's int4 product by threads."""
    codes = torch.randint(0, 16, (ROWS, COLUMNS), dtype=torch.int32)
    first = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    count = -(-TOGETHER // first.nbytes)
    weights = [first.clone() for _ in range(count)]
    pairs = [torch.rand(COLUMNS // 64, ROWS, 2).bfloat16() for _ in range(count)]
    x, found = torch.randn(1, COLUMNS).bfloat16(), []
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    for threads in range(1, most + 1):
        torch.set_num_threads(threads)
        times = rounds(lambda: [product(x, w, 64, p) for w, p in zip(weights, pairs, strict=True)])
        each = times[0] / count, times[1] / count
        found.append(each[0])
        say("torch int4 g64, bfloat16", threads, first.nbytes + pairs[0].nbytes, each, rate, [])
    return found


def blobs(matrix: PackedMatrix) -> list[Tensor]:
    """Small numbers everywhere: halves and floats of them are finite, and no kernel asks what a code is."""
    end = max(s.offset + s.nbytes for s in matrix.segments)
    return list(torch.randint(0, 60, (-(-TOGETHER // end), -(-end // 4096) * 4096), dtype=torch.uint8))


def kernels(name: str, rate: float, most: int, level: int, planes: int, torch_times: list[float]) -> None:
    matrix = packed_matrix("m", ROWS, COLUMNS, FORMATS[name], "float32")
    gemv = cpu.CpuGemv(matrix, planes, level)
    pool, x, out = blobs(matrix), gemv.prepare(torch.randn(1, COLUMNS)), torch.empty(1, ROWS)
    nbytes = sum(s.nbytes for s in matrix.segments)
    for threads in range(1, most + 1):
        cuts = [ROWS * i // threads for i in range(threads + 1)]
        jobs = [[gemv.job(b, x, out, *cuts[i : i + 2]) for b in pool] for i in range(threads)]
        with ThreadPoolExecutor(threads) as workers:
            times = rounds(lambda jobs=jobs, go=workers.map: list(go(lambda mine: [gemv.run(j) for j in mine], jobs)))
        each = times[0] / len(pool), times[1] / len(pool)
        label = f"{name}, {cpu.LEVELS[level]}" + (", int8 x" if planes == 1 else "")
        say(label, threads, nbytes, each, rate, torch_times)


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
    print(f"{'':<30}threads{'ms':>9}{'GB/s':>8}{'best':>8}{'share':>8}{'x torch':>8}")
    torch_times = torch_int4(rate, options.threads)
    best = cpu.best_level()
    for name in options.formats:
        for level in range(best, -1 if options.levels else best - 1, -1):
            for planes in options.planes:
                kernels(name, rate, options.threads, level, planes, torch_times)


if __name__ == "__main__":
    main()
